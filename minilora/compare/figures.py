"""The figures of a method's trials, for tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.compare.rivals import Rival
from minilora.compare.trials import Summary, Trial, best_rate, valid_loss
from minilora.formats.checkpoint import named_dtype
from minilora.formats.peft import TENSORS
from minilora.runs.metrics import read_metrics
from minilora.runs.settings import read_settings

MethodResult = dict[str, Any]

ARRAYS_OF_UPDATE = 3  # the gradient, and AdamW's m and v


def result(
    rival: Rival, seeds: Sequence[int], done: Mapping[Trial, Summary], folder_of: Callable[[Trial], Path]
) -> MethodResult:
    """The figures of a method. Its rates are those of all trials; all else is from the trials at the best rate.

    Lists have a value for each seed. `failed` has the trials in which training broke off, with the reason.
    """
    best = best_rate(rival, seeds[0], done)
    chosen = {trial: done[trial] for seed in seeds if (trial := Trial(rival, best, seed)) in done}
    good = {trial: summary for trial, summary in chosen.items() if "error" not in summary}
    figures: MethodResult = {
        "method": rival.name,
        "what": rival.what,
        "folder": str(folder_of(Trial(rival, best, seeds[0]))),
        "failed": {trial.name: summary["error"] for trial, summary in done.items() if "error" in summary},
        "seeds": [trial.seed for trial in good],
    }
    if not rival.rates:
        return figures | {
            "trainable_parameters": 0,
            "loss": [summary["loss"] for summary in good.values()],
            "exact_match": _matches(good, "exact_match"),
            "shots": [summary["shots"] for summary in good.values()],
        }
    rates = sorted({trial.rate for trial in done if trial.seed == seeds[0]})
    losses = {rate: valid_loss(done[Trial(rival, rate, seeds[0])]) for rate in rates}
    figures |= {
        "best_rate": best,
        "at_edge": len(rates) > 1 and best in (rates[0], rates[-1]),
        "rates": rates,
        "valid_losses": [loss if loss < float("inf") else None for loss in losses.values()],
    }
    if not good:
        return figures
    summaries, folders = list(good.values()), [folder_of(trial) for trial in good]
    settings = read_settings(folders[0])
    trained = summaries[0]["trainable_parameters"]
    return figures | {
        "rank": getattr(settings.method, "rank", None),
        "trainable_parameters": trained,
        "total_parameters": summaries[0]["total_parameters"],
        "update_bytes": ARRAYS_OF_UPDATE * trained * named_dtype(settings.dtype).itemsize,
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
        "file_bytes": sum(path.stat().st_size for path in weight_files(folders[0])),
        "seconds_per_step": statistics.median(second for folder in folders for second in step_seconds(folder)),
        "base_loss": summaries[0]["base_loss"],
        "base_exact_match": summaries[0]["base_exact_match"],
        "loss": [summary["adapted_loss"] for summary in summaries],
        "exact_match": _matches(good, "adapted_exact_match"),
        "drift_kl": [summary["drift_kl"] for summary in summaries],
    }


def _matches(good: Mapping[Trial, Summary], name: str) -> list[float]:
    """The exact match of each trial; empty if the rows have no single right answer."""
    return [summary[name] for summary in good.values() if summary.get(name) is not None]


def weight_files(folder: Path) -> list[Path]:
    """The files of trained weights: the adapter's, or after full fine-tuning the model's."""
    adapter = folder / TENSORS
    return [adapter] if adapter.exists() else sorted(folder.glob("model*.safetensors"))


def step_seconds(folder: Path) -> list[float]:
    """The seconds of each step: forward, backward and update, without evaluations."""
    return [line["tokens"] / line["tokens_per_second"] for line in read_metrics(folder) if "loss" in line]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the distance from the least value to the most."""
    return statistics.mean(values), (max(values) - min(values)) / 2
