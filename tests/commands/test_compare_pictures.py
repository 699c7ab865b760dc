"""The pictures of a comparison show its figures: what is drawn is read back from the axes, number by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from support.comparisons import comparison_of, failed_figures, few_shot_figures, method_figures, spectrum_figures

from minilora.compare import plots, rank_plots
from minilora.compare.plots import plot_comparison
from minilora.figures.drawing import BLUE, GREY, ORANGE

LORA, FULL = method_figures("lora"), method_figures("full", trainable_parameters=1_000_000, best_rate=0.01)
OTHER = method_figures(
    "prompt", trainable_parameters=5_000, loss=[1.5, 1.0], exact_match=[0.2, 0.3], drift_kl=[0.5, 1.0],
    rates=[0.1, 0.3], best_rate=0.3, valid_losses=[1.25, 1.125],
)  # fmt: skip

Draw = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws a comparison, and returns the figures by the names of their files instead of saving them."""
    figures: dict[str, Any] = {}

    def keep(figure: Any, path: Path) -> Path:
        figures[path.stem] = figure
        return path

    for module in (plots, rank_plots):
        monkeypatch.setattr(module, "save", keep)

    def draw(comparison: dict[str, Any]) -> dict[str, Any]:
        plot_comparison(comparison, Path("nowhere"))
        return figures

    yield draw
    plt.close("all")


def bars(axes: Any) -> list[dict[str, Any]]:
    """The points of an axes with their spreads in x and y, and their names and colours."""
    found = []
    for container, text in zip(axes.containers, axes.texts, strict=True):
        line, _, parts = container
        across, upright = (part.get_segments()[0] for part in parts)
        found.append(
            {
                "name": text.get_text(), "x": line.get_xdata()[0], "y": line.get_ydata()[0],
                "x_spread": (across[1][0] - across[0][0]) / 2, "y_spread": (upright[1][1] - upright[0][1]) / 2,
                "colour": line.get_color(),
            }
        )  # fmt: skip
    return found


def test_quality_is_drawn_against_the_numbers_that_train(drawn: Draw) -> None:
    (loss, match) = drawn(comparison_of(LORA, OTHER, few_shot_figures()))["quality"].axes
    assert [bar["name"] for bar in bars(loss)] == [bar["name"] for bar in bars(match)] == ["lora", "prompt"]
    first, second = bars(loss)
    assert first == pytest.approx(
        {"name": "lora", "x": 3000, "y": 0.625, "x_spread": 0, "y_spread": 0.125, "colour": BLUE}
    )
    assert (second["y"], second["y_spread"], second["colour"]) == (1.25, 0.25, GREY)
    first, second = bars(match)
    assert first == pytest.approx({"name": "lora", "x": 3000, "y": 43, "x_spread": 0, "y_spread": 3, "colour": BLUE})
    assert second["y"] == pytest.approx(25)
    levels = [next(line for line in axes.lines if line.get_linestyle() == ":").get_ydata()[0] for axes in (loss, match)]
    assert levels == pytest.approx([1.625, 21])
    assert [loss.get_ylabel(), match.get_ylabel()] == ["held-out loss, nats per token", "exact match, %"]
    assert loss.get_xlabel() == "numbers that train"


def test_full_fine_tuning_is_orange_and_loras_family_blue(drawn: Draw) -> None:
    (loss,) = drawn(comparison_of(FULL, LORA | {"exact_match": []}, method_figures("dora"), OTHER))["quality"].axes
    assert [bar["colour"] for bar in bars(loss)] == [ORANGE, BLUE, BLUE, GREY]


def test_drift_is_drawn_against_the_exact_match(drawn: Draw) -> None:
    (axes,) = drawn(comparison_of(LORA, OTHER, few_shot_figures(), failed_figures("dora")))["drift"].axes
    bar, other = bars(axes)
    assert bar == pytest.approx({"name": "lora", "x": 0.25, "y": 43, "x_spread": 0.125, "y_spread": 3, "colour": BLUE})
    assert (other["name"], other["x"], other["x_spread"]) == ("prompt", 0.75, 0.25)
    assert axes.get_ylabel() == "exact match, %" and axes.get_xlabel().startswith("drift KL")


def test_each_small_picture_has_the_validation_losses_of_a_methods_rates(drawn: Draw) -> None:
    first, second, third = (
        axes for axes in drawn(comparison_of(FULL, LORA, OTHER))["rates"].axes if axes.get_visible()
    )
    assert first.get_title(loc="left") == "full: 0.01, 1× full's"
    assert second.get_title(loc="left") == "lora: 0.03, 3× full's"
    assert third.get_title(loc="left") == "prompt: 0.3, 30× full's"
    curve, best, full = second.lines
    assert [tuple(xy) for xy in curve.get_xydata()] == [(0.01, 0.91), (0.03, 0.81)]  # at 0.1 training broke off
    assert tuple(best.get_xydata()[0]) == (0.03, 0.81) and best.get_color() == ORANGE
    assert list(full.get_xdata()) == [0.01, 0.01]
    assert tuple(third.lines[1].get_xydata()[0]) == (0.3, 1.125)


def test_quality_is_drawn_against_loras_rank(drawn: Draw) -> None:
    ranks = [
        method_figures("a", rank=2), method_figures("b", rank=16, loss=[0.25, 0.75], exact_match=[0.5, 0.75]),
    ]  # fmt: skip
    loss, match = drawn(comparison_of(ranks=ranks))["ranks"].axes
    for axes, means, spreads in ((loss, [0.625, 0.5], [0.125, 0.25]), (match, [43, 62.5], [3, 12.5])):
        line, _, (upright,) = axes.containers[0]
        assert list(line.get_xdata()) == [2, 16] and list(line.get_ydata()) == pytest.approx(means)
        assert [(top - low) / 2 for (_, low), (_, top) in upright.get_segments()] == pytest.approx(spreads)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "16"]
    assert [axes.get_ylabel() for axes in (loss, match)] == ["held-out loss, nats per token", "exact match, %"]


def test_ranks_that_failed_are_not_drawn(drawn: Draw) -> None:
    assert drawn(comparison_of(ranks=[method_figures("a", rank=2), failed_figures("b")])) == {}


def test_the_spectrum_is_drawn_as_values_as_shares_and_as_the_loss_of_the_cuts(drawn: Draw) -> None:
    """The band of the shares goes from the least to the most of the maps, the line through their median."""
    spectrum = spectrum_figures()
    spectrum["full"]["a"]["sigma"] = [1.0, 0.5, 1e-6]
    values, shares, cuts = drawn(comparison_of(spectrum=spectrum))["spectrum"].axes
    assert [tuple(xy) for xy in values.lines[0].get_xydata()] == [(1, 1.0), (2, 0.5)]  # the third is a rounding error
    full, lora, noise = shares.lines
    assert list(full.get_xdata()) == [1, 2, 4, 8, 16, 128]
    assert list(full.get_ydata())[:4] == pytest.approx([12, 23, 34, 53])
    assert list(lora.get_ydata())[:4] == pytest.approx([43, 64, 82, 93])
    assert list(noise.get_ydata())[:4] == pytest.approx([2, 3, 5, 9])
    assert [line.get_color() for line in shares.lines] == [ORANGE, BLUE, "black"]
    band = shares.collections[0].get_paths()[0].vertices
    assert sorted({float(y) for x, y in band if x == 1}) == pytest.approx([11, 13])
    curve, base, whole = cuts.lines
    assert [tuple(xy) for xy in curve.get_xydata()] == [(1, 1.5), (2, 0.625), (4, 0.575), (8, 0.55)]
    assert (base.get_ydata()[0], whole.get_ydata()[0]) == (2.5, 0.5)
    assert [text.get_text() for text in cuts.texts] == ["base", "all of ΔW"]
