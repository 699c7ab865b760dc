"""What is counted beforehand is what happens: bytes while a step runs, bytes of files, FLOPs; nothing is allocated.

NumPy reports each array to tracemalloc, so a step's memory can be measured to the byte, in the midst of a test.
"""

from __future__ import annotations

import gc
import io
import json
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

from minilora.backend import use_module
from minilora.counting.activations import Work, lowest_trained_layer
from minilora.counting.flops import step_flops
from minilora.counting.footprint import STATE, Footprint, Storage, footprint
from minilora.formats.adapters import write_method
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.known_configs import GPT_3, KNOWN_CONFIGS
from minilora.formats.sizes import checkpoint_bytes, numbers, saved_bytes, trainable_shapes
from minilora.frozen.nf4 import NF4Weight
from minilora.frozen.weight import DenseWeight
from minilora.methods import Method
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.methods.whole_modules import Modules
from minilora.model.base import FROZEN, base_model
from minilora.model.config import Config
from minilora.model.model import Model, forward, head_loss
from minilora.model.names import parameter_count
from minilora.ops.cross_entropy import IGNORE
from minilora.plan import __main__ as plan
from minilora.plan.measured_step import random_batch, take_step
from minilora.training.optimizers import OPTIMIZERS
from minilora.training.step import loss_and_gradients

ALL = ("all-linear",)
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
    st.builds(LoRA, rank=st.integers(1, 2), dora=st.booleans(), init=st.sampled_from(["kaiming", "pissa"])),
    st.sampled_from(
        [
            Full(),
            LoRA(2, target_modules=("embed_tokens", "lm_head"), modules_to_save=("norm",)),
            LoRA(2, modules_to_save=("embed_tokens", "up_proj")),
            Modules(),
            Modules(("embed_tokens",)),
            BitFit(),
            BitFit(norms=True),
            Bottleneck(3),
            RandomSubset(0.1),
            PrefixTuning(3),
            PromptTuning(3),
        ]
    ),
)


def a_batch(config: Config, work: Work) -> Any:
    return random_batch(config, work, np.random.default_rng(0))


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
    shapes = trainable_shapes(method, base.config if not isinstance(method, BitFit) else config)
    assert shapes == {name: p.shape for name, p in trainable.items()}
    assert lowest_trained_layer(config, shapes) == method.attach(base, trainable).lowest_trained_layer


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
    config: Config, method: Method, work: Work, storage: Storage, optimizer: str, checkpointing: bool, k: int
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
        take_step(model, trainable, state, batches, checkpointing, on_all_cores=False)
        _, step = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Seen(backward - before, step - before)


def check_memory(
    config: Config,
    method: Method,
    work: Work,
    storage: Storage = Storage(),  # noqa: B008
    optimizer: str = "adamw",
    checkpointing: bool = False,
    k: int = 1,
    within: float = 0.1,
) -> Footprint:
    """Weights and optimiser are left out: they are known exactly, and would flatter the rest."""
    counted = footprint(config, method, work, storage, optimizer, checkpointing, k)
    seen = seen_in_a_step(config, method, work, storage, optimizer, checkpointing, k)
    forwards_and_backwards = max(count for moment, count in counted.moments.items() if moment != "the update")
    assert forwards_and_backwards == pytest.approx(seen.backward, rel=within)
    assert counted.moments[counted.fullest] == pytest.approx(seen.step, rel=within)
    return counted


CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {  # → the moment that decides, and the job
    "q and v": ("a layer's backward", (SMALL, LoRA(4), Work(4, 64, 252)), {}),
    "q and v, a large vocabulary": ("the loss", (replace(SMALL, vocab_size=4000), LoRA(4), Work(4, 64, 252)), {}),
    "q and v, half of it labelled": ("a layer's backward", (SMALL, LoRA(4), Work(4, 64, 100)), {}),
    "all-linear": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL), Work(4, 64, 252)), {}),
    "all-linear, long rows": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL), Work(2, 256, 200)), {}),
    "all-linear, one short row": ("a layer's backward", (UNTIED, LoRA(8, target_modules=ALL), Work(1, 40, 20)), {}),
    "all-linear, rank 64": ("a layer's backward", (SMALL, LoRA(64, target_modules=ALL), Work(4, 64, 60)), {}),
    "all-linear, dropout": ("a layer's backward", (SMALL, LoRA(8, 16, 0.1, ALL), Work(4, 64, 60)), {}),
    "all-linear, float64": (
        "a layer's backward", (SMALL, LoRA(target_modules=ALL), Work(4, 64, 252), Storage("float64")), {},
    ),
    "no shared keys": ("a layer's backward", (UNTIED, LoRA(8, target_modules=ALL), Work(4, 64, 60)), {}),
    "the last layer only": (
        "the loss", (replace(SMALL, vocab_size=4000), LoRA(8, layers_to_transform=(2,)), Work(4, 64, 252)), {},
    ),
    "DoRA": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL, dora=True), Work(4, 64, 60)), {}),
    "PiSSA": ("a layer's backward", (SMALL, LoRA(8, target_modules=ALL, init="pissa"), Work(4, 64, 60)), {}),
    "checkpointing": (
        "a layer's backward", (SMALL, LoRA(target_modules=ALL), Work(4, 64, 252)), {"checkpointing": True},
    ),
    "checkpointing, q and v, long rows": (
        "a layer's backward", (SMALL, LoRA(), Work(2, 200, 398)), {"checkpointing": True},
    ),
    "two micro-batches": ("a layer's backward", (SMALL, LoRA(), Work(2, 64, 60)), {"k": 2}),
    "stored": (
        "the loss",
        (replace(SMALL, vocab_size=8000), LoRA(target_modules=ALL), Work(2, 32, 62), Storage("float32", "stored")),
        {},
    ),
    "bf16, a large vocabulary": (
        "the loss",
        (replace(SMALL, vocab_size=8000), LoRA(target_modules=ALL), Work(2, 32, 62), Storage(mixed_precision="bf16")),
        {},
    ),
    "fp16": (
        "a layer's backward",
        (SMALL, LoRA(8, target_modules=ALL), Work(4, 64, 100), Storage(mixed_precision="fp16")),
        {},
    ),
    "nf4 and bf16": (
        "a layer's backward",
        (
            replace(SMALL, hidden_size=480, vocab_size=50), LoRA(), Work(1, 32, 31),
            Storage(frozen="nf4", mixed_precision="bf16"),
        ),
        {},
    ),
    "a random subset in nf4": (
        "a layer's backward",
        (replace(SMALL, hidden_size=480, vocab_size=50), RandomSubset(0.05), Work(1, 32, 31), Storage(frozen="nf4")),
        {},
    ),
    "nf4, one short row": (
        "a layer's backward",
        (replace(SMALL, hidden_size=480, vocab_size=50), LoRA(), Work(1, 32, 31), Storage("float32", "nf4")),
        {},
    ),
    "full": ("a layer's backward", (SMALL, Full(), Work(4, 64, 252)), {}),
    "full, untied": ("a layer's backward", (UNTIED, Full(), Work(4, 64, 252)), {}),
    "full, a large vocabulary": (
        "the update", (replace(SMALL, vocab_size=6000), Full(), Work(1, 16, 15)), {},
    ),
    "full, chunks of the loss": (
        "a layer's backward",
        (replace(SMALL, vocab_size=3000, num_hidden_layers=1, rope_layers=(True,)), Full(), Work(80, 32, 2080)),
        {},
    ),
    "full, SGD": (
        "the embedding's gradient", (replace(SMALL, vocab_size=6000), Full(), Work(1, 16, 15)), {"optimizer": "sgd"},
    ),
    "the head alone": ("the loss", (replace(SMALL, vocab_size=2000), Modules(), Work(4, 64, 252)), {}),
    "the head alone, a few labels": ("a frozen layer's forward", (SMALL, Modules(), Work(4, 64, 20)), {}),
    "the embedding alone": ("a layer's backward", (SMALL, Modules(("embed_tokens",)), Work(4, 64, 60)), {}),
    "BitFit": ("a layer's backward", (SMALL, BitFit(), Work(4, 64, 252)), {}),
    "bottleneck": ("a layer's backward", (SMALL, Bottleneck(16), Work(4, 64, 100)), {}),
    "a random subset": ("a layer's backward", (SMALL, RandomSubset(0.05), Work(4, 64, 100)), {}),
    "prefix": ("a layer's backward", (SMALL, PrefixTuning(20), Work(4, 64, 100)), {}),
    "prompt": ("a layer's backward", (SMALL, PromptTuning(20), Work(4, 64, 100)), {}),
    "the update of a wide embedding": (
        "the update",
        (replace(SMALL, vocab_size=9000), LoRA(64, target_modules=("embed_tokens",)), Work(1, 4, 3)),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_the_memory_that_was_counted_and_at_that_moment(name: str) -> None:
    moment, arguments, options = CASES[name]
    assert check_memory(*arguments, **options, within=0.05).fullest == moment


@pytest.mark.parametrize("name", [name for name, (_, _, options) in CASES.items() if "k" not in options])
def test_the_forward_keeps_what_was_counted(name: str) -> None:
    """And the hidden states, where tokens stand, and who sees whom."""
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
    counted = footprint(config, method, work, *(storage or [Storage()]), checkpointing=checkpointing).activations
    cos, sin, blocks = cache.context
    others = hidden.nbytes + cos.nbytes + sin.nbytes + sum(block.visible.nbytes for block in blocks)
    assert counted == pytest.approx(after - before - others, rel=0.01, abs=30_000)


@pytest.mark.parametrize("labelled", [500, 1500, 2100])
@pytest.mark.parametrize(
    ("method", "frozen"),
    [
        (Full(), "widened"),
        (Modules(), "widened"),
        (LoRA(), "widened"),
        (LoRA(), "stored"),
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
    counted = footprint(config, method, Work(1, 2100, labelled), storage).loss_chunk
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
    check_memory(config, method, Work(rows, length, labelled * rows), storage, checkpointing=checkpointing)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("file", ["bfloat16", "float32"])
@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_weights_are_held_in_so_many_bytes(frozen: str, file: str, config: Config) -> None:
    model = base_model(config, random_weights(config, 0, file), np.float32, frozen)
    arrays = {id(array): array for site in model.sites.values() for array in held_by(site)}
    counted = footprint(config, LoRA(), Work(1, 2, 1), Storage("float32", frozen, file)).weights
    assert counted == pytest.approx(sum(array.nbytes for array in arrays.values()), rel=1e-3)


@pytest.mark.parametrize(
    "method", [LoRA(32, target_modules=ALL, init="pissa"), RandomSubset(0.1)], ids=["PiSSA", "random subset"]
)
def test_what_a_method_freezes_beside_the_weights_is_counted(method: Method) -> None:
    base = base_model(SMALL, random_weights(SMALL, 0))
    work, storage = Work(1, 2, 1), Storage(file="float32")
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        trainable = method.start(base, np.random.default_rng(0))
        model = method.attach(base, trainable)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = footprint(SMALL, method, work, storage)
    frozen = counted.weights - footprint(SMALL, LoRA(), work, storage).weights
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
    parameters = {"a": np.ones((30, 40), np.float32), "b": np.ones(50, np.float32)}
    state = OPTIMIZERS[name](parameters).state()
    assert sum(array.size for array in state.values() if array.ndim) == STATE[name] * (30 * 40 + 50)


# --- FLOPs ---


class Traced(np.ndarray):
    """An array that counts the operations of every product it comes into."""

    flops = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *arrays: Any, out: Any = None, **options: Any) -> Any:
        plain = [a.view(np.ndarray) if isinstance(a, Traced) else a for a in arrays]
        if out:
            options["out"] = tuple(o.view(np.ndarray) for o in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Traced.flops += 2 * result.size * plain[0].shape[-1]
        return result.view(Traced) if isinstance(result, np.ndarray) else result


class TracedModule:
    """NumPy, where new and joined arrays count as well."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def concatenate(self, arrays: Any, axis: int = 0) -> Any:
        return np.concatenate(arrays, axis).view(Traced)

    def zeros(self, shape: Any, dtype: Any = float) -> Any:
        return np.zeros(shape, dtype).view(Traced)


@pytest.fixture
def traced() -> Iterator[None]:
    previous = use_module(TracedModule())
    yield
    use_module(previous)


COUNTED: dict[str, Method] = {
    "q and v": LoRA(2),
    "all-linear": LoRA(3, target_modules=ALL),
    "dropout": LoRA(2, dropout=0.5),
    "the last layer": LoRA(2, layers_to_transform=(2,)),
    "embedding and head": LoRA(2, target_modules=("q_proj", "embed_tokens", "lm_head")),
    "whole modules beside": LoRA(2, modules_to_save=("lm_head", "mlp.up_proj")),
    "DoRA": LoRA(2, dora=True),
    "DoRA, dropout": LoRA(2, dora=True, dropout=0.5),
    "PiSSA": LoRA(2, init="pissa"),
    "full": Full(),
    "the head alone": Modules(),
    "the embedding alone": Modules(("embed_tokens",)),
    "BitFit": BitFit(),
    "bottleneck": Bottleneck(3),
    "a random subset": RandomSubset(0.1),
    "prefix": PrefixTuning(5),
    "prompt": PromptTuning(5),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_step_makes_the_products_that_were_counted(name: str, checkpointing: bool, traced: None) -> None:
    config = replace(SMALL, hidden_size=24, head_dim=4, intermediate_size=40, vocab_size=50)
    method, work = COUNTED[name], Work(3, 10, 20)
    base = base_model(config, random_weights(config, 0))
    trainable = {name: p.view(Traced) for name, p in method.start(base, np.random.default_rng(0)).items()}
    model = method.attach(base, trainable)
    for site in base.sites.values():
        if isinstance(weight := getattr(site, "weight", None), DenseWeight):
            weight.W = weight.W.view(Traced)
    Traced.flops = 0
    loss_and_gradients(model, [a_batch(config, work)], [1], checkpointing)
    forward, backward = step_flops(config, method, work, checkpointing)
    assert forward.total + backward.total == Traced.flops


def test_flops_with_a_pencil() -> None:
    """One token of SmolLM2-135M and its label: two FLOPs a weight forwards and two backwards, six when all trains."""
    matrices = sum(2 * 576 * out + 2 * 576 * 192 + 3 * 576 * 1536 for out in [576] * 30)
    forward, backward = step_flops(SMOLLM, LoRA(), Work(1, 1, 1))
    assert (forward.weights, backward.weights) == (2 * matrices, 2 * matrices)
    assert (forward.head, backward.head) == (2 * 49152 * 576, 2 * 49152 * 576)
    assert forward.trained == 2 * 8 * (2 * 576 + 576 + 192) * 30 and backward.trained == 2 * forward.trained
    _, full = step_flops(SMOLLM, Full(), Work(1, 1, 1))
    assert full.weights + full.trained + full.head == 4 * (matrices + 49152 * 576)


# --- The claims at GPT-3's size ---


def test_at_gpt_3s_size_the_papers_figures_come_out() -> None:
    """Hu et al., section 4.2: with r = 4 on q and v the checkpoint shrinks 10,000 times, from 350 GB to 35 MB, and
    memory 3 times, from 1.2 TB to 350 GB, for the optimiser's states are gone. Table 4: 4.7M and 37.7M parameters."""
    config = Config.from_dict(GPT_3)
    assert parameter_count(config) == pytest.approx(175e9, rel=0.005)
    trained = {r: numbers(trainable_shapes(LoRA(r), config)) for r in (1, 4, 8)}
    assert (round(trained[1] / 1e6, 1), round(trained[8] / 1e6, 1)) == (4.7, 37.7)
    assert trained[4] == 96 * 2 * 2 * 12288 * 4
    assert checkpoint_bytes(config, "float16") == pytest.approx(350e9, rel=0.005)
    assert saved_bytes(LoRA(4), config, "float16") / 2**20 == pytest.approx(35, rel=0.05)
    assert 9_000 < checkpoint_bytes(config, "float16") / saved_bytes(LoRA(4), config, "float16") < 10_000
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


def run_alone(*argv: str) -> str:
    """In a process of its own: the system adds a parent's peak to its children's, and the tests' is large."""
    command = [sys.executable, "-m", "minilora.plan", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = KNOWN_CONFIGS["SmolLM2-135M"] | {"hidden_size": 36, "num_hidden_layers": 2, "vocab_size": 5000}
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, raw, random_weights(Config.from_dict(raw), 0), "bfloat16")
    return folder


def test_a_step_in_a_process_of_its_own_takes_what_the_command_says(tiny: Path) -> None:
    flags = ("--model", str(tiny), "--batch-size", "8", "--grad-accumulation", "1", "--max-length", "128")
    found = json.loads(run_alone(*flags, "--measure", "--json"))
    memory, measured = found["this"]["memory"], found["measured"]
    assert memory["total"] == pytest.approx(measured["peak"], rel=0.1)
    assert memory["total"] + measured["imported"] == pytest.approx(measured["resident"], rel=0.1)
    assert memory["between_steps"] < memory["total"] and measured["between_steps"] < measured["peak"]


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


def test_the_table_shows_the_deciding_moment_and_full_fine_tuning_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.training.side_by_side.cores", lambda: 1)
    status, out, _ = run(
        "--model", "SmolLM2-135M", "--batch-size", "4", "--grad-accumulation", "1", "--max-length", "256"
    )
    assert status == 0
    lines = {line[:37].strip(): line[37:].split() for line in out.splitlines()}
    assert lines["parameters that train"] == ["2,442,240", "134,515,008", "1.816%"]
    assert lines["frozen weights"][:2] == ["538.06", "MB"]
    assert "→" in lines["at a layer's backward"]


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
