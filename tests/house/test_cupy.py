"""What CuPy does otherwise than NumPy, and what minilora must therefore not rely on; no GPU is needed to see it.

The stand-in of `support.device` has CuPy's manners. Where CuPy itself is installed, every call is held against its
signatures and dtypes too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.cupy_rules import cupy, found, signature
from support.device import BATCHES, UNTIED, on_the_device
from support.strategies import TINY, random_weights

from minilora.backend import random_generator, to_device, to_host, xp
from minilora.counting.step_count import count_step
from minilora.data.batches import Batch
from minilora.formats.known_configs import KNOWN_CONFIGS
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.method import Method, known_methods
from minilora.methods.miss import MiSS
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import head_loss
from minilora.model.names import HEAD
from minilora.ops.attention import attention, attention_backward, query_blocks
from minilora.ops.cross_entropy import IGNORE
from minilora.training.flat import flatten
from minilora.training.loop import Plan, take_step
from minilora.training.optimizers import OPTIMIZERS
from minilora.training.order import Order
from minilora.training.state import State
from minilora.training.step import loss_and_gradients, mean_loss

real = pytest.mark.skipif(cupy is None, reason="pip install -e '.[cupy]': no GPU is needed")
ALL = ("all-linear",)
METHODS: dict[str, Method] = {
    **{name: cls(rank=4) if cls is MiSS else cls() for name, cls in known_methods().items()},
    "lora with dropout": LoRA(4, dropout=0.3, target_modules=ALL),
    "lora on embedding and head": LoRA(4, target_modules=("embed_tokens", "lm_head", "q_proj")),
    "lora with whole modules": LoRA(4, target_modules=ALL, modules_to_save=("lm_head", "embed_tokens")),
    "dora with dropout": DoRA(4, dropout=0.3, target_modules=ALL),
    "pissa": LoRA(4, target_modules=ALL, init="pissa"),
}


# --- The stand-in has CuPy's manners ---


def test_on_the_device_subnormal_numbers_are_zero_in_float32_and_stay_in_float64(device: None) -> None:
    small = to_device(np.array([1e-39, -1e-39, 1.0]))
    assert to_host(small * 1.0).tolist() == [1e-39, -1e-39, 1.0]
    single = small.astype(np.float32)
    assert to_host(single).tolist() == [0, 0, 1]
    assert to_host(xp.maximum(single, 1e-38)).tolist() == [0, 0, 1]
    assert to_host(xp.exp(to_device(np.array([-90.0], np.float32)))).tolist() == [0]


def test_on_the_device_indices_beyond_the_end_count_on_from_the_start(device: None) -> None:
    numbers, index = to_device(np.arange(3.0)), to_device(np.array([3, -1, 7]))
    assert to_host(numbers[index]).tolist() == [0, 2, 1]
    assert to_host(numbers.take(index, axis=0)).tolist() == [0, 2, 1]
    xp.add.at(numbers, index, numbers[index])
    assert to_host(numbers).tolist() == [0, 2, 4]


def refused_by_the_device() -> dict[str, Callable[[], Any]]:
    a, index = to_device(np.ones((2, 2), np.float32)), to_device(np.array([1, 1]))
    return {
        "two equal indices": lambda: a.__setitem__(index, a),
        "NumPy scalar": lambda: a * np.float64(2),
        "what dtype": lambda: xp.full(2, np.float32(1)),
        "add.at has no": lambda: xp.add.at(index.astype(np.int8), index, 1),
    }


@pytest.mark.parametrize("words", ["two equal indices", "NumPy scalar", "what dtype", "add.at has no"])
def test_what_no_gpu_defines_is_refused(words: str, device: None) -> None:
    with pytest.raises(TypeError, match=words):
        refused_by_the_device()[words]()


def refused_by_cupy() -> dict[str, Callable[[], Any]]:
    a = to_device(np.ones(2, np.float32))
    bytes_ = a.astype(np.int8)
    return {
        "where": lambda: a.sum(where=a > 0),
        "no errstate": lambda: xp.errstate(over="ignore"),
        "Generator.choice": lambda: random_generator(1).choice(3),
        "NumPy's float16": lambda: xp.sqrt(bytes_),
        "mode": lambda: a.take(bytes_, axis=0, mode="clip"),
    }


@real
@pytest.mark.parametrize("words", ["where", "no errstate", "Generator.choice", "mode"])
def test_what_cupy_does_not_take_is_refused(words: str, device: None) -> None:
    with pytest.raises(TypeError, match=words):
        refused_by_cupy()[words]()


def names_asked_of(module: str) -> set[str]:
    """Every dotted name that minilora's files ask of this module."""
    names = set()
    for file in Path("minilora").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and re.fullmatch(rf"{module}(\.\w+)+", ast.unparse(node)):
                names.add(ast.unparse(node).removeprefix(f"{module}."))
    return names


@real
def test_every_name_that_is_asked_of_the_array_module_is_one_of_cupys_with_a_known_signature() -> None:
    names = {name for name in names_asked_of("xp") if not name.startswith(("tally", "outline"))}
    assert {"exp", "add.at", "linalg.svd"} <= names
    for name in names:
        assert not callable(found(name)) or name == "random" or signature(name)


# --- All of it runs there ---


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_every_method_on_a_device_computes_what_the_host_computes(name: str) -> None:
    """But for the order of sums, and for dropout, which each device draws by its own means."""

    def gradients(config: Any) -> dict[str, np.ndarray]:
        base, method = base_model(config, random_weights(config, 0)), METHODS[name]
        trainable = method.start(base, np.random.default_rng(0), np.float32)
        model = method.attach(base, trainable)
        seeds = [1, 2] if "dropout" in name else None
        loss, found = loss_and_gradients(model, BATCHES, seeds, checkpointing=True)
        OPTIMIZERS["adamw"](trainable).update(trainable, found, 1e-3)
        return {"loss": np.array(loss)} | {name: to_host(array) for name, array in found.items()}

    for config in (TINY, UNTIED):
        on_host = gradients(config)
        with on_the_device():
            on_the_device_ = gradients(config)
        assert on_the_device_.keys() == on_host.keys()
        for key, array in on_host.items():
            if "dropout" not in name:
                error = abs(on_the_device_[key] - array).max()
                assert error <= 1e-4 * max(1e-3, abs(array).max()), (key, error)


# --- The host does not wait for the device ---


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "adamw") for name in METHODS if name != "pissa"), *(("lora", rule) for rule in OPTIMIZERS)],
)
def test_a_step_waits_for_the_loss_of_each_micro_batch_and_the_norm_of_the_gradient(name: str, optimizer: str) -> None:
    """Between them the device has its work queued, whatever the method."""
    with on_the_device() as waits:
        base, method = base_model(UNTIED, random_weights(UNTIED, 0)), METHODS[name]
        rule = OPTIMIZERS[optimizer]
        flat, factors = flatten(method.start(base, np.random.default_rng(0), np.float32), rule, {})
        model = method.attach(base, flat.arrays)
        state = State(flat, rule(flat.parts, 0.1, factors), Order(2), np.random.default_rng(0))
        waits.clear()
        for checkpointing in (False, True):
            take_step(model, state, BATCHES, Plan(2, activation_checkpointing=checkpointing))
        assert waits == ([*["__float__"] * len(BATCHES), "tolist"]) * 2


def test_a_token_that_the_model_does_not_have_is_refused_where_cupy_would_take_another() -> None:
    tokens = BATCHES[0].tokens
    for wrong in (TINY.vocab_size, -1):
        batch = BATCHES[0]._replace(tokens=np.where(tokens == tokens.max(), wrong, tokens))
        with on_the_device(), pytest.raises(IndexError, match=f"do not fit a vocabulary of {TINY.vocab_size}"):
            mean_loss(base_model(TINY, random_weights(TINY, 0)), [batch])


def test_the_device_draws_by_a_generator_that_starts_at_once(device: None) -> None:
    """CuPy's own default, XORWOW, starts hundreds of thousands of states for each site and forward."""
    assert isinstance(random_generator(1, 2).numpy.bit_generator, np.random.Philox)
    same = [to_host(random_generator(1, 2).random((3,), dtype=np.float32)).tolist() for _ in range(2)]
    assert same[0] == same[1] != to_host(random_generator(2, 1).random((3,), dtype=np.float32)).tolist()


# --- Few operations: small arrays lie in buffers ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_arrays_in_buffers_move_to_the_last_bit_as_each_alone_and_their_state_keeps_its_names(optimizer: str) -> None:
    shapes = {"x.lora_A.weight": (2, 5), "x.lora_B.weight": (7, 2), "y.bias": (3,), "z.lora_B.weight": (4, 2, 3)}
    factors = {name: 4.0 for name in shapes if "lora_B" in name}
    rule = OPTIMIZERS[optimizer]

    def drawn(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        return {name: to_device(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}

    with on_the_device():
        alone = drawn(0)
        by_name = rule(alone, 0.1, factors)
        flat, factors_of_parts = flatten(drawn(0), rule, factors)
        together = rule(flat.parts, 0.1, factors_of_parts)
        for seed in (1, 2, 3):
            by_name.update(alone, drawn(seed), 0.01)
            together.update(flat.parts, flat.gathered(drawn(seed)), 0.01)
        for found, expected in ((flat.arrays, alone), (flat.state(together), by_name.state())):
            assert {name: to_host(x).tolist() for name, x in found.items()} == {
                name: to_host(x).tolist() for name, x in expected.items()
            }
        assert len(flat.parts) == (3 if rule.elementwise else 4)  # A, both B, and the bias
    assert flatten(drawn(0), rule, factors)[0].parts.keys() == shapes.keys()  # none on the CPU


def test_large_arrays_stay_out_of_the_buffers(device: None) -> None:
    """An update needs a few arrays of its size beside it, and starting it is no longer what takes the time."""
    arrays = {"large": xp.zeros((513, 512), np.float32), "a": xp.zeros((2, 2), np.float32), "b": xp.zeros((1, 2), "f4")}
    flat, _ = flatten(arrays, OPTIMIZERS["adamw"], {})
    assert flat.parts["large"] is arrays["large"] is flat.arrays["large"]
    assert sorted(part.size for part in flat.parts.values()) == [6, 513 * 512]


def test_a_step_of_lora_on_all_maps_takes_at_most_210_operations_a_layer_on_a_gpu() -> None:
    """Forward, backward and update: 63 are products of matrices. Outside the layers there are at most 80."""
    config = Config.from_dict(KNOWN_CONFIGS["SmolLM2-135M"])
    tokens = np.arange(4 * 256).reshape(4, 256)
    batch = Batch(tokens, tokens, np.broadcast_to(np.arange(256), (4, 256)), np.ones_like(tokens))

    def calls(layers: int) -> int:
        smaller = replace(config, num_hidden_layers=layers, rope_layers=(True,) * layers)
        return count_step(smaller, LoRA(8, target_modules=ALL), batch, on_cpu=False).calls

    a_layer = calls(3) - calls(2)
    assert a_layer <= 210 and calls(2) - 2 * a_layer <= 80


# --- Large blocks of attention, and of the head ---


@pytest.mark.parametrize(("labelled", "on_host", "there"), [(1, 1, 1), (256, 1, 1), (257, 2, 1), (1025, 5, 2)])
def test_the_head_takes_256_rows_at_once_and_on_a_device_1024(labelled: int, on_host: int, there: int) -> None:
    def products() -> int:
        model = base_model(TINY, random_weights(TINY, 0))
        head, seen = model.sites[HEAD], list[Any]()

        def forward(x: Any, seed: Any = None) -> Any:
            seen.append(x.shape)
            return head.forward(x, seed)

        counting = replace(model, sites={**model.sites, HEAD: SimpleNamespace(forward=forward)})
        labels = np.where(np.arange(1100) < labelled, 1, IGNORE)
        head_loss(counting, xp.ones((1100, TINY.hidden_size), np.float32), labels, None)
        return len(seen)

    assert products() == on_host
    with on_the_device():
        assert products() == there


@pytest.mark.parametrize("past", [0, 5])
def test_on_a_device_attention_has_few_blocks_and_computes_what_the_host_computes_in_many(
    past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, where the matrix of scores may be so large, else some; of packed rows and padding too."""
    rng, T, S = np.random.default_rng(0), 150, 150 + past
    q, k, v, dy = (rng.normal(size=(2, n, heads, 4)) for n, heads in ((T, 4), (S, 2), (S, 2), (T, 4)))
    positions = np.broadcast_to(np.arange(S), (2, S))
    segments = np.stack([np.ones(S, int), np.repeat([1, 2, 0], [40, S - 60, 20])])
    places = (positions[:, past:], segments[:, past:], positions, segments)

    def computed() -> tuple[int, list[np.ndarray]]:
        blocks = query_blocks(*map(to_device, places))
        y, cache = attention(*map(to_device, (q, k, v)), blocks)
        return len(blocks), [to_host(x) for x in (y, *attention_backward(to_device(dy), cache))]

    blocks_on_host, on_host = computed()
    for pairs, blocks in ((2**22, 1), (100 * 2 * S, 2), (1, 3)):
        monkeypatch.setattr("minilora.ops.attention.PAIRS_AT_ONCE_ON_GPU", pairs)
        with on_the_device() as waits:
            found = computed()
            assert waits == ["get"] * 4
        assert (found[0], blocks_on_host) == (blocks, 3)
        for there, here in zip(found[1], on_host, strict=True):
            np.testing.assert_allclose(there, here, rtol=1e-9, atol=1e-12)
