"""The still pictures of the two figures, for readers of the Markdown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from minilora.book.numbers import RANKS, cut, first_steps, rank_against_loss
from minilora.figures.drawing import BLUE, GREY, ORANGE, save

SHOWN = (0, 1, 2, 3, 10)  # of the steps


def draw_first_steps(path: Path) -> Path:
    """A column for each step that is shown: B, dB, the way of A from its start, and dA."""
    numbers = first_steps()
    A, B, dA, dB = (numbers["arrays"][name] for name in ("A", "B", "dA", "dB"))
    rows = {"Bᵀ": B.mT, "dBᵀ": dB.mT, "A − A₀": A - A[0], "dA": dA}
    figure, axes = plt.subplots(len(rows), len(SHOWN), figsize=(11, 3.6), layout="constrained")
    for line, (name, matrices) in zip(axes, rows.items(), strict=True):
        largest = float(np.abs(matrices).max())
        for picture, step in zip(line, SHOWN, strict=True):
            shares = matrices[step] / largest
            shares = np.sign(shares) * np.abs(shares) ** 0.6  # so that small numbers are seen, too
            picture.imshow(shares, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
            picture.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for picture, step in zip(axes[0], SHOWN, strict=True):
        picture.set_title(f"after {step} step{'s' * (step != 1)}: loss {numbers['losses'][step]:.2f}", fontsize=10)
    return save(figure, path)


def draw_rank_against_loss(path: Path) -> Path:
    """ΔW and what rank 8 keeps of it, its singular values, and the loss at each rank."""
    numbers = rank_against_loss()
    U, Vt, sigma = numbers["arrays"]["U"], numbers["arrays"]["Vt"], np.array(numbers["sigma"])
    figure, axes = plt.subplot_mosaic("acd;bcd", figsize=(11, 3.2), layout="constrained")
    for place, name, rank in (("a", "ΔW", len(sigma)), ("b", "ΔW cut to rank 8", 8)):
        matrix, largest = cut(U, sigma, Vt, rank), float(np.abs(cut(U, sigma, Vt, len(sigma))).max())
        axes[place].imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
        axes[place].set(xticks=[], yticks=[])
        axes[place].set_title(name, fontsize=10)
    colours = [BLUE if i < 8 else GREY for i in range(len(sigma))]
    axes["c"].bar(range(1, len(sigma) + 1), sigma, color=colours, width=0.8)
    axes["c"].set_title("its singular values", fontsize=10)
    axes["d"].plot(range(len(RANKS)), numbers["losses"], "o-", color=BLUE, markersize=4)
    axes["d"].plot(RANKS.index(8), numbers["losses"][RANKS.index(8)], "o", color=ORANGE, markersize=9)
    axes["d"].set_yscale("log")
    axes["d"].set_xticks(range(len(RANKS)), [*map(str, RANKS[:-1]), "all"], fontsize=8)
    axes["d"].set_title("held-out loss, every ΔW cut to rank r", fontsize=10)
    axes["d"].grid(alpha=0.25)
    return save(figure, path)
