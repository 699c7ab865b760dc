"""The picture of the loss curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from minilora.backend import HostArray
from minilora.figures.drawing import save
from minilora.runs.metrics import METRICS_FILE, read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

PLOT_FILE = "loss.png"
FEW = 40  # points: so few are drawn as dots, because a line through two or three of them hides where they are


def plot_loss(folder: Path, base_loss: float = math.nan, adapted_loss: float = math.nan) -> Path:
    """`loss.png` from `metrics.jsonl`: training loss and its running mean, validation loss, and the learning rate.

    The held-out losses before and after training, if there are any, stand at step 0 and at the last step.
    """
    lines = read_metrics(folder)
    train = [line for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line]
    if not train:
        raise ValueError(f"{folder / METRICS_FILE}: holds no step of training, and there is nothing to plot")
    steps, losses, rates = (values(train, key) for key in ("step", "loss", "learning_rate"))
    window = smoothing(len(losses))

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    if window > 1:
        above.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss, each step")
        mean = running_mean(losses, window)
        above.plot(steps[window - 1 :], mean, color="#08519c", linewidth=1.8, label=f"mean of {window} steps")
    else:
        above.plot(steps, losses, color="#08519c", linewidth=1.5, **_dots(steps), label="training loss, each step")
    if valid:
        above.plot(
            values(valid, "step"),
            values(valid, "valid_loss"),
            color="#d94801",
            marker="o",
            markersize=5,
            label="validation loss",
        )
    if math.isfinite(base_loss):
        held_out = {"marker": "D", "markersize": 6, "linestyle": "none", "clip_on": False, "zorder": 3}
        label = f"held-out loss, {base_loss:.3g} before and {adapted_loss:.3g} after"
        above.plot([0, steps[-1]], [base_loss, adapted_loss], color="#1b7837", label=label, **held_out)
    shown = [y for line in above.lines for y in np.asarray(line.get_ydata(), float) if math.isfinite(y)]
    if shown and min(shown) > 0 and max(shown) / min(shown) > 20:
        above.set_yscale("log")
    above.set_ylabel("nats per labelled token")
    above.legend(frameon=False)
    above.grid(alpha=0.25)
    below.plot(steps, rates, color="#4a4a4a", linewidth=1.2, **_dots(steps))
    below.set_ylim(bottom=0)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.set_xlim(0, steps[-1] * 1.02)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.grid(alpha=0.25)
    return save(figure, folder / PLOT_FILE)


def values(lines: Sequence[Mapping[str, Any]], key: str) -> HostArray:
    """A value of each line, NaN where it is null or missing."""
    return np.array([math.nan if line.get(key) is None else line[key] for line in lines], float)


def smoothing(count: int) -> int:
    """The number of steps whose mean is drawn: a thirtieth of the run, and 1, which is no mean, for short ones."""
    return max(1, count // 30)


def running_mean(losses: Sequence[float] | HostArray, window: int) -> list[float]:
    """The mean of every `window` neighbours: one number fewer for each step that the window is longer than 1."""
    means: list[float] = np.convolve(losses, np.ones(window) / window, mode="valid").tolist()
    return means


def _dots(steps: HostArray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(steps) <= FEW else {}
