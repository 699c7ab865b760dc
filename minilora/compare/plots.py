"""The comparison as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from minilora.compare.figures import MethodResult, mean_and_spread
from minilora.compare.rank_plots import plot_ranks, plot_spectrum
from minilora.compare.rivals import FAMILY, FULL
from minilora.figures.drawing import BLUE, GREY, ORANGE, save


def plot_comparison(comparison: dict[str, Any], folder: Path) -> list[Path]:
    """Draw into `folder` every picture for which the comparison has the figures."""
    good = [result for result in comparison["methods"] if "drift_kl" in result]
    matched = [result for result in good if result["exact_match"]]
    paths = []
    if good:
        paths.append(plot_quality(comparison["methods"], good, folder / "quality.png"))
        paths.append(plot_rates(good, folder / "rates.png"))
    if matched:
        paths.append(plot_drift(matched, folder / "drift.png"))
    if len(comparison["ranks"]) > 1 and all(result["seeds"] for result in comparison["ranks"]):
        paths.append(plot_ranks(comparison["ranks"], folder / "ranks.png"))
    if comparison["spectrum"]:
        paths.append(plot_spectrum(comparison["spectrum"], folder / "spectrum.png"))
    return paths


def plot_quality(results: Sequence[MethodResult], good: Sequence[MethodResult], path: Path) -> Path:
    """Held-out loss and exact match against the number of trainable parameters."""
    panels = [("loss", 1.0, "held-out loss, nats per token")]
    if all(result["exact_match"] for result in good):
        panels.append(("exact_match", 100.0, "exact match, %"))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.6 * len(panels), 5.6), squeeze=False, layout="constrained")
    few = next((result for result in results if "shots" in result), None)
    for picture, (name, unit, label) in zip(axes[0], panels, strict=True):
        picture.set(xscale="log", xlabel="numbers that train", ylabel=label)
        if name == "loss":
            show_decimals(picture)
        draw_points(picture, [point(result, [result["trainable_parameters"]], result[name], unit) for result in good])
        if few and few[name]:
            level = unit * mean_and_spread(few[name])[0]
            picture.axhline(level, color=GREY, linewidth=1, linestyle=":", label="few-shot, nothing trains")
            picture.legend(frameon=False, fontsize=8.5)
    return save(figure, path)


def plot_drift(results: Sequence[MethodResult], path: Path) -> Path:
    """Exact match against drift: the gain of training, and its side effect."""
    figure, picture = plt.subplots(figsize=(7.5, 5.6), layout="constrained")
    label = "drift KL(base ‖ adapted), nats per token of other text"
    picture.set(xscale="log", xlabel=label, ylabel="exact match, %")
    draw_points(picture, [point(result, result["drift_kl"], result["exact_match"], 100) for result in results])
    return save(figure, path)


class Point(NamedTuple):
    """A method's place in a picture, with its spread in x and in y."""

    name: str
    x: float
    x_spread: float
    y: float
    y_spread: float

    @property
    def colour(self) -> str:
        return ORANGE if self.name == FULL.name else BLUE if self.name in FAMILY else GREY


def point(result: MethodResult, x: Sequence[float], y: Sequence[float], unit: float) -> Point:
    """The point of a result, from a value of x and of y for each seed; `unit` multiplies those of y."""
    return Point(result["method"], *mean_and_spread(x), *mean_and_spread([unit * value for value in y]))


def draw_points(axes: Any, points: Sequence[Point]) -> None:
    """Draw each point with its name beside it; names that would collide are moved up or down."""
    for mark in points:
        style = {"fmt": "o", "color": mark.colour, "markersize": 5, "linewidth": 1}
        axes.errorbar(mark.x, mark.y, mark.y_spread, mark.x_spread, **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.1)
    axes.figure.draw_without_rendering()  # this fixes the scale from data to the page
    on_page = axes.transData.transform([(mark.x, mark.y) for mark in points]) * 72 / axes.figure.dpi  # in points
    places = [(x + 14, x + 14 + 5 * len(mark.name), y) for (x, y), mark in zip(on_page, points, strict=True)]
    for mark, place, height in zip(points, places, beside_each_other(places, 12), strict=True):
        line = {
            "arrowstyle": "-",
            "color": mark.colour,
            "linewidth": 0.5,
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 2,
        }
        look = {"fontsize": 8.5, "color": mark.colour, "va": "center", "arrowprops": line}
        where = {"xy": (mark.x, mark.y), "xytext": (14, height - place[2]), "textcoords": "offset points"}
        axes.annotate(mark.name, **where, **look)


def beside_each_other(places: Sequence[tuple[float, float, float]], gap: float) -> list[float]:
    """Heights for texts at (left, right, height). Texts that share a column are moved apart."""
    heights = [0.0] * len(places)
    order = sorted(range(len(places)), key=lambda i: places[i][0])
    column: list[int] = []
    end = -math.inf
    for i in [*order, None]:
        if column and (i is None or places[i][0] > end):
            for j, height in zip(column, apart([places[j][2] for j in column], gap), strict=True):
                heights[j] = height
            column, end = [], -math.inf
        if i is not None:
            column.append(i)
            end = max(end, places[i][1])
    return heights


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved up or down as little as possible so that they are `gap` apart and in the same order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, list[int]]] = []  # middle and members of each group of neighbours that touch
    for i in order:
        middle, members = heights[i], [i]
        while groups and middle - groups[-1][0] < gap * (len(members) + len(groups[-1][1])) / 2:
            _, before = groups.pop()
            members = before + members
            middle = sum(heights[j] for j in members) / len(members)
        groups.append((middle, members))
    moved = list(heights)
    for middle, members in groups:
        for place, i in enumerate(members):
            moved[i] = middle + gap * (place - (len(members) - 1) / 2)
    return moved


def plot_rates(results: Sequence[MethodResult], path: Path) -> Path:
    """A small picture for each method: the validation loss at each learning rate."""
    columns = min(5, len(results))
    rows = math.ceil(len(results) / columns)
    figure, axes = plt.subplots(
        *(rows, columns), figsize=(2.5 * columns, 2.1 * rows + 0.4), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    full = next((result["best_rate"] for result in results if result["method"] == "full"), None)
    for picture, result in zip(axes.flat, results, strict=False):
        known = [(r, v) for r, v in zip(result["rates"], result["valid_losses"], strict=True) if v is not None]
        picture.plot(*zip(*known, strict=True), "o-", color=BLUE, markersize=4, linewidth=1.2)
        picture.plot(*min(known, key=lambda point: point[1]), "o", color=ORANGE, markersize=7)
        against = ""
        if full:
            picture.axvline(full, color=GREY, linewidth=1, linestyle=":")
            against = f", {result['best_rate'] / full:.3g}× full's"
        picture.set_title(f"{result['method']}: {result['best_rate']:g}{against}", fontsize=8.5, loc="left")
        picture.grid(alpha=0.25)
        picture.tick_params(labelsize=8)
    for picture in axes.flat[len(results) :]:
        picture.set_visible(False)
    axes[0, 0].set_xscale("log")
    show_decimals(axes[0, 0])
    figure.supxlabel("peak learning rate (the dotted line: the best of full fine-tuning)", fontsize=9)
    figure.supylabel("validation loss", fontsize=9)
    return save(figure, path)


def show_decimals(axes: Any) -> None:
    """A logarithmic y axis with numbers such as 0.1, not powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
