"""The figures that `plan` prints for a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import cores
from minilora.counting.step_count import count_step
from minilora.figures.machine import usable_cores
from minilora.formats.sizes import checkpoint_bytes, numbers, saved_bytes
from minilora.methods.full import Full
from minilora.methods.method import Method
from minilora.model.names import parameter_count
from minilora.plan.planned_run import PlannedRun
from minilora.plan.ranks import THIS_MACHINE, link_of, measured_rates, memory_of_rank, message_bytes, scaling
from minilora.training.parts import number_of_parts

MEMORY = (
    *("weights", "trainable", "optimizer", "gradients", "activations", "loss_chunk"),
    *("moments", "fullest", "between_steps", "total"),
)


def run_figures(run: PlannedRun) -> dict[str, Any]:
    """The figures of the run, and those of full fine-tuning on the same rows."""
    return {
        "model": run.name,
        "settings": run.settings.values(),
        "parameters": parameter_count(run.config),
        "checkpoint_file": checkpoint_bytes(run.config, run.storage.file),
        "work": run.micro_batch._asdict(),
        "this": method_figures(run, run.method),
        "full": method_figures(run, Full()),
    }


def method_figures(run: PlannedRun, method: Method) -> dict[str, Any]:
    """The bytes, FLOPs and calls of a step of a method, and the bytes of the file it saves."""
    settings, storage = run.settings, run.storage
    if not method.freezes_base:  # no weight is held in 4 bits or multiplied in 16
        held = "stored" if storage.frozen == "nf4" else storage.frozen
        storage = storage._replace(frozen=held, mixed_precision="no")
    on_cpu = settings.device != "cuda"
    count = count_step(
        run.config,
        method,
        run.micro_batch.draw(run.config, np.random.default_rng(0)),
        storage,
        settings.optimizer,
        settings.activation_checkpointing,
        settings.grad_accumulation,
        number_of_parts(run.micro_batch.rows) if on_cpu else 1,
        on_cpu,
    )
    flops = {"forward": count.forward._asdict(), "backward": count.backward._asdict()}
    total = count.forward.total + count.backward.total
    written = settings.dtype if method.freezes_base else "float32"  # a whole checkpoint is always float32
    return {
        "trainable_parameters": numbers(method.shapes(run.config)),
        "memory": {key: getattr(count, key) for key in MEMORY},
        "saved_file": saved_bytes(method, run.config, written),
        "flops": flops | {"total": total},
        "head_share": (count.forward.head + count.backward.head) / total,
        "calls": count.calls,
    }


def ranks_figures(
    run: PlannedRun, figures: dict[str, Any], most: int, interconnect: str, tflops: float | None
) -> dict[str, Any]:
    """A step of the method on 1, 2, 4, … `most` ranks. With fewer micro-batches than ranks, each has one.

    Ranks on this machine share its cores: where they have more threads than it has cores, each is slower by as much.
    """
    rates = measured_rates(run.config.hidden_size)
    if tflops is not None:
        rates = rates._replace(flops=tflops * 1e12)
    given = run.settings.grad_accumulation
    micro_batches = max(given, most)
    message = message_bytes(run.method.shapes(run.config))
    compute = figures["flops"]["total"] / given / rates.flops
    link = link_of(interconnect, rates)
    here = interconnect == THIS_MACHINE
    if here and most > usable_cores():
        raise ValueError(f"--ranks {most}: this machine has {usable_cores()} cores; name an --interconnect of several")

    def slower(ranks: int) -> float:
        return max(1.0, ranks * cores() / usable_cores()) if here else 1.0

    counts = sorted({2**i for i in range(most.bit_length()) if 2**i < most} | {most})
    return {
        "interconnect": interconnect,
        "link": link._asdict(),
        "rates": rates._asdict(),
        "message_bytes": message,
        "micro_batches": micro_batches,
        "flags": given,
        "micro_batch_seconds": compute,
        "memory_of_each": memory_of_rank(figures["memory"]["total"], message),
        "steps": [scaling(n, micro_batches, compute * slower(n), message, link, rates)._asdict() for n in counts],
    }
