"""`loss.png`: what is drawn is read back from the axes, for runs of any length."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from minilora.runs import plots
from minilora.runs.plots import plot_loss


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The axes of the picture of a run with so many steps, each with the loss 2/step."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))

    def draw(steps: int, *held_out: float) -> Any:
        lines: list[dict[str, Any]] = [
            {"step": step, "loss": 2 / step, "learning_rate": 0.1} for step in range(1, steps + 1)
        ]
        lines.append({"step": steps, "valid_loss": 0.5})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_loss(tmp_path, *held_out)
        figures[-1].canvas.draw()
        return figures[-1].axes

    yield draw
    plt.close("all")


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 59])
def test_a_short_run_has_whole_steps_on_its_axis_and_no_mean_of_one_step(drawn: Any, steps: int) -> None:
    above, below = drawn(steps, 3.5, 0.25)
    assert all(float(tick).is_integer() for tick in below.get_xticks() if 0 <= tick <= steps)
    assert labels(above) == ["training loss, each step", "validation loss", "held-out loss, 3.5 before and 0.25 after"]
    training = above.lines[0]
    assert [tuple(xy) for xy in training.get_xydata()] == [(step, 2 / step) for step in range(1, steps + 1)]
    assert (training.get_marker() == "o") == (steps <= plots.FEW), "one point alone is no line"


def test_the_loss_before_training_stands_at_step_0_and_within_the_picture(drawn: Any) -> None:
    above, _ = drawn(3, 3.5, 0.25)
    assert [tuple(xy) for xy in above.lines[-1].get_xydata()] == [(0, 3.5), (3, 0.25)]
    assert above.get_xlim()[0] == 0 and above.get_ylim()[0] < 0.25 and above.get_ylim()[1] > 3.5


def test_without_held_out_rows_there_is_no_point_for_them(drawn: Any) -> None:
    above, _ = drawn(3, math.nan, math.nan)
    assert labels(above) == ["training loss, each step", "validation loss"]


def test_a_long_run_has_its_mean_beside_each_step(drawn: Any) -> None:
    above, _ = drawn(90, 3.5, 0.25)
    assert labels(above)[:2] == ["training loss, each step", "mean of 3 steps"]
    mean = above.lines[1].get_xydata()
    assert tuple(mean[0]) == pytest.approx((3, (2 + 1 + 2 / 3) / 3)) and len(mean) == 88
