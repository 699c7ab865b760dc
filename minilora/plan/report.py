"""The tables that `plan` prints."""

from __future__ import annotations

from typing import Any

from minilora.formats.gguf_file import is_gguf
from minilora.frozen.hold import AS_IT_IS
from minilora.plan.planned_run import PlannedRun


def heading(run: PlannedRun, figures: dict[str, Any]) -> list[str]:
    config, rows_of, k = run.config, run.micro_batch, run.settings.grad_accumulation
    rows = f"{k} × {rows_of.rows}" if k > 1 else str(rows_of.rows)
    held, mixed = run.storage.frozen, run.storage.mixed_precision
    if mixed != "no":
        held = f"{held if held == 'nf4' else mixed}, products with them in {mixed}"
    if run.folder and is_gguf(run.folder) and held in AS_IT_IS:
        held += " (counted in float32; those in a GGUF file's blocks stay in the file)"
    return [
        f"{run.name}: {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{figures['parameters']:,} parameters, {size(figures['checkpoint_file'])} in {run.storage.file}",
        f"{rows} × {rows_of.length} tokens, {k * rows_of.labelled:,} with a label; "
        f"computed in {run.storage.dtype}, frozen weights {held}",
        f"rows: {run.rows_from}",
    ]


def memory_table(run: PlannedRun, figures: dict[str, Any]) -> list[str]:
    """The bytes that live between steps, the bytes that a step adds at each moment, and the peak."""
    planned, full, method = figures["this"], figures["full"], run.method.name
    share = planned["trainable_parameters"] / figures["parameters"]
    lines = [
        row("", method, "full", f"full / {method}"),
        row(
            "parameters that train",
            *(f"{column['trainable_parameters']:,}" for column in (planned, full)),
            f"{share:.3%}",
        ),
    ]

    def add(name: str, a: int | None, b: int | None, marks: tuple[str, str] = ("", "")) -> None:
        cells = ["" if n is None else mark + size(n) for n, mark in zip((a, b), marks, strict=True)]
        lines.append(row(name, *cells, f"{b / a:,.2f}×" if a and b else ""))

    named = {
        "frozen weights": "weights",
        "trained parameters": "trainable",
        f"state of {run.settings.optimizer}": "optimizer",
        "between steps": "between_steps",
        "gradients": "gradients",
        "kept for the backward": "activations",
        "a chunk of the loss": "loss_chunk",
    }
    for name, key in named.items():
        add(name, planned["memory"][key], full["memory"][key])
    lines.append("a step adds")
    for moment in planned["memory"]["moments"] | full["memory"]["moments"]:
        a, b = (column["memory"]["moments"].get(moment) for column in (planned, full))
        first, second = ("→ " if column["memory"]["fullest"] == moment else "" for column in (planned, full))
        add(f"  at {moment}", a, b, (first, second))
    add("the most at any time", planned["memory"]["total"], full["memory"]["total"])
    lines.append(row("interpreter and libraries, about", *[size(figures["interpreter"])] * 2, ""))
    add("the saved file", planned["saved_file"], full["saved_file"])
    return lines


def flops_table(figures: dict[str, Any]) -> list[str]:
    """FLOPs of a step by what they are for, and its calls."""
    planned, full = figures["this"], figures["full"]
    ways = [column["flops"][way] for column in (planned, full) for way in ("forward", "backward")]
    lines = [row("FLOPs of a step", "forward", "backward", "full: forward", "backward")]
    for part, name in (
        ("weights", "frozen products"),
        ("trained", "products for training"),
        ("attention", "attention"),
        ("head", "head"),
    ):
        lines.append(row(name, *(f"{way[part]:.3g}" for way in ways)))
    lines.append(row("sum", *(f"{sum(way.values()):.3g}" for way in ways)))
    lines.append(row("calls", f"{planned['calls']:,}", "", f"{full['calls']:,}", ""))
    lines.append(
        f"{planned['flops']['total']:.4g} in all, full {full['flops']['total']:.4g}; head {planned['head_share']:.1%}"
    )
    return lines


def comparison(memory: dict[str, Any], measured: dict[str, int]) -> list[str]:
    """The count against the measured step."""
    pairs = {
        "between steps": (memory["between_steps"], measured["between_steps"]),
        "the most at any time": (memory["total"], measured["peak"]),
        "the process, by the system's account": (measured["imported"] + memory["total"], measured["resident"]),
    }
    return [row("", "counted", "measured", "counted/measured")] + [
        row(name, size(a), size(b), f"{a / b:.3f}") for name, (a, b) in pairs.items()
    ]


def ranks_table(figures: dict[str, Any]) -> list[str]:
    """A step on more and more ranks: its seconds, and the share of them that is neither waiting nor messages."""
    link, rates = figures["link"], figures["rates"]
    more = "" if figures["micro_batches"] == figures["flags"] else ", one for each rank (--grad-accumulation)"
    return [
        f"{figures['micro_batches']:,} micro-batches{more}, each of {figures['micro_batch_seconds']:.3g} s, at "
        f"{rates['flops'] / 1e9:,.0f} GFLOP/s; a message of {size(figures['message_bytes'])} over "
        f"{figures['interconnect']}, {link['alpha'] * 1e6:.3g} µs and {link['beta'] / 1e9:,.3g} GB/s; "
        f"{size(figures['memory_of_each'])} a rank",
        row("ranks", "seconds a step", "efficiency", "by allreduce"),
        *(
            row(f"{n:,}", f"{seconds:.3g}", f"{efficiency:.1%}", f"{allreduce:.1%}")
            for n, seconds, efficiency, allreduce in (step.values() for step in figures["steps"])
        ),
    ]


def row(name: str, *cells: str) -> str:
    return f"{name:37}" + "".join(f"{cell:>17}" for cell in cells)


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count / 1e3:,.2f} kB"
