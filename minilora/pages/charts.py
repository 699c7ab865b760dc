"""The curves of a page as data for its script: each series with its own x, put on one common x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minilora.runs.plots import running_mean, smoothing

MOST_POINTS = 1500  # of a curve; longer ones are drawn as means of neighbours, so that a page stays small
FEW = 60  # points: so few are drawn as dots, too


class Series(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0  # the number of one of the page's colours
    faint: bool = False
    dots_only: bool = False

    def from_one(self) -> Series:
        """The points from x = 1 on."""
        kept = [(x, y) for x, y in zip(self.x, self.y, strict=True) if x >= 1]
        return self._replace(x=[x for x, _ in kept], y=[y for _, y in kept])


def chart(
    x_label: str, y_label: str, series: Sequence[Series], log: bool = False, log_x: bool = False
) -> dict[str, Any]:
    """What the script draws: `x`, and one list for each series, null where it has no point.

    `log` and `log_x` ask for logarithmic scales. That of x begins at 1.
    """
    if log_x:
        series = [one.from_one() for one in series]
    xs = sorted({x for one in series for x in one.x})
    lines = []
    for one in series:
        at = dict(zip(one.x, one.y, strict=True))
        dots = one.dots_only or len(one.x) <= FEW
        style = {"color": one.color, "faint": one.faint, "dots": dots, "line": not one.dots_only}
        lines.append({"label": one.label, "y": [at.get(x) for x in xs], **style})
    return {"x_label": x_label, "y_label": y_label, "x": xs, "series": lines, "log": log, "log_x": log_x}


def loss_series(
    lines: Sequence[Mapping[str, Any]],
    base_loss: float | None,
    adapted_loss: float | None,
    name: str = "",
    color: int = 0,
) -> list[Series]:
    """The losses of a run from the lines of `metrics.jsonl`, and the held-out ones before and after training.

    With a name, of a comparison, one line for training and one for validation is all.
    """
    train = [line for line in lines if line.get("loss") is not None]
    valid = [line for line in lines if line.get("valid_loss") is not None]
    steps, losses = [line["step"] for line in train], [line["loss"] for line in train]
    window = smoothing(len(losses))
    mean = Series(f"mean of {window} steps", *thinned(steps[window - 1 :], running_mean(losses, window)), color)
    each = Series("training, each step", *thinned(steps, losses), color, faint=window > 1)
    validation = Series("validation", [line["step"] for line in valid], [line["valid_loss"] for line in valid], 1)
    if name:
        curve = (mean if window > 1 else each)._replace(label=f"{name}, training")
        validation = validation._replace(label=f"{name}, validation", color=color, dots_only=True)
        return [curve, validation] if valid else [curve]
    held_out = Series(
        "held out, before and after", [0, max(steps, default=0)], [base_loss, adapted_loss], 2, dots_only=True
    )
    found = [each, mean] if window > 1 else [each]
    return [*found, *([validation] if valid else []), *([held_out] if base_loss is not None else [])]


def rate_series(lines: Sequence[Mapping[str, Any]], name: str = "learning rate", color: int = 0) -> Series:
    rated = [line for line in lines if "learning_rate" in line]
    steps, rates = [line["step"] for line in rated], [line["learning_rate"] for line in rated]
    return Series(name, *thinned(steps, rates), color)


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float | None]]:
    """At most MOST_POINTS points: the mean of each group of neighbours, at the last x of the group. Six digits."""
    size = -(-len(xs) // MOST_POINTS) or 1
    groups = [slice(start, start + size) for start in range(0, len(xs), size)]
    return (
        [xs[here][-1] for here in groups],
        [float(f"{sum(ys[here]) / len(ys[here]):.6g}") for here in groups],
    )


def is_wide(series: Sequence[Series]) -> bool:
    """Whether the values are positive and span more than a factor of 20, so that a logarithmic scale shows more."""
    ys = [y for one in series for y in one.y if y is not None]
    return bool(ys) and min(ys) > 0 and max(ys) / min(ys) > 20
