"""bitsandbytes and minilora write the same codes."""

from __future__ import annotations

import numpy as np
import pytest
from support.strategies import normal

from minilora.frozen.nf4 import DYNAMIC, NF4Weight


@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (300, 128)])
def test_bitsandbytes_writes_the_same_codes(shape: tuple[int, int]) -> None:
    """Where it is installed. Its library for the CPU looks the a's codes up, now and then beside the nearest value."""
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    W = normal(0, *shape).astype(np.float32)
    codes, state = functional.quantize_4bit(torch.tensor(W), blocksize=64, compress_statistics=True, quant_type="nf4")
    weight = NF4Weight(W)
    assert weight.codes.tobytes() == codes.numpy().tobytes()
    assert DYNAMIC.tobytes() == functional.create_dynamic_map().numpy().tobytes()
    apart = abs(weight.absmax_codes.astype(int) - state.absmax.numpy())
    assert apart.max() <= 1 and apart.mean() < 0.02
    np.testing.assert_allclose(weight.mean, state.offset.item(), rtol=1e-6)
    np.testing.assert_allclose(weight.scales, state.state2.absmax.numpy(), rtol=1e-5)
