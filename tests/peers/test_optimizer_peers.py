"""The optimisers that keep less walk where those of transformers and bitsandbytes walk.

The wheel of bitsandbytes has no 8-bit optimiser for the CPU: its step there is asked for and refused. What is compared
is the same step in plain PyTorch, which stands beside its Triton kernels, and the functions and tables it is made of.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_parameters import walks_beside
from support.strategies import normal, seeds

from minilora.frozen.nf4 import DYNAMIC, DYNAMIC_UNSIGNED, dequantize, quantize
from minilora.training.optimizers import Adafactor, AdamW8bit, Lion

torch = pytest.importorskip("torch")
SHAPES = {"matrix": (40, 30), "gain": (7,), "stack": (2, 5, 3)}
TABLES = [(DYNAMIC, True), (DYNAMIC_UNSIGNED, False)]


@pytest.fixture(scope="module")
def bitsandbytes() -> Iterator[Any]:
    """Its functions on the CPU, and none of its code compiled: that would take minutes."""
    pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        yield import_module("bitsandbytes.functional")


@pytest.fixture(scope="module")
def step_in_pytorch(bitsandbytes: Any) -> Any:
    """`optimizer_update_8bit_blockwise_pytorch`, which is in a file that imports Triton but does not need it."""
    names = ("triton", "triton.language", "triton.language.extra")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, MagicMock())
        module = import_module("bitsandbytes.backends.triton.kernels_optim")
        for name in [name for name in sys.modules if name.startswith("bitsandbytes.backends.triton")]:
            patch.delitem(sys.modules, name)
    return module.optimizer_update_8bit_blockwise_pytorch


def arrays(seed: int, dtype: Any) -> dict[str, np.ndarray]:
    return {name: normal(seed, *shape, stream=i).astype(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


@settings(max_examples=5)
@given(seed=seeds, rate=st.floats(1e-4, 0.1), decay=st.floats(0, 1))
def test_adafactor_walks_where_transformers_walks(seed: int, rate: float, decay: float) -> None:
    transformers = pytest.importorskip("transformers")
    parameters = arrays(seed, np.float64)
    grow = [{name: 1.2**t * g for name, g in arrays(seed + t, np.float64).items()} for t in range(40)]  # clipping acts
    walks_beside(
        lambda groups: transformers.Adafactor(groups, rate, scale_parameter=False, relative_step=False),
        Adafactor(parameters, decay),
        parameters,
        decay,
        rate,
        grow,
        1e-9,
    )


@pytest.mark.parametrize(("table", "signed"), TABLES, ids=["m", "v"])
def test_the_values_for_m_and_for_v_are_those_of_bitsandbytes(
    table: np.ndarray, signed: bool, bitsandbytes: Any
) -> None:
    np.testing.assert_array_equal(table, bitsandbytes.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize(("table", "signed"), TABLES, ids=["m", "v"])
@pytest.mark.parametrize("size", [256, 1000, 4096])
def test_bitsandbytes_quantises_moments_to_the_same_codes_and_scales(
    table: np.ndarray, signed: bool, size: int, bitsandbytes: Any
) -> None:
    """Its C++ for float32 on the CPU overwrites the table's first value with −1, and so is not what its GPUs do."""
    x = (normal(0, size) * np.exp(3 * normal(1, size))).astype(np.float32)
    x = x if signed else x * x
    codes, absmax = quantize(x, table, 256)
    theirs, state = bitsandbytes.quantize_blockwise(torch.tensor(x).double(), code=torch.tensor(table), blocksize=256)
    np.testing.assert_array_equal(codes, theirs.numpy())
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    state.dtype = torch.float32
    back = bitsandbytes.dequantize_blockwise(theirs, state).numpy()
    np.testing.assert_array_equal(dequantize(codes, absmax, table, 256), back)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(64, 80), (4099,)], ids=["matrix", "vector"])
def test_adamw_8bit_walks_where_bitsandbytes_walks(shape: tuple[int, ...], decay: float, step_in_pytorch: Any) -> None:
    """They divide by a block's largest number and we multiply by its inverse: a code in thousands is the neighbour."""
    p, steps, rate = {"p": normal(0, *shape).astype(np.float32)}, 20, 0.01
    ours, start, theirs = AdamW8bit(p, decay), p["p"].copy(), torch.tensor(p["p"])
    tables = [torch.tensor(table) for table, _ in TABLES]
    codes = [torch.zeros(shape, dtype=torch.uint8) for _ in TABLES]
    absmax = [torch.zeros(-(-theirs.numel() // 256)) for _ in TABLES]
    for t in range(1, steps + 1):
        g = (normal(t, *shape) * np.exp(normal(0, *shape, stream=1))).astype(np.float32)
        ours.update(p, {"p": g}, rate)
        weight_decay = decay if len(shape) >= 2 else 0.0
        numbers = (0.9, 0.999, 0.0, 0.0, 1e-8, t, rate)
        rest = (*tables, *absmax, weight_decay, 1.0, False)
        step_in_pytorch(theirs, torch.tensor(g), *codes, *numbers, *rest, optimizer_name="adam")
    for held, there in zip((ours.m["p"], ours.v["p"]), codes, strict=True):
        assert (held.codes != there.numpy().ravel()).mean() < 0.01
    np.testing.assert_allclose(p["p"], theirs.numpy(), atol=0.02 * rate * steps)
    assert np.median(abs(p["p"] - theirs.numpy())) < 1e-6
    assert np.median(abs(p["p"] - start)) > rate


def test_lion_walks_where_bitsandbytes_walks(bitsandbytes: Any) -> None:
    """Without decay: what the others subtract from p, its PyTorch step adds to g."""
    step = import_module("bitsandbytes.backends.default.ops")._optimizer_update_32bit
    p = {"p": normal(0, 30, 20).astype(np.float32)}
    ours, theirs, m = Lion(p), torch.tensor(p["p"]), torch.zeros(30, 20)
    for t in range(1, 31):
        g = normal(t, 30, 20).astype(np.float32)
        ours.update(p, {"p": g}, 0.01)
        step(torch.tensor(g), theirs, m, None, None, 0.0, 0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0, t, 0.01, 1.0, 4)
    np.testing.assert_allclose(p["p"], theirs.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.m["p"], m.numpy(), rtol=1e-4, atol=1e-7)


def test_the_8bit_step_of_bitsandbytes_itself_does_not_run_on_a_cpu(bitsandbytes: Any) -> None:
    """When it does, compare with it."""
    optim = import_module("bitsandbytes.optim")
    p = torch.nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.ones(64, 64)
    with pytest.raises(RuntimeError, match="GPU"):
        optim.AdamW8bit([p]).step()
