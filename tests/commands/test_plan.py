"""What is counted beforehand is what happens: bytes while a step runs, files, FLOPs, calls; no array is made.

NumPy reports each array to tracemalloc, so a step's memory can be measured to the byte, in the midst of a test.
"""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import adapters, configs, seeds
from support.wrapped_numpy import WrappedModule, wrap, wrapped_numpy

from minilora.backend import xp
from minilora.counting.step_count import StepCount, Storage, count_step
from minilora.formats.adapters import write_method
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.known_configs import GPT_3, KNOWN_CONFIGS
from minilora.formats.load import load_model
from minilora.formats.sizes import checkpoint_bytes, numbers, saved_bytes
from minilora.frozen.hold import FROZEN
from minilora.frozen.nf4 import NF4Weight
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.dora import DoRA
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.methods.whole_modules import WholeModules
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, forward, head_loss
from minilora.model.names import parameter_count
from minilora.ops.cross_entropy import IGNORE
from minilora.plan import __main__ as plan
from minilora.plan.measured_step import take_one_step
from minilora.plan.planned_run import MicroBatch as Rows
from minilora.training.optimizers import OPTIMIZERS, clip_gradients, global_norm
from minilora.training.step import loss_and_gradients

ALL = ("all-linear",)
QV = ("q_proj", "v_proj")
Q_AND_V, LAST = LoRA(4, target_modules=QV), LoRA(8, target_modules=QV, layers_to_transform=(2,))
SMOLLM = Config.from_dict(KNOWN_CONFIGS["SmolLM2-135M"])
SMALL = replace(
    SMOLLM,
    vocab_size=1000,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_layers=(True,) * 3,
)
UNTIED = replace(SMALL, tie_word_embeddings=False, num_key_value_heads=6)

methods = st.one_of(
    adapters,
    st.builds(
        lambda kind, rank, init: kind(rank, target_modules=QV, init=init),
        *(st.sampled_from([LoRA, DoRA]), st.integers(1, 2), st.sampled_from(["kaiming", "pissa"])),
    ),
    st.sampled_from(
        [
            Full(),
            LoRA(2, target_modules=("embed_tokens", "lm_head"), modules_to_save=("norm",)),
            LoRA(2, target_modules=QV, modules_to_save=("embed_tokens", "up_proj")),
            WholeModules(),
            WholeModules(("embed_tokens",)),
            BitFit(),
            BitFit(train_norms=True),
            Bottleneck(3),
            RandomSubset(0.1),
            PrefixTuning(3),
            PromptTuning(3),
        ]
    ),
)


def a_batch(config: Config, work: Rows) -> Any:
    return work.draw(config, np.random.default_rng(0))


def counted_step(
    config: Config, method: Method, work: Rows, storage: Storage | None = None, **options: Any
) -> StepCount:
    return count_step(config, method, a_batch(config, work), storage or Storage(), **options)


def prepared(config: Config, method: Method, storage: Storage) -> tuple[Model, dict[str, np.ndarray]]:
    dtype = np.dtype(storage.dtype)
    base = base_model(config, random_weights(config, 0, storage.file), dtype, storage.frozen, storage.mixed_precision)
    trainable = method.start(base, np.random.default_rng(0), dtype)
    return method.attach(base, trainable), trainable


# --- What trains, and the files ---


@given(config=configs(max_layers=3), method=methods, seed=seeds)
def test_what_a_method_trains_is_known_before_it_starts(config: Config, method: Method, seed: int) -> None:
    base = base_model(config, random_weights(config, seed))
    trainable = method.start(base, np.random.default_rng(seed))
    shapes = method.shapes(base.config if not isinstance(method, BitFit) else config)
    assert shapes == {name: p.shape for name, p in trainable.items()}


@settings(max_examples=25)
@given(config=configs(), method=methods, dtype=st.sampled_from(["float32", "float64"]))
def test_the_count_of_an_adapters_file_is_its_length(
    tmp_path_factory: pytest.TempPathFactory, config: Config, method: Method, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    base = base_model(config, random_weights(config, 0), np.dtype(dtype))
    tensors = method.start(base, np.random.default_rng(0), dtype)
    expected = saved_bytes(method, config, dtype)
    if isinstance(method, Full):
        return
    if isinstance(method, LoRA):
        method, tensors = method.saved_form(method.attach(base, tensors), tensors)
    write_method(folder, method, tensors, config, "base")
    assert (folder / "adapter_model.safetensors").stat().st_size == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_count_of_a_checkpoint_is_its_length(tmp_path: Path, dtype: str) -> None:
    raw = KNOWN_CONFIGS["SmolLM2-135M"] | {"hidden_size": 36, "num_hidden_layers": 12, "vocab_size": 101}
    config = Config.from_dict(raw)
    write_checkpoint(tmp_path, raw, random_weights(config, 0), dtype)
    length = (tmp_path / "model.safetensors").stat().st_size
    assert length == checkpoint_bytes(config, dtype)
    assert length == saved_bytes(Full(), config, dtype)


# --- Memory ---


class Seen(NamedTuple):
    backward: int  # the most that loss and gradients add
    step: int  # the most that the whole step adds


def seen_in_a_step(
    config: Config, method: Method, work: Rows, storage: Storage, optimizer: str, checkpointing: bool, k: int
) -> Seen:
    """Bytes, by tracemalloc."""
    model, trainable = prepared(config, method, storage)
    state = OPTIMIZERS[optimizer](trainable)
    batches = [a_batch(config, work) for _ in range(k)]
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        loss_and_gradients(model, batches, range(k), checkpointing)
        _, backward = tracemalloc.get_traced_memory()
        take_one_step(model, trainable, state, batches, checkpointing)
        _, step = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Seen(backward - before, step - before)


def check_memory(
    config: Config,
    method: Method,
    work: Rows,
    storage: Storage = Storage(),  # noqa: B008
    optimizer: str = "adamw",
    checkpointing: bool = False,
    k: int = 1,
    within: float = 0.1,
) -> StepCount:
    """Weights and optimiser are left out: they are known exactly, and would flatter the rest."""
    counted = counted_step(
        config, method, work, storage, optimizer=optimizer, checkpointing=checkpointing, micro_batches=k
    )
    seen = seen_in_a_step(config, method, work, storage, optimizer, checkpointing, k)
    forwards_and_backwards = max(count for moment, count in counted.moments.items() if moment != "the update")
    assert forwards_and_backwards == pytest.approx(seen.backward, rel=within)
    assert counted.moments[counted.fullest] == pytest.approx(seen.step, rel=within)
    return counted


CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {  # → the moment that decides, and the job
    "q and v": ("a layer's backward", (SMALL, LoRA(4, target_modules=QV), Rows(4, 64, 252)), {}),
    "q and v, a large vocabulary": ("the loss", (replace(SMALL, vocab_size=4000), Q_AND_V, Rows(4, 64, 252)), {}),
    "q and v, half of it labelled": ("a layer's backward", (SMALL, LoRA(4, target_modules=QV), Rows(4, 64, 100)), {}),
    "all-linear": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL), Rows(4, 64, 252)), {}),
    "all-linear, long rows": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL), Rows(2, 256, 200)), {}),
    "all-linear, 1,024 tokens": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL), Rows(1, 1024, 200)), {}),
    "all-linear, one short row": ("a layer's backward", (UNTIED, LoRA(8, target_modules=ALL), Rows(1, 40, 20)), {}),
    "all-linear, rank 64": ("a layer's backward", (SMALL, LoRA(64, target_modules=ALL), Rows(4, 64, 60)), {}),
    "all-linear, dropout": ("a layer's backward", (SMALL, LoRA(8, 16, 0.1, target_modules=ALL), Rows(4, 64, 60)), {}),
    "all-linear, float64": (
        "a layer's backward", (SMALL, LoRA(target_modules=ALL), Rows(4, 64, 252), Storage("float64")), {},
    ),
    "no shared keys": ("a layer's backward", (UNTIED, LoRA(8, target_modules=ALL), Rows(4, 64, 60)), {}),
    "the last layer only": (
        "the loss", (replace(SMALL, vocab_size=4000), LAST, Rows(4, 64, 252)), {},
    ),
    "DoRA": ("a layer's backward", (SMALL, DoRA(8, target_modules=ALL), Rows(4, 64, 60)), {}),
    "PiSSA": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL, init="pissa"), Rows(4, 64, 60)), {}),
    "checkpointing": (
        "a layer's backward", (SMALL, LoRA(target_modules=ALL), Rows(4, 64, 252)), {"checkpointing": True},
    ),
    "checkpointing, q and v, long rows": (
        "a layer's backward", (SMALL, LoRA(target_modules=QV), Rows(2, 200, 398)), {"checkpointing": True},
    ),
    "two micro-batches": ("a layer's backward", (SMALL, LoRA(target_modules=QV), Rows(2, 64, 60)), {"k": 2}),
    "stored": (
        "the loss",
        (replace(SMALL, vocab_size=8000), LoRA(target_modules=ALL), Rows(2, 32, 62), Storage("float32", "stored")),
        {},
    ),
    "bf16, a large vocabulary": (
        "the loss",
        (replace(SMALL, vocab_size=8000), LoRA(target_modules=ALL), Rows(2, 32, 62), Storage(mixed_precision="bf16")),
        {},
    ),
    "fp16": (
        "a layer's backward",
        (SMALL, LoRA(8, target_modules=ALL), Rows(4, 64, 100), Storage(mixed_precision="fp16")),
        {},
    ),
    "nf4 and bf16": (
        "a layer's backward",
        (
            replace(SMALL, hidden_size=480, vocab_size=50), LoRA(target_modules=QV), Rows(1, 32, 31),
            Storage(frozen="nf4", mixed_precision="bf16"),
        ),
        {},
    ),
    "a random subset in nf4": (
        "a layer's backward",
        (replace(SMALL, hidden_size=480, vocab_size=50), RandomSubset(0.05), Rows(1, 32, 31), Storage(frozen="nf4")),
        {},
    ),
    "nf4, one short row": (
        "a layer's backward",
        (replace(SMALL, hidden_size=480, vocab_size=50), Q_AND_V, Rows(1, 32, 31), Storage("float32", "nf4")),
        {},
    ),
    "full": ("a layer's backward", (SMALL, Full(), Rows(4, 64, 252)), {}),
    "full, untied": ("a layer's backward", (UNTIED, Full(), Rows(4, 64, 252)), {}),
    "full, a large vocabulary": (
        "the update", (replace(SMALL, vocab_size=6000), Full(), Rows(1, 16, 15)), {},
    ),
    "full, chunks of the loss": (
        "a layer's backward",
        (replace(SMALL, vocab_size=3000, num_hidden_layers=1, rope_layers=(True,)), Full(), Rows(80, 32, 2080)),
        {},
    ),
    "full, SGD": (
        "the embedding's gradient", (replace(SMALL, vocab_size=6000), Full(), Rows(1, 16, 15)), {"optimizer": "sgd"},
    ),
    "the head alone": ("the loss", (replace(SMALL, vocab_size=2000), WholeModules(), Rows(4, 64, 252)), {}),
    "the head alone, a few labels": ("a frozen layer's forward", (SMALL, WholeModules(), Rows(4, 64, 20)), {}),
    "the embedding alone": ("a layer's backward", (SMALL, WholeModules(("embed_tokens",)), Rows(4, 64, 60)), {}),
    "BitFit": ("a layer's backward", (SMALL, BitFit(), Rows(4, 64, 252)), {}),
    "bottleneck": ("a layer's backward", (SMALL, Bottleneck(16), Rows(4, 64, 100)), {}),
    "a random subset": ("a layer's backward", (SMALL, RandomSubset(0.05), Rows(4, 64, 100)), {}),
    "prefix": ("a layer's backward", (SMALL, PrefixTuning(20), Rows(4, 64, 100)), {}),
    "prompt": ("a layer's backward", (SMALL, PromptTuning(20), Rows(4, 64, 100)), {}),
    "the update of a wide embedding": (
        "the update",
        (replace(SMALL, vocab_size=9000), LoRA(64, target_modules=("embed_tokens",)), Rows(1, 4, 3)),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_the_memory_that_was_counted_and_at_that_moment(name: str) -> None:
    moment, arguments, options = CASES[name]
    assert check_memory(*arguments, **options, within=0.05).fullest == moment


@pytest.mark.parametrize("name", [name for name, (_, _, options) in CASES.items() if "k" not in options])
def test_the_forward_keeps_what_was_counted(name: str) -> None:
    """Beside the hidden states themselves."""
    config, method, work, *storage = CASES[name][1]
    checkpointing = CASES[name][2].get("checkpointing", False)
    model, _ = prepared(config, method, *(storage or [Storage()]))
    batch = a_batch(config, work)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        hidden, past, cache = forward(
            model, batch.tokens, batch.positions, batch.segments, seed=0, checkpointing=checkpointing
        )
        del past
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = counted_step(config, method, work, *storage, checkpointing=checkpointing).activations
    assert cache is not None
    assert counted == pytest.approx(after - before - hidden.nbytes, rel=0.01, abs=30_000)


@pytest.mark.parametrize("labelled", [500, 1500, 2100])
@pytest.mark.parametrize(
    ("method", "frozen"),
    [
        (Full(), "widened"),
        (WholeModules(), "widened"),
        (LoRA(target_modules=QV), "widened"),
        (LoRA(target_modules=QV), "stored"),
        (LoRA(4, target_modules=("lm_head",)), "widened"),
    ],
    ids=["full", "head", "frozen", "stored", "lora"],
)
def test_the_loss_takes_what_was_counted_however_many_chunks(method: Method, frozen: str, labelled: int) -> None:
    config = replace(SMALL, hidden_size=240, vocab_size=1500, num_hidden_layers=1, rope_layers=(True,))
    storage = Storage("float32", frozen)
    model, _ = prepared(config, method, storage)
    hidden, labels = np.ones((2100, 240), np.float32), np.arange(2100) % 1500
    labels[labelled:] = IGNORE
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        head_loss(model, hidden, labels, 1.0)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = counted_step(config, method, Rows(1, 2100, labelled), storage).loss_chunk
    assert counted == pytest.approx(most - before - hidden.nbytes, rel=0.03)  # without dhidden


@settings(max_examples=12)
@given(
    heads=st.sampled_from([(4, 1), (4, 2), (4, 4)]),
    width=st.sampled_from([64, 96, 160]),
    wider=st.sampled_from([2, 3]),
    layers=st.integers(1, 4),
    vocabulary=st.sampled_from([300, 2000]),
    rows=st.integers(2, 6),
    length=st.integers(32, 128),
    labelled=st.integers(1, 30),
    rank=st.sampled_from([1, 8, 32]),
    targets=st.sampled_from([("q_proj", "v_proj"), ALL, ("gate_proj", "down_proj"), ("o_proj",)]),
    dropout=st.sampled_from([0.0, 0.1]),
    frozen=st.sampled_from(["widened", "stored"]),
    checkpointing=st.booleans(),
)
def test_whatever_the_shape_the_count_is_within_a_tenth(
    heads: tuple[int, int], width: int, wider: int, layers: int, vocabulary: int, rows: int, length: int, labelled: int,
    rank: int, targets: tuple[str, ...], dropout: float, frozen: str, checkpointing: bool,
) -> None:  # fmt: skip
    H, K = heads
    config = replace(
        SMALL, num_attention_heads=H, num_key_value_heads=K, head_dim=width // H, hidden_size=width,
        intermediate_size=wider * width, num_hidden_layers=layers, rope_layers=(True,) * layers, vocab_size=vocabulary,
    )  # fmt: skip
    method = LoRA(rank, dropout=dropout, target_modules=targets)
    storage = Storage("float32", frozen)
    check_memory(config, method, Rows(rows, length, labelled * rows), storage, checkpointing=checkpointing)


@pytest.mark.parametrize("frozen", [way for way in FROZEN if way != "mapped"])
@pytest.mark.parametrize("file", ["bfloat16", "float32"])
@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_weights_are_held_in_so_many_bytes(frozen: str, file: str, config: Config) -> None:
    model = base_model(config, random_weights(config, 0, file), np.float32, frozen)
    owners = [array if array.base is None else array.base for site in model.sites.values() for array in held_by(site)]
    arrays = {id(array): array for array in owners}  # NF4's codes are the beginnings of whole blocks
    counted = counted_step(config, LoRA(target_modules=QV), Rows(1, 2, 1), Storage("float32", frozen, file)).weights
    assert counted == pytest.approx(sum(array.nbytes for array in arrays.values()), rel=1e-3)


@pytest.mark.parametrize("file", ["bfloat16", "float32"])
def test_a_step_on_a_mapped_base_takes_what_was_counted_and_the_matrices_nothing(tmp_path: Path, file: str) -> None:
    """In bfloat16 the gains are widened; in float32 all that is in the file stays there."""
    raw = KNOWN_CONFIGS["SmolLM2-135M"] | {
        "vocab_size": 8000, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 256,
    }  # fmt: skip
    config, method, work = Config.from_dict(raw), LoRA(8, target_modules=ALL), Rows(2, 64, 100)
    write_checkpoint(tmp_path, raw, random_weights(config, 0, file), file)
    gc.collect()
    tracemalloc.start()
    try:
        base, _ = load_model(tmp_path, frozen="mapped")
        trainable = method.start(base, np.random.default_rng(0))
        state = OPTIMIZERS["adamw"](trainable)
        model = method.attach(base, trainable)
        take_one_step(model, trainable, state, [a_batch(config, work)], checkpointing=True)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = counted_step(config, method, work, Storage("float32", "mapped", file), checkpointing=True)
    assert counted.weights == (4 * 96 * (2 * 3 + 1) if file == "bfloat16" else 0)
    assert counted.total == pytest.approx(most, rel=0.05, abs=200_000)


@pytest.mark.parametrize(
    "method", [LoRA(32, target_modules=ALL, init="pissa"), RandomSubset(0.1)], ids=["PiSSA", "random subset"]
)
def test_what_a_method_freezes_beside_the_weights_is_counted(method: Method) -> None:
    base = base_model(SMALL, random_weights(SMALL, 0))
    work, storage = Rows(1, 2, 1), Storage(file="float32")
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        trainable = method.start(base, np.random.default_rng(0))
        model = method.attach(base, trainable)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = counted_step(SMALL, method, work, storage)
    frozen = counted.weights - counted_step(SMALL, LoRA(target_modules=QV), work, storage).weights
    assert frozen + counted.trainable == pytest.approx(after - before, rel=0.1)
    assert model.sites


def held_by(site: Any) -> Iterator[np.ndarray]:
    """The arrays of a frozen site, those shared by all NF4 weights apart."""
    if hasattr(site, "gain"):
        yield site.gain
    elif isinstance(site.weight, NF4Weight):
        yield from (site.weight.codes, site.weight.absmax_codes, site.weight.scales)
    else:
        yield site.weight.W


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimisers_state_is_counted(name: str) -> None:
    _, trainable = prepared(SMALL, LoRA(4, target_modules=QV), Storage())
    state = OPTIMIZERS[name](trainable).state()
    counted = counted_step(SMALL, LoRA(4, target_modules=QV), Rows(1, 2, 1), optimizer=name)
    assert counted.optimizer == sum(array.nbytes for array in state.values())


# --- FLOPs and calls ---


COUNTED: dict[str, Method] = {
    "q and v": LoRA(2, target_modules=QV),
    "all-linear": LoRA(3, target_modules=ALL),
    "dropout": LoRA(2, dropout=0.5, target_modules=QV),
    "the last layer": LoRA(2, target_modules=QV, layers_to_transform=(2,)),
    "embedding and head": LoRA(2, target_modules=("q_proj", "embed_tokens", "lm_head")),
    "whole modules beside": LoRA(2, target_modules=QV, modules_to_save=("lm_head", "mlp.up_proj")),
    "DoRA": DoRA(2, target_modules=QV),
    "DoRA, dropout": DoRA(2, dropout=0.5, target_modules=QV),
    "PiSSA": LoRA(2, target_modules=QV, init="pissa"),
    "full": Full(),
    "the head alone": WholeModules(),
    "the embedding alone": WholeModules(("embed_tokens",)),
    "BitFit": BitFit(),
    "bottleneck": Bottleneck(3),
    "a random subset": RandomSubset(0.1),
    "prefix": PrefixTuning(5),
    "prompt": PromptTuning(5),
}


def wrapped_step(module: WrappedModule, config: Config, method: Method, work: Rows, checkpointing: bool) -> None:
    """A step as `take_one_step` takes it, with gradients that are clipped, on arrays that the module sees."""
    base = base_model(config, {name: wrap(module, w) for name, w in random_weights(config, 0).items()})
    trainable = method.start(base, wrap(module, np.random.default_rng(0)))
    model = method.attach(base, {name: xp.asarray(p) for name, p in trainable.items()})
    state = OPTIMIZERS["adamw"](trainable)
    module.flops = module.calls = 0
    _, gradients = loss_and_gradients(model, [a_batch(config, work)], [0], checkpointing)
    norm = global_norm(gradients)
    clip_gradients(gradients, norm, norm / 2)
    state.update(trainable, gradients, 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_step_makes_the_products_and_the_calls_that_were_counted(name: str, checkpointing: bool) -> None:
    check_products_and_calls(COUNTED[name], Rows(3, 10, 20), checkpointing)


@pytest.mark.parametrize("work", [Rows(2, 65, 100), Rows(1, 1024, 700)], ids=["two blocks of queries", "sixteen"])
def test_a_step_on_long_rows_makes_the_products_and_the_calls_that_were_counted(work: Rows) -> None:
    check_products_and_calls(LoRA(3, target_modules=ALL), work, checkpointing=False)


def check_products_and_calls(method: Method, work: Rows, checkpointing: bool) -> None:
    config = replace(SMALL, hidden_size=24, head_dim=4, intermediate_size=40, vocab_size=50)
    with wrapped_numpy() as module:
        wrapped_step(module, config, method, work, checkpointing)
    counted = counted_step(config, method, work, checkpointing=checkpointing)
    assert counted.forward.total + counted.backward.total == module.flops
    assert counted.calls == module.calls


def test_flops_with_a_pencil() -> None:
    """Two tokens of SmolLM2-135M, one label: two FLOPs a weight forwards and two backwards, six when all trains."""
    matrices = sum(2 * 576 * out + 2 * 576 * 192 + 3 * 576 * 1536 for out in [576] * 30)
    lora = counted_step(SMOLLM, LoRA(target_modules=QV), Rows(1, 2, 1))
    forward, backward = lora.forward, lora.backward
    assert (forward.weights, backward.weights) == (2 * 2 * matrices, 2 * 2 * matrices)
    assert (forward.head, backward.head) == (2 * 49152 * 576, 2 * 49152 * 576)
    assert forward.trained == 2 * 2 * 8 * (2 * 576 + 576 + 192) * 30 and backward.trained == 2 * forward.trained
    pairs = 2 * 2 * 9 * 64 * 30  # of two queries and two keys in nine heads of 64
    assert (forward.attention, backward.attention) == (2 * 2 * pairs, 5 * 2 * pairs)
    full = counted_step(SMOLLM, Full(), Rows(1, 2, 1)).backward
    assert full.weights + full.trained + full.head == 4 * (2 * matrices + 49152 * 576)


# --- The claims at GPT-3's size ---


def test_at_gpt_3s_size_the_papers_figures_come_out() -> None:
    """Hu et al., section 4.2: with r = 4 on q and v the checkpoint shrinks 10,000 times, from 350 GB to 35 MB, and
    memory 3 times, from 1.2 TB to 350 GB, for the optimiser's states are gone. Table 4: 4.7M and 37.7M parameters."""
    config = Config.from_dict(GPT_3)
    assert parameter_count(config) == pytest.approx(175e9, rel=0.005)
    trained = {r: numbers(LoRA(r, target_modules=QV).shapes(config)) for r in (1, 4, 8)}
    assert (round(trained[1] / 1e6, 1), round(trained[8] / 1e6, 1)) == (4.7, 37.7)
    assert trained[4] == 96 * 2 * 2 * 12288 * 4
    assert checkpoint_bytes(config, "float16") == pytest.approx(350e9, rel=0.005)
    assert saved_bytes(LoRA(4, target_modules=QV), config, "float16") / 2**20 == pytest.approx(35, rel=0.05)
    assert (
        9_000
        < checkpoint_bytes(config, "float16") / saved_bytes(LoRA(4, target_modules=QV), config, "float16")
        < 10_000
    )
    weights = 2 * parameter_count(config)
    assert (weights + 2 * weights) / (weights + 3 * 2 * trained[4]) == pytest.approx(3, rel=0.01)  # m, v in 16 bits too


def test_counting_for_gpt_3_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        with redirect_stdout(io.StringIO()):
            assert plan.main(["--model", "GPT-3", "--rank", "64"]) == 0
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


# --- The command ---


def run(*argv: str) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = plan.main(list(argv))
    return status, out.getvalue(), err.getvalue()


def run_alone(*argv: str, **environment: str) -> str:
    """In a process of its own: the system adds a parent's peak to its children's, and the tests' is large."""
    command = [sys.executable, "-m", "minilora.plan", *argv]
    root, env = Path(__file__).parents[2], os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=env).stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = KNOWN_CONFIGS["SmolLM2-135M"] | {"hidden_size": 36, "num_hidden_layers": 2, "vocab_size": 5000}
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, raw, random_weights(Config.from_dict(raw), 0), "bfloat16")
    return folder


MEASURED = ("--batch-size", "8", "--grad-accumulation", "1", "--max-length", "128", "--measure", "--json")


def test_a_step_in_a_process_of_its_own_takes_what_the_command_says(tiny: Path) -> None:
    found = json.loads(run_alone("--model", str(tiny), *MEASURED, OPENBLAS_NUM_THREADS="1"))
    memory, measured = found["this"]["memory"], found["measured"]
    assert memory["total"] == pytest.approx(measured["peak"], rel=0.1)
    assert memory["total"] + measured["imported"] == pytest.approx(measured["resident"], rel=0.1)
    assert memory["between_steps"] < memory["total"] and measured["between_steps"] < measured["peak"]


def test_side_by_side_on_the_cores_a_step_takes_at_most_what_the_command_says(tiny: Path) -> None:
    """At most: the peaks of the parts coincide only if the system runs all of them all the time."""
    found = json.loads(run_alone("--model", str(tiny), *MEASURED))
    memory, measured = found["this"]["memory"], found["measured"]
    assert measured["peak"] < 1.1 * memory["total"]
    assert measured["resident"] < 1.1 * (memory["total"] + measured["imported"])


def test_flags_of_train_mean_here_what_they_mean_there(tiny: Path) -> None:
    def memory(*flags: str) -> dict[str, Any]:
        status, out, err = run("--model", str(tiny), "--max-length", "64", "--json", *flags)
        assert status == 0, err
        found: dict[str, Any] = json.loads(out)
        return found["this"] | {"work": found["work"]}

    usual = memory("--batch-size", "4", "--grad-accumulation", "1")
    assert usual["work"] == {"rows": 4, "length": 64, "labelled": 4 * 63}
    assert memory("--per_device_train_batch_size", "4", "--grad-accumulation", "1") == usual
    assert memory("--batch-size", "4", "--labelled", "0.25")["work"]["labelled"] == 63
    assert memory("--lora_r", "16")["trainable_parameters"] == 2 * usual["trainable_parameters"]
    assert memory("--optim", "sgd")["memory"]["optimizer"] == 0
    assert memory("--frozen", "stored")["memory"]["weights"] < 0.6 * usual["memory"]["weights"]
    less = memory("--batch-size", "4", "--activation-checkpointing")["memory"]["activations"]
    assert less < usual["memory"]["activations"] / 2
    twice = memory("--batch-size", "4", "--grad-accumulation", "2")
    assert twice["flops"]["total"] == 2 * usual["flops"]["total"]
    assert memory("--method", "full")["saved_file"] > usual["saved_file"]


def counted_calls(method: Method) -> int:
    return counted_step(SMOLLM, method, Rows(4, 256, 4 * 255)).calls


def test_the_table_shows_the_deciding_moment_and_full_fine_tuning_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.training.parts.cores", lambda: 1)
    status, out, _ = run(
        "--model", "SmolLM2-135M", "--batch-size", "4", "--grad-accumulation", "1", "--max-length", "256"
    )
    assert status == 0
    lines = {line[:37].strip(): line[37:].split() for line in out.splitlines()}
    assert lines["parameters that train"] == ["2,442,240", "134,515,008", "1.816%"]
    assert lines["frozen weights"][:2] == ["538.06", "MB"]
    assert "→" in lines["at the loss"]
    assert lines["calls"] == [f"{counted_calls(method):,}" for method in (LoRA(), Full())]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "GPT-5"), "known shape"),
        (("--labelled", "0"), "--labelled 0"),
        (("--labelled", "2"), "--labelled 2"),
        (("--max-length", "1"), "--max-length 1"),
        (("--target-modules", "nothing"), "nothing"),
        (("--method", "prefix", "--num-virtual-tokens", "0"), "--num-virtual-tokens 0"),
        (("--model", "GPT-3", "--measure"), "--measure"),
    ],
)
def test_a_mistake_is_told_in_a_line(flags: tuple[str, ...], message: str) -> None:
    status, out, err = run(*flags)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
