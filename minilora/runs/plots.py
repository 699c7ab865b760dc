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

PLOT_FILE = "loss.png"


def plot_loss(folder: Path) -> Path:
    """`loss.png` from `metrics.jsonl`: training loss and its running mean, validation loss, and the learning rate."""
    lines = read_metrics(folder)
    train = [line for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line]
    if not train:
        raise ValueError(f"{folder / METRICS_FILE}: holds no step of training, and there is nothing to plot")
    steps, losses, rates = (numbers(train, key) for key in ("step", "loss", "learning_rate"))
    window = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    above.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss, each step")
    above.plot(steps[window - 1 :], smooth, color="#08519c", linewidth=1.8, label=f"mean of {window} steps")
    if valid:
        above.plot(
            numbers(valid, "step"),
            numbers(valid, "valid_loss"),
            color="#d94801",
            marker="o",
            markersize=4,
            label="validation loss",
        )
    if losses.min() > 0 and losses.max() / losses.min() > 20:
        above.set_yscale("log")
    above.set_ylabel("nats per labelled token")
    above.legend(frameon=False)
    above.grid(alpha=0.25)
    below.plot(steps, rates, color="#4a4a4a", linewidth=1.2)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.grid(alpha=0.25)
    return save(figure, folder / PLOT_FILE)


def numbers(lines: Sequence[Mapping[str, Any]], key: str) -> HostArray:
    """A value of each line, NaN where it is null or missing."""
    return np.array([math.nan if line.get(key) is None else line[key] for line in lines], float)
