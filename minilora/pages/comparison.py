"""Several runs side by side: the settings in which they differ, their figures, curves, answers and weight changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilora.pages.charts import chart, is_wide, loss_series, rate_series
from minilora.pages.view import PINNED, Figures, charts_with_less, largest, run_view, weight_map
from minilora.pages.words import marked


class Compared(NamedTuple):
    """A figure of summary.json in a comparison, and whether a smaller (−1) or a larger (1) one is better."""

    key: str
    name: str
    format: str
    better: int = 0


COMPARED = (
    Compared("adapted_loss", "held-out loss", "loss", -1),
    Compared("adapted_exact_match", "exact match", "percent", 1),
    Compared("drift_kl", "drift KL(base ‖ adapted)", "loss", -1),
    Compared("base_loss", "held-out loss before", "loss"),
    Compared("base_exact_match", "exact match before", "percent"),
    Compared("trainable_parameters", "numbers that train", "count"),
    Compared("steps", "steps", "count"),
    Compared("tokens", "tokens trained on", "count"),
    Compared("training_seconds", "seconds in training", "count"),
    Compared("tokens_per_second", "tokens a second", "count"),
    Compared("peak_memory_bytes", "peak memory", "bytes"),
)


def comparison_view(folders: Sequence[Path]) -> Figures:
    """All that the page of several runs shows."""
    runs = [run_view(folder) for folder in folders]
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = run["folder"]
    curves = [
        series for color, run in enumerate(runs) for series in loss_series(run["lines"], None, None, run["name"], color)
    ]
    rates = [rate_series(run["lines"], run["name"], color) for color, run in enumerate(runs)]
    changes = {f"{i} {module}": change for i, run in enumerate(runs) for module, change in _changes(run).items()}
    most = largest(changes)
    for run in runs:
        run["map"] = weight_map(_changes(run), most)
    return {
        "runs": runs,
        "figures": [(one, [run["summary"].get(one.key) for run in runs], best(one, runs)) for one in COMPARED],
        "settings": differing_settings([run["settings"] for run in runs]),
        "charts": {
            "loss": chart("step", "nats per labelled token", curves, is_wide(curves)),
            "rate": chart("step", "learning rate", rates),
            **charts_with_less([(run["found"], run["name"], color) for color, run in enumerate(runs)]),
        },
        "answers": common_answers(runs),
    }


def _changes(run: Mapping[str, Any]) -> Figures:
    found: Figures = run["found"].get("changes", {})
    return found


def best(one: Compared, runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The best value among the runs; None if nothing is better or worse, or all are the same."""
    values = [run["summary"][one.key] for run in runs if run["summary"].get(one.key) is not None]
    if not one.better or len({*values}) < 2:
        return None
    chosen: float = max(values, key=lambda value: one.better * value)
    return chosen


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The settings that are not the same in all runs, each with its values."""
    names = dict.fromkeys(name for one in settings for name in one if name not in PINNED)
    rows = [(name, [one.get(name) for one in settings]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def common_answers(runs: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """The questions that all runs were asked, with each run's answer."""
    by_question = [{(row["asked"], row["right"]): row for row in run["found"]["answers"]["rows"]} for run in runs]
    return [
        {
            "asked": asked,
            "right": right,
            "answers": [
                (marked(one[asked, right]["now"], right), one[asked, right]["is_right"]) for one in by_question
            ],
        }
        for asked, right in by_question[0]
        if all((asked, right) in one for one in by_question)
    ]
