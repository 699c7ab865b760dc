"""The workloads W1 to W6, at full size and at a quick one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.benchmark.inputs import Inputs
from minilora.benchmark.job import Job
from minilora.data.tokenizer import Tokenizer
from minilora.formats.checkpoint import read_config
from minilora.model.config import Config

QKV = ("q_proj", "v_proj")
ALL = ("all-linear",)


@dataclass(frozen=True)
class Side:
    """A program that does the job, with options of its own: fields of Job."""

    name: str
    program: str  # "ours", "peft_side", "llama_side" or "products"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A job and the sides that do it. `references` are the sides that the others are compared with."""

    workload: str
    title: str
    job: Job
    sides: tuple[Side, ...]
    repeats: int
    references: tuple[str, ...] = ()
    axis: str = ""  # in W5: the name of the growing size, and its value in this case
    value: int = 0


@dataclass(frozen=True)
class Size:
    """The sizes of the workloads."""

    dense: tuple[int, int]  # rows, tokens
    instructions: int  # rows
    batch_rows: int
    lengths: tuple[int, int]
    prompt: int
    new_tokens: int
    generated_rows: tuple[int, ...]
    growth: dict[str, tuple[int, ...]]
    gpu: tuple[int, int]  # rows, tokens
    gpu_models: tuple[str, ...]
    main_job: tuple[str, ...]  # flags of the default job


FULL = Size(
    dense=(4, 256),
    instructions=48,
    batch_rows=8,
    lengths=(20, 500),
    prompt=128,
    new_tokens=128,
    generated_rows=(1, 8),
    growth={
        "tokens": (256, 512, 1024, 2048),
        "rank": (8, 64, 128, 256),
        "layers": (6, 12, 18, 30),
        "context": (128, 256, 512, 1024),
    },
    gpu=(8, 512),
    gpu_models=("SmolLM2-135M", "SmolLM2-1.7B"),
    main_job=(),
)
QUICK = Size(
    dense=(2, 16),
    instructions=8,
    batch_rows=4,
    lengths=(4, 24),
    prompt=8,
    new_tokens=4,
    generated_rows=(2,),
    growth={"tokens": (16, 32), "rank": (2,), "layers": (1,), "context": (8,)},
    gpu=(2, 16),
    gpu_models=("tiny",),
    main_job=("--steps", "2", "--batch-size", "2", "--eval-rows", "2"),
)


class Setup(NamedTuple):
    """The choices of the command line."""

    inputs: Inputs
    size: Size
    model: str
    device: str
    repeats: int
    threads: int


PRODUCTS = Side("matrix products alone", "products")
OURS = (
    Side("minilora", "ours"),
    Side("minilora, weights stored in bf16", "ours", {"frozen": "stored"}),
    Side("minilora, products in bf16", "ours", {"mixed_precision": "bf16"}),
)
PEFT = tuple(Side(f"PEFT {dtype}", "peft_side", {"dtype": dtype}) for dtype in ("float32", "bfloat16"))
GROUPED = tuple(
    Side(f"{side.name}, grouped by length", side.program, side.options | {"grouped": True}) for side in PEFT
)
TRANSFORMERS = tuple(Side(side.name.replace("PEFT", "transformers"), side.program, side.options) for side in PEFT)
OURS_GPU = (
    Side("minilora float32", "ours"),
    Side("minilora mixed precision, bf16", "ours", {"mixed_precision": "bf16"}),
    Side("minilora mixed precision, fp16", "ours", {"mixed_precision": "fp16"}),
)
PEFT_GPU = (
    Side("PEFT bfloat16 eager", "peft_side", {"dtype": "bfloat16"}),
    Side("PEFT bfloat16 compiled", "peft_side", {"dtype": "bfloat16", "compiled": True}),
)


def dense(plan: Setup) -> Iterator[Case]:
    """W1: full rows, every token labelled."""
    rows, tokens = plan.size.dense
    model = plan.inputs.model(plan.model)
    file = plan.inputs.rows("dense", model, [tokens] * rows, [0] * rows)
    for targets in (QKV, ALL):
        job = Job("step", model, plan.inputs.adapter(model, 8, targets), file, device=plan.device, threads=plan.threads)
        title = f"a step on {rows} × {tokens} tokens, rank 8 on {', '.join(targets)}"
        yield Case("W1", title, job, (*OURS, *PEFT, PRODUCTS), plan.repeats, side_names(PEFT))


def instructions(plan: Setup) -> Iterator[Case]:
    """W2: prompts and completions of very different lengths, as instruction data has them."""
    size = plan.size
    model = plan.inputs.model(plan.model)
    lengths, prompts = instruction_lengths(size.instructions, *size.lengths, seed=plan.inputs.seed)
    file = plan.inputs.rows("instructions", model, lengths, prompts)
    job = Job(
        *("epoch", model, plan.inputs.adapter(model, 8, ALL), file),
        batch_rows=size.batch_rows,
        device=plan.device,
        threads=plan.threads,
    )
    share = 1 - sum(prompts) / sum(lengths)
    title = (
        f"an epoch of {size.instructions} rows of {min(lengths)} to {max(lengths)} tokens, {share:.0%} of them "
        f"completions, {size.batch_rows} rows a step, rank 8 on all-linear"
    )
    repeats = max(1, plan.repeats // 5)
    yield Case("W2", title, job, (*OURS, *PEFT, *GROUPED, PRODUCTS), repeats, side_names(PEFT))


def instruction_lengths(count: int, shortest: int, longest: int, seed: int) -> tuple[list[int], list[int]]:
    """Lengths of rows and of their prompts: many short ones, few long ones, a quarter of each the completion.

    The logarithm of a length is normal around the middle of its range, which reaches two standard deviations.
    """
    rng = np.random.default_rng(seed)
    low, high = np.log(shortest), np.log(longest)
    lengths = np.exp(rng.normal((low + high) / 2, (high - low) / 4, count)).round().clip(shortest, longest)
    completions = np.maximum(1, (lengths * rng.uniform(0.1, 0.4, count)).round())
    return lengths.astype(int).tolist(), (lengths - completions).astype(int).tolist()


def generation(plan: Setup) -> Iterator[Case]:
    """W3: greedy continuation with the key/value cache."""
    size = plan.size
    model = plan.inputs.model(plan.model)
    others = (*TRANSFORMERS, *llama_cpp(plan.inputs, model))
    for rows in size.generated_rows:
        file = plan.inputs.rows(f"prompts-{rows}", model, [size.prompt] * rows, [size.prompt] * rows)
        job = Job("generate", model, "", file, new_tokens=size.new_tokens, device=plan.device, threads=plan.threads)
        title = f"{size.new_tokens} tokens after {size.prompt}, batch {rows}"
        repeats = (plan.repeats + 1) // 2
        yield Case("W3", title, job, (*OURS, *others, PRODUCTS), repeats, side_names(others))


def llama_cpp(inputs: Inputs, model: str) -> Iterator[Side]:
    """llama.cpp in float32 and bfloat16, where it is installed and the model has a tokenizer, as its files need one."""
    if not (find_spec("xllamacpp") and find_spec("gguf")):
        return
    try:
        Tokenizer.load(Path(model)).fitting(read_config(Path(model))[0].vocab_size)
    except (OSError, ValueError):
        return
    for dtype in ("float32", "bfloat16"):
        yield Side(f"llama.cpp {dtype}", "llama_side", {"model": inputs.gguf(model, dtype)})


def growth(plan: Setup) -> Iterator[Case]:
    """W5: one size grows at a time, the others stay as in W1. The first case measures the speed of products here."""
    inputs, (rows, tokens) = plan.inputs, plan.size.dense
    total = rows * tokens

    def case(axis: str, value: int, rank: int, length: int, count: int, model: str, sides: tuple[Side, ...]) -> Case:
        file = inputs.rows(f"{axis}-{value}", model, [length] * count, [0] * count)
        job = Job("step", model, inputs.adapter(model, rank, ALL), file, device=plan.device, threads=plan.threads)
        title = f"{count} × {length} tokens, rank {rank}"
        return Case("W5", title, job, sides, min(3, plan.repeats), axis=axis, value=value)

    base, our_side = inputs.model(plan.model), OURS[:1]
    yield case("", 0, 8, tokens, rows, base, (*our_side, PRODUCTS))
    for value in plan.size.growth["tokens"]:
        yield case("tokens", value, 8, min(tokens, value), max(1, value // tokens), base, our_side)
    for value in plan.size.growth["rank"]:
        yield case("rank", value, value, tokens, rows, base, our_side)
    for value in plan.size.growth["layers"]:
        yield case("layers", value, 8, tokens, rows, inputs.model(plan.model, num_hidden_layers=value), our_side)
    for value in plan.size.growth["context"]:
        yield case("context", value, 8, value, total // value, base, our_side)


def gpu(plan: Setup) -> Iterator[Case]:
    """W6: full rows on a GPU, PEFT in bfloat16."""
    rows, tokens = plan.size.gpu
    for name in plan.size.gpu_models:
        model = plan.inputs.model(name)
        file = plan.inputs.rows(f"gpu-{name}", model, [tokens] * rows, [0] * rows)
        job = Job("step", model, plan.inputs.adapter(model, 8, ALL), file, device="cuda", threads=plan.threads)
        products = Side("matrix products alone, float16", "products", {"dtype": "float16"})
        title = f"GPU, {name}: a step on {rows} × {tokens} tokens, rank 8 on all-linear"
        yield Case("W6", title, job, (*OURS_GPU, *PEFT_GPU, products), 2 * plan.repeats, side_names(PEFT_GPU))


def side_names(sides: tuple[Side, ...]) -> tuple[str, ...]:
    return tuple(side.name for side in sides)


CASES: dict[str, Callable[[Setup], Iterator[Case]]] = {
    "W1": dense,
    "W2": instructions,
    "W3": generation,
    "W5": growth,
    "W6": gpu,
}
WORKLOADS = ("W1", "W2", "W3", "W4", "W5", "W6")  # W4 is the default job of `train`, a command and no Case


def config_of(case: Case) -> Config:
    return read_config(Path(case.job.model))[0]
