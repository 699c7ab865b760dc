"""The comparison as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from minilora.comparison.figures import Result, mean_and_spread
from minilora.comparison.report import median
from minilora.formats.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY, PALE = "#08519c", "#d94801", "#8c8c8c", "#9ecae1"
FAMILY = ("lora", "rslora", "loraplus", "pissa", "orthogonal", "dora", "qlora")  # drawn in blue


def plot(found: dict[str, Any], folder: Path) -> list[Path]:
    """All pictures that the figures suffice for, in `folder`."""
    good = [result for result in found["methods"] if "drift_kl" in result]
    matched = [result for result in good if result["exact_match"]]
    paths = []
    if good:
        paths += [plot_quality(found["methods"], good, folder / "quality.png"), plot_rates(good, folder / "rates.png")]
    if matched:
        paths.append(plot_drift(matched, folder / "drift.png"))
    if len(found["ranks"]) > 1 and all(result["seeds"] for result in found["ranks"]):
        paths.append(plot_ranks(found["ranks"], folder / "ranks.png"))
    if found["spectrum"]:
        paths.append(plot_spectrum(found["spectrum"], folder / "spectrum.png"))
    return paths


def plot_quality(results: Sequence[Result], good: Sequence[Result], path: Path) -> Path:
    """Held-out loss and exact match against the numbers that train."""
    panels = [("loss", 1.0, "held-out loss, nats per token")]
    if all(result["exact_match"] for result in good):
        panels.append(("exact_match", 100.0, "exact match, %"))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.6 * len(panels), 5.6), squeeze=False, layout="constrained")
    few = next((result for result in results if "shots" in result), None)
    for picture, (name, unit, label) in zip(axes[0], panels, strict=True):
        draw_points(picture, good, lambda result: [result["trainable_parameters"]], lambda r: [unit * v for v in r[name]])
        if few and few[name]:
            level = unit * mean_and_spread(few[name])[0]
            picture.axhline(level, color=GREY, linewidth=1, linestyle=":")
            picture.annotate(
                "few-shot, nothing trains", (0, level), xycoords=("axes fraction", "data"),
                xytext=(4, 3), textcoords="offset points", color=GREY, fontsize=8,
            )  # fmt: skip
        picture.set_xscale("log")
        picture.set_xlabel("numbers that train")
        picture.set_ylabel(label)
    return save(figure, path)


def plot_drift(results: Sequence[Result], path: Path) -> Path:
    """What has been learnt against what has been disturbed."""
    figure, picture = plt.subplots(figsize=(7.5, 5.6), layout="constrained")
    draw_points(picture, results, lambda r: r["drift_kl"], lambda r: [100 * v for v in r["exact_match"]])
    picture.set_xscale("log")
    picture.set_xlabel("drift KL(base ‖ adapted), nats per token of other text")
    picture.set_ylabel("exact match, %")
    return save(figure, path)


def draw_points(
    axes: Any,
    results: Sequence[Result],
    x_of: Callable[[Result], Sequence[float]],
    y_of: Callable[[Result], Sequence[float]],
) -> None:
    """A point with its spread for each method, and its name beside it, moved up or down where names would collide."""
    points = []
    for result in results:
        (x, x_spread), (y, y_spread) = mean_and_spread(x_of(result)), mean_and_spread(y_of(result))
        colour = ORANGE if result["method"] == "full" else BLUE if result["method"] in FAMILY else GREY
        axes.errorbar(x, y, y_spread, x_spread, fmt="o", color=colour, markersize=5, linewidth=1)
        points.append((x, y, result["method"], colour))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.08)
    low, high = axes.get_ylim()
    heights = apart([y for _, y, _, _ in points], (high - low) / 26)
    for (x, y, name, colour), height in zip(points, heights, strict=True):
        axes.annotate(
            name, (x, y), xytext=(14, 0), textcoords=("offset points"), fontsize=8.5, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        ).set_position((14, offset_points(axes, y, height)))  # fmt: skip


def offset_points(axes: Any, y: float, height: float) -> float:
    """How many points of the page the height lies above y."""
    (_, a), (_, b) = axes.transData.transform([(1, y), (1, height)])
    return float((b - a) * 72 / axes.figure.dpi)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The same heights, pushed up or down as little as it takes to be `gap` apart, in the same order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, list[int]]] = []  # the middle of neighbours that touch
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


def plot_rates(results: Sequence[Result], path: Path) -> Path:
    """A small picture for each method: the validation loss that each learning rate has reached."""
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
            against = f", {result['best_rate'] / full:.2g}× full's"
        picture.set_title(f"{result['method']}: {result['best_rate']:g}{against}", fontsize=8.5, loc="left")
        picture.grid(alpha=0.25)
        picture.tick_params(labelsize=8)
    for picture in axes.flat[len(results) :]:
        picture.set_visible(False)
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_formatter(plt.FormatStrFormatter("%g"))
    axes[0, 0].yaxis.set_minor_formatter(plt.NullFormatter())
    figure.supxlabel("peak learning rate (the dotted line: the best of full fine-tuning)", fontsize=9)
    figure.supylabel("validation loss", fontsize=9)
    return save(figure, path)


def plot_ranks(results: Sequence[Result], path: Path) -> Path:
    """Quality against LoRA's rank."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    ranks = [int(result["method"].removeprefix("lora-r")) for result in results]
    for picture, name, unit, label in (
        (axes[0], "loss", 1.0, "held-out loss, nats per token"),
        (axes[1], "exact_match", 100.0, "exact match, %"),
    ):
        means = [mean_and_spread([unit * v for v in result[name]]) for result in results if result[name]]
        if not means:
            picture.set_visible(False)
            continue
        picture.errorbar(ranks, [m for m, _ in means], [s for _, s in means], fmt="o-", color=BLUE, markersize=5)
        picture.set_xscale("log", base=2)
        picture.set_xticks(ranks, [str(rank) for rank in ranks])
        picture.set_xlabel("rank r (α = 2r)")
        picture.set_ylabel(label)
        picture.grid(alpha=0.25)
    return save(figure, path)


def plot_spectrum(spectrum: dict[str, Any], path: Path) -> Path:
    """Singular values of each map's ΔW; how much of ‖ΔW‖² the largest hold; and what ΔW cut to them is worth."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    kinds = (("full", "full fine-tuning", ORANGE), ("lora", "LoRA, rank 8", BLUE))
    for kind, label, colour in kinds:
        for number, one in enumerate(spectrum[kind].values()):
            sigma = [value for value in one["sigma"] if value > 1e-5]  # below is rounding
            left.plot(range(1, len(sigma) + 1), sigma, color=colour, alpha=0.35, linewidth=0.8, label=label if not number else None)
        shares = [one["shares"] for one in spectrum[kind].values()]
        draw_shares(middle, shares, colour, label)
    noise = spectrum["noise"]
    left.plot(range(1, len(noise["sigma"]) + 1), noise["sigma"], color="black", linestyle=":", label="random numbers")
    draw_shares(middle, [noise["shares"]], "black", "random numbers", ":")
    left.set(xscale="log", yscale="log", xlabel="number i of the singular value", ylabel="σᵢ / σ₁, a line for each map")
    middle.set(xlabel="r", ylabel="share of ‖ΔW‖² in the r largest, %", ylim=(0, 104))

    cut = [one for one in spectrum["cut"] if one["rank"]]
    whole = spectrum["cut"][-1]
    right.plot([one["rank"] for one in cut], [one["loss"] for one in cut], "o-", color=ORANGE, label="ΔW cut to rank r")
    for level, name in ((spectrum["cut"][0]["loss"], "base"), (whole["loss"], "all of ΔW")):
        right.axhline(level, color=GREY, linewidth=1, linestyle=":")
        right.annotate(name, (cut[-1]["rank"], level), xytext=(0, 3), textcoords="offset points", fontsize=8, ha="right")
    right.set(xlabel="r", ylabel="held-out loss")
    for picture in (middle, right):
        ranks = [one["rank"] for one in cut]
        picture.set_xscale("log", base=2)
        picture.set_xticks(ranks, [str(rank) for rank in ranks])
    for picture in (left, middle, right):
        picture.grid(alpha=0.25)
        picture.legend(frameon=False, fontsize=8)
    return save(figure, path)


def draw_shares(axes: Any, shares: Sequence[dict[str, float]], colour: str, label: str, style: str = "-") -> None:
    """The median over the maps, between the least and the most of them."""
    ranks = [rank for rank in shares[0] if all(rank in one for one in shares)]
    numbers = [int(rank) for rank in ranks]
    of_rank = [[100 * one[rank] for one in shares] for rank in ranks]
    axes.plot(numbers, [median(some) for some in of_rank], style, color=colour, label=label)
    axes.fill_between(numbers, [min(some) for some in of_rank], [max(some) for some in of_rank], color=colour, alpha=0.15)


def save(figure: Any, path: Path) -> Path:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    return path
