"""Products in 16 bits beside PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from support.halves import EPS, rounded
from support.strategies import normal, seeds, sizes

from minilora.frozen.half import HALVES, HalfWeight
from minilora.frozen.weight import DenseWeight


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@given(seed=seeds, n=sizes, inner=sizes, outer=sizes)
def test_products_in_16_bits_are_those_of_pytorchs_autocast(
    half: str, seed: int, n: int, inner: int, outer: int
) -> None:
    torch = pytest.importorskip("torch")
    x, W = normal(seed, n, inner).astype(np.float32), normal(seed, outer, inner, stream=1).astype(np.float32)
    dy = rounded(normal(seed, n, outer, stream=2), half).astype(np.float32)
    weight = HalfWeight(DenseWeight(W.astype(HALVES[half])), HALVES[half])
    theirs = torch.tensor(x, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16 if half == "bf16" else torch.float16):
        y = torch.nn.functional.linear(theirs, torch.tensor(W))
    y.backward(torch.tensor(dy).to(y.dtype))
    near = {"rtol": 2 * EPS[half], "atol": 4 * EPS[half]}  # the same sums in another order may round the other way
    np.testing.assert_allclose(weight.forward(x), y.detach().float().numpy(), **near)
    np.testing.assert_allclose(weight.backward(dy), theirs.grad.float().numpy(), **near)
