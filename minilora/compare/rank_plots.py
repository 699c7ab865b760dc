"""Pictures of the rank that a change needs: LoRA's rank, and the singular values of ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot as plt

from minilora.compare.figures import MethodResult, mean_and_spread
from minilora.figures.drawing import BLUE, GREY, ORANGE, save


def plot_ranks(results: Sequence[MethodResult], path: Path) -> Path:
    """Quality against LoRA's rank."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    ranks = [result["rank"] for result in results]
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
    """The singular values of each map's ΔW, the share of ‖ΔW‖² in the largest, and the loss with ΔW cut to them."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    kinds = (("full", "full fine-tuning", ORANGE), ("lora", "LoRA", BLUE))
    for kind, label, colour in kinds:
        for of_map in spectrum[kind].values():
            sigma = [value for value in of_map["sigma"] if value > 1e-5]  # smaller values are rounding errors
            left.plot(range(1, len(sigma) + 1), sigma, color=colour, alpha=0.35, linewidth=0.8)
        left.plot([], [], color=colour, label=label)
        shares = [of_map["shares"] for of_map in spectrum[kind].values()]
        draw_shares(middle, shares, colour, label)
    noise = spectrum["noise"]
    left.plot(range(1, len(noise["sigma"]) + 1), noise["sigma"], color="black", linestyle=":", label="random numbers")
    draw_shares(middle, [noise["shares"]], "black", "random numbers", ":")
    left.set(xscale="log", yscale="log", xlabel="number i of the singular value", ylabel="σᵢ / σ₁, a line for each map")
    middle.set(xlabel="r", ylabel="share of ‖ΔW‖² in the r largest, %", ylim=(0, 104))

    cut = [part for part in spectrum["cut"] if part["rank"]]
    ranks = [part["rank"] for part in cut]
    right.plot(ranks, [part["loss"] for part in cut], "o-", color=ORANGE, label="ΔW cut to rank r")
    for part, name in ((spectrum["cut"][0], "base"), (spectrum["cut"][-1], "all of ΔW")):
        right.axhline(part["loss"], color=GREY, linewidth=1, linestyle=":")
        right.annotate(name, (1, part["loss"]), xytext=(0, 3), textcoords="offset points", fontsize=8)
    right.set(xlabel="r", ylabel="held-out loss")
    for picture in (middle, right):
        picture.set_xscale("log", base=2)
        picture.set_xticks(ranks, [str(rank) for rank in ranks])
    for picture in (left, middle, right):
        picture.grid(alpha=0.25)
        picture.legend(frameon=False, fontsize=8)
    return save(figure, path)


def draw_shares(axes: Any, shares: Sequence[dict[str, float]], colour: str, label: str, style: str = "-") -> None:
    """Draw the median over the maps as a line, and the range from the least to the most as a band."""
    ranks = [rank for rank in shares[0] if all(rank in of_map for of_map in shares)]
    numbers = [int(rank) for rank in ranks]
    of_rank = [[100 * of_map[rank] for of_map in shares] for rank in ranks]
    axes.plot(numbers, [median(values) for values in of_rank], style, color=colour, label=label)
    axes.fill_between(numbers, [*map(min, of_rank)], [*map(max, of_rank)], color=colour, alpha=0.15)
