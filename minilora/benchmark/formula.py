"""The least work and memory of a job, by counting: nothing is measured, and no array holds numbers.

The counts are the prediction for W5 and the floors in every table. If a count depends on the operations of the step,
the step itself is run on arrays without numbers (`counting`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from minilora.benchmark.job import Job, read_job_rows, steps_of
from minilora.benchmark.ours import batch_of
from minilora.counting.step_count import Storage, count_step
from minilora.data.batches import divide
from minilora.formats.peft import read_adapter
from minilora.methods.bitfit import BitFit
from minilora.model.config import Config
from minilora.model.names import EMBED, parameter_count, parameter_shapes
from minilora.training.parts import number_of_parts


class Pass(NamedTuple):
    """One forward, and one backward if the job trains."""

    tokens: int  # without padding
    labelled: int  # rows of logits that are needed


def passes_of(job: Job) -> list[Pass]:
    """A pass for each optimiser step; in generation, one for the prompts and one for each further token."""
    rows = read_job_rows(job)
    if job.kind == "generate":
        prompts = sum(len(row.tokens) for row in rows)
        return [Pass(prompts, len(rows))] + [Pass(len(rows), len(rows))] * (job.new_tokens - 1)
    return [
        Pass(sum(len(row.tokens) for row in step), sum(len(row.tokens) - max(row.prompt, 1) for row in step))
        for step in steps_of(job, rows)
    ]


def useful_tokens(job: Job) -> int:
    """The tokens in "tokens per second": all but padding; in generation, the new tokens."""
    if job.kind == "generate":
        return len(read_job_rows(job)) * job.new_tokens
    return sum(work.tokens for work in passes_of(job))


def product_operations(job: Job, config: Config) -> int:
    """The additions and multiplications of `products`: 2 per weight and token, or 4 with the backward."""
    shapes = parameter_shapes(config)
    head = shapes[f"{EMBED}.weight"][0] * shapes[f"{EMBED}.weight"][1]
    linear = sum(shape[0] * shape[1] for name, shape in shapes.items() if "layers" in name and len(shape) == 2)
    per_weight = 2 if job.kind == "generate" else 4
    return per_weight * sum(work.tokens * linear + work.labelled * head for work in passes_of(job))


def operations(job: Job, config: Config) -> int:
    """The additions and multiplications of all matrix products in training, of weights, adapters and attention."""
    method = read_adapter(Path(job.adapter), config).method
    total = 0
    for rows in steps_of(job, read_job_rows(job)):
        (batch,) = divide(batch_of(rows), 1)  # without padding
        count = count_step(config, method, batch)
        total += count.forward.total + count.backward.total
    return total


def needed_bytes(job: Job, config: Config) -> dict[str, int]:
    """The bytes that must live at once, by their purpose.

    Training: the frozen weights; A and B, their gradients and AdamW's two moments, in float32; and for the fullest step
    the arrays that the backward reads and cannot cheaply compute again. Since biases need no array of their own, these
    are the arrays that the forward keeps when only biases train: the inputs of both norms, q, k, v, attention's output
    and its row sums, gate and up. Generation: the weights, and all keys and values.
    """
    narrow = job.dtype in ("bfloat16", "float16")
    number = 2 if narrow else 4
    weights = parameter_count(config) * (2 if job.frozen == "stored" or job.mixed_precision != "no" else number)
    rows = read_job_rows(job)
    if job.kind == "generate":
        cached = sum(len(row.tokens) + job.new_tokens for row in rows)
        width = config.num_key_value_heads * config.head_dim
        return {"weights": weights, "keys_values": cached * config.num_hidden_layers * 2 * width * number}
    fullest = max(steps_of(job, rows), key=lambda step: sum(len(row.tokens) for row in step))
    (batch,) = divide(batch_of(fullest), 1)
    adapter = read_adapter(Path(job.adapter), config)
    return {
        "weights": weights,
        "adapter": 4 * 4 * sum(tensor.size for tensor in adapter.tensors.values()),
        "activations": count_step(config, BitFit(), batch).activations // 4 * number,
    }


def step_bytes(job: Job, config: Config) -> int:
    """The most that a training step on all rows takes here, as `plan` counts it."""
    rows, on_cpu = read_job_rows(job), job.device == "cpu"
    method = read_adapter(Path(job.adapter), config).method
    parts = number_of_parts(len(rows)) if on_cpu else 1
    return count_step(config, method, batch_of(rows), Storage(frozen=job.frozen), parts=parts, on_cpu=on_cpu).total
