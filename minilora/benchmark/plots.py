"""The figures as pictures, from `benchmark.json`: bars for each case, curves for W5.

python -m minilora.benchmark.plots runs/benchmark
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from minilora.benchmark.measure import Result
from minilora.figures.drawing import save
from minilora.formats.files import read_json

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "ours": "#08519c",
    "train": "#08519c",
    "peft_side": "#d94801",
    "llama_side": "#31a354",
    "products": "#969696",
}
UNITS = {"tokens": "tokens of a step", "rank": "rank", "layers": "layers", "context": "tokens of a row (context)"}


def plot_benchmark(folder: Path) -> list[Path]:
    """`benchmark.png` and, if W5 was measured, `growth.png`."""
    outcomes = read_json(folder / "benchmark.json")["workloads"]
    cases = [outcome for outcome in outcomes if outcome["workload"] != "W5"]
    paths = [plot_bars(cases, folder / "benchmark.png")] if cases else []
    return paths + ([plot_growth(outcomes, folder / "growth.png")] if len(cases) < len(outcomes) else [])


def plot_bars(outcomes: Sequence[Result], path: Path) -> Path:
    """Seconds (with the least and the most) and peak memory of every side; a row of two pictures for each case."""
    outcomes = [outcome for outcome in outcomes if any("seconds" in side for side in outcome["sides"])]
    heights = [0.7 + 0.3 * len(outcome["sides"]) for outcome in outcomes]
    figure, axes = plt.subplots(
        *(len(outcomes), 2), figsize=(12, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for (left, right), outcome in zip(axes, outcomes, strict=True):
        sides = [side for side in outcome["sides"] if "seconds" in side][::-1]  # the first side is drawn on top
        names = [side["side"] for side in sides]
        left.set_title(f"{outcome['workload']}: {outcome['title']}", loc="left", fontsize=9)
        seconds = [side["median_seconds"] for side in sides]
        ends = [side["max_seconds"] for side in sides]
        labels = [f"{side['median_seconds']:.3g} s{_against(side, 'speed', 'as fast')}" for side in sides]
        draw_bars(left, sides, names, seconds, ends, labels)
        left.hlines(range(len(sides)), [side["min_seconds"] for side in sides], ends, color="black", linewidth=1)
        left.set_xlabel("seconds", fontsize=8)
        peaks = [side["peak_bytes"] / 1e6 for side in sides]
        labels = [f"{_megabytes(side)} MB{_against(side, 'memory', 'as much')}" for side in sides]
        for i, side in enumerate(sides):
            if side["program"] == "products":
                names[i], peaks[i] = "bytes that must live", sum(side["needed_bytes"].values()) / 1e6
        draw_bars(right, sides, names, peaks, peaks, labels)
        right.set_xlabel("peak memory, MB", fontsize=8)
    if any(outcome["references"] for outcome in outcomes):
        figure.supxlabel("in brackets: against the first orange bar of the same picture", fontsize=8)
    return save(figure, path)


def draw_bars(
    axes: Any,
    sides: Sequence[Result],
    names: Sequence[str],
    values: Sequence[float],
    ends: Sequence[float],
    labels: Sequence[str],
) -> None:
    """Draw a bar for each side, with its label beyond the end."""
    axes.barh(names, values, height=0.7, color=[COLOURS[side["program"]] for side in sides])
    for i, (end, text) in enumerate(zip(ends, labels, strict=True)):
        axes.annotate(text, (end, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.6 * max(ends))
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _against(side: Result, figure: str, words: str) -> str:
    """The ratio to the first reference; empty for that reference itself."""
    ratios = list(side.get(f"{figure}_against", {}).items())[:1]
    return "".join(f"  ({ratio:.2f}× {words})" for name, ratio in ratios if name != side["side"])


def _megabytes(side: Result) -> str:
    count = sum(side["needed_bytes"].values()) if side["program"] == "products" else side["peak_bytes"]
    return f"{count / 1e6:,.0f}" if count >= 10e6 else f"{count / 1e6:.2g}"


def plot_growth(outcomes: Sequence[Result], path: Path) -> Path:
    """W5: seconds above and peak memory below, against the growing size. Dots are measured, lines are counted."""
    points = [(o, o["sides"][0]) for o in outcomes if o.get("axis") and "predicted_seconds" in o["sides"][0]]
    names = list(dict.fromkeys(outcome["axis"] for outcome, _ in points))
    figure, axes = plt.subplots(
        *(2, max(1, len(names))), figsize=(3.2 * max(1, len(names)), 5.5), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(names):
        chosen = sorted(((o["value"], side) for o, side in points if o["axis"] == name), key=lambda point: point[0])
        values = [value for value, _ in chosen]
        for row, (measured, counted, unit) in enumerate(
            (("median_seconds", "predicted_seconds", 1.0), ("peak_bytes", "predicted_bytes", 1e6))
        ):
            picture = axes[row, column]
            picture.plot(values, [side[counted] / unit for _, side in chosen], color="#969696", label="counted")
            picture.plot(values, [side[measured] / unit for _, side in chosen], "o-", color="#08519c", label="measured")
            picture.set_ylim(0, 1.15 * max(max(side[measured], side[counted]) for _, side in chosen) / unit)
            picture.set_xticks(values)
            picture.grid(alpha=0.25)
            picture.tick_params(labelsize=8)
        axes[1, column].set_xlabel(UNITS[name], fontsize=9)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return save(figure, path)


if __name__ == "__main__":
    plot_benchmark(Path(sys.argv[1]))
