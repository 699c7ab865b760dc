"""How much work and memory a job has to take, by counting: no measurement, no array.

The prediction that W5 is plotted against, and the floors in every table.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from minilora.benchmark.job import Job, read_job_rows, steps_of
from minilora.counting.activations import Work
from minilora.counting.footprint import Storage, footprint
from minilora.formats.peft import read_adapter
from minilora.model.config import Config
from minilora.model.names import EMBED, parameter_count, parameter_shapes
from minilora.training.side_by_side import shares


class Pass(NamedTuple):
    """One forward, and backward when training."""

    tokens: int  # those that are no padding
    labelled: int  # rows of logits that are needed


def passes_of(job: Job) -> list[Pass]:
    """A pass for each optimiser step; when generating, one for the prompts and one for each further token."""
    rows = read_job_rows(job)
    if job.kind == "generate":
        prompts = sum(len(row.tokens) for row in rows)
        return [Pass(prompts, len(rows))] + [Pass(len(rows), len(rows))] * (job.new_tokens - 1)
    return [
        Pass(sum(len(row.tokens) for row in step), sum(len(row.tokens) - max(row.prompt, 1) for row in step))
        for step in steps_of(job, rows)
    ]


def useful_tokens(job: Job) -> int:
    """What tokens per second count: tokens that are no padding; when generating, those that are new."""
    if job.kind == "generate":
        return len(read_job_rows(job)) * job.new_tokens
    return sum(one.tokens for one in passes_of(job))


def product_operations(job: Job, config: Config) -> int:
    """Additions and multiplications of `products`: 2 a weight and token, 4 with the backward."""
    shapes = parameter_shapes(config)
    head = shapes[f"{EMBED}.weight"][0] * shapes[f"{EMBED}.weight"][1]
    linear = sum(shape[0] * shape[1] for name, shape in shapes.items() if "layers" in name and len(shape) == 2)
    each = 2 if job.kind == "generate" else 4
    return each * sum(one.tokens * linear + one.labelled * head for one in passes_of(job))


def operations(job: Job, config: Config) -> int:
    """Those of a training step: the products; 6 N r (in + out) for each adapter; 6 T² H d in causal attention.

    An adapter's A and B take part in three products each: forwards, for its own gradient, for its input's. Attention
    has two products forwards and four backwards, of T² H d multiply-adds each, half of which causality leaves out.
    """
    adapter = _adapter_numbers(job, config)
    width = config.num_attention_heads * config.head_dim
    lengths = [len(row.tokens) for row in read_job_rows(job)]
    attention = 6 * config.num_hidden_layers * width * sum(T * T for T in lengths)
    return product_operations(job, config) + 6 * sum(lengths) * adapter + attention


def needed_bytes(job: Job, config: Config) -> dict[str, int]:
    """The bytes that must live at once, by what they are for.

    Training: the frozen weights; A and B, their gradients and AdamW's two moments, in float32; and of the rows of a
    step what the backward reads and cannot cheaply compute again: the inputs of both norms, q, k, v, attention's output
    and its row sums, gate and up. Generation: the weights, and all keys and values.
    """
    narrow = job.dtype in ("bfloat16", "float16")
    number = 2 if narrow else 4
    weights = parameter_count(config) * (2 if job.frozen == "stored" or job.mixed_precision != "no" else number)
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    Q, K = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = read_job_rows(job)
    if job.kind == "generate":
        cached = sum(len(row.tokens) + job.new_tokens for row in rows)
        return {"weights": weights, "keys_values": cached * L * 2 * K * number}
    token = L * (2 * D + 2 * Q + 2 * K + config.num_attention_heads + 2 * F) + D
    most = max(sum(len(row.tokens) for row in step) for step in steps_of(job, rows))
    return {
        "weights": weights,
        "adapter": 4 * 4 * _adapter_numbers(job, config),
        "activations": most * token * number,
    }


def step_bytes(job: Job, config: Config) -> int:
    """The most that a training step on full rows takes here, as `plan` counts it."""
    rows = read_job_rows(job)
    (step,) = passes_of(job)
    work = Work(len(rows), max(len(row.tokens) for row in rows), step.labelled)
    method = read_adapter(Path(job.adapter), config).method
    parts = shares(len(rows)) if job.device == "cpu" else 1
    return footprint(config, method, work, Storage(frozen=job.frozen), shares=parts).total


def _adapter_numbers(job: Job, config: Config) -> int:
    return sum(tensor.size for tensor in read_adapter(Path(job.adapter), config).tensors.values())
