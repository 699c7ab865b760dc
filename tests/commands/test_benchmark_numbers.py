"""Every number in the benchmark's tables and pictures is the one named: distinct figures in, exact cells out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from minilora.benchmark import plots
from minilora.benchmark.formula import passes_of, product_operations, useful_tokens
from minilora.benchmark.inputs import Inputs
from minilora.benchmark.job import Job, JobRow, write_job_rows
from minilora.benchmark.measure import Result, compare, main_job, predict, side_summary
from minilora.benchmark.report import benchmark_tables, case_table, growth_table
from minilora.benchmark.workloads import CASES, QUICK, Setup, config_of
from minilora.figures.tables import Table, as_markdown, as_text, machine_line
from minilora.formats.known_configs import KNOWN_CONFIGS
from minilora.model.config import Config

NEEDED = {"weights": 90_000_000, "adapter": 7_000_000, "activations": 3_000_000}


# --- From the runs ---


def test_a_sides_seconds_are_of_all_runs_and_its_memory_of_the_last() -> None:
    """Of four seconds the median is the middle of the two in between, and not the mean."""
    runs: list[Result] = [
        {"seconds": s, "peak_bytes": peak, "losses": [loss]}
        for s, peak, loss in ((4.0, 900, 3.0), (1.0, 100, 2.5), (9.0, 500, 2.25), (2.0, 300, 2.125))
    ]
    side: Result = {"side": "mine", "runs": [*runs[:2], {}, *runs[2:]]}  # the third run was cut off
    side_summary(side, tokens=60)
    assert side == {
        "side": "mine", "seconds": [4, 1, 9, 2], "median_seconds": 3, "min_seconds": 1, "max_seconds": 9,
        "tokens_per_second": 20, "peak_bytes": 300, "losses": [3, 2.5, 2.25, 2.125], "loss": 2.125,
    }  # fmt: skip


def test_of_an_epoch_the_losses_are_the_last_runs_and_of_generation_the_answers() -> None:
    epochs = [
        {"seconds": 1.0, "peak_bytes": 1, "losses": [3.0, 2.0], "final_loss": 1.5},
        {"seconds": 1.0, "peak_bytes": 1, "losses": [3.5, 2.5], "final_loss": 1.25},
    ]
    side: Result = {"runs": epochs}
    side_summary(side, 1)
    assert (side["losses"], side["loss"]) == ([3.5, 2.5], 1.25)
    side = {"runs": [{"seconds": 1.0, "peak_bytes": 1, "answers": [[n]]} for n in (4, 5)]}
    side_summary(side, 1)
    assert side["answers"] == [[5]] and "loss" not in side


def test_a_side_that_failed_has_no_figures() -> None:
    side: Result = {"error": "killed", "runs": [{"seconds": 1.0, "peak_bytes": 1}]}
    side_summary(side, 1)
    assert side == {"error": "killed"}


def outcome() -> Result:
    """A case with two references, the products alone and a side that failed, as `measure` has it before comparing."""

    def side(name: str, program: str, seconds: list[float], peak: int, **others: Any) -> Result:
        middle = sorted(seconds)[len(seconds) // 2]
        return {
            "side": name, "program": program, "needed_bytes": NEEDED, "seconds": seconds, "median_seconds": middle,
            "min_seconds": min(seconds), "max_seconds": max(seconds), "tokens_per_second": 5_000 / middle,
            "peak_bytes": peak,
        } | others  # fmt: skip

    return {
        "workload": "W1", "title": "a step", "kind": "step", "device": "cpu", "tokens": 5_000,
        "product_operations": 6_000, "references": ["peer", "other peer"],
        "sides": [
            side("mine", "ours", [2.0, 1.5, 2.25], 400_000_000, loss=1.23456, answers=[[1, 2], [3, 4]]),
            {"side": "broken", "program": "ours", "error": "no memory", "needed_bytes": NEEDED},
            side("peer", "peft_side", [5.0], 1_000_000_000, loss=1.3, answers=[[1, 9], [3, 4]]),
            side("other peer", "peft_side", [8.0], 1_600_000_000, answers=[[7, 8], [3, 4]]),
            side("products", "products", [0.5], 11),
        ],
    }  # fmt: skip


def test_ratios_with_a_pencil() -> None:
    """Speed is the others' time over one's own, memory one's own over the others'; the floor is the products' time."""
    compared = outcome()
    compare(compared)
    mine, broken, peer, other, floor = compared["sides"]
    assert mine["speed_against"] == {"peer": 2.5, "other peer": 4.0}
    assert mine["memory_against"] == {"peer": 0.4, "other peer": 0.25}
    assert peer["speed_against"] == {"peer": 1.0, "other peer": 1.6}
    assert other["memory_against"] == {"peer": 1.6, "other peer": 1.0}
    assert [side["times_floor_seconds"] for side in (mine, peer, other, floor)] == [4, 10, 16, 1]
    assert [side["times_floor_bytes"] for side in (mine, peer, other)] == [4, 10, 16]  # of 100 MB in all
    assert [side["same_tokens"] for side in (mine, peer, other)] == [0.75, 1.0, 0.5]
    assert "times_floor_bytes" not in floor and broken == outcome()["sides"][1]


def test_a_reference_that_failed_is_left_out_and_the_next_one_is_the_first() -> None:
    compared = outcome()
    compared["sides"][2] = {"side": "peer", "program": "peft_side", "error": "no memory"}
    compare(compared)
    assert compared["sides"][0]["speed_against"] == {"other peer": 4.0}
    assert compared["sides"][0]["same_tokens"] == 0.5


# --- The tables ---


def test_each_column_of_a_case_shows_the_figure_that_it_names() -> None:
    compared = outcome()
    compare(compared)
    table = case_table(compared)
    assert table.title == "W1: a step"
    assert table.notes == ["broken failed: no memory"]
    assert table.head == [
        "", "seconds", "least to most", "tokens/s", "speed / [1]", "speed / [2]", "peak MB", "memory / [1]",
        "memory / [2]", "time / floor", "memory / floor", "loss", "same tokens",
    ]  # fmt: skip
    assert table.rows == [
        ["mine", "2", "1.5 to 2.25", "2,500", "2.50×", "4.00×", "400", "0.40×", "0.25×", "4.00×", "4.00×", "1.2346",
         "75%"],
        ["broken", "failed", *[""] * 11],
        ["peer [1]", "5", "", "1,000", "1.00×", "1.60×", "1,000", "1.00×", "0.62×", "10.00×", "10.00×", "1.3000",
         "100%"],
        ["other peer [2]", "8", "", "625", "0.62×", "1.00×", "1,600", "1.60×", "1.00×", "16.00×", "16.00×", "", "50%"],
        ["products", "0.5", "", "10,000", "", "", "100", "", "", "1.00×", "", "", ""],
    ]  # fmt: skip


def test_columns_without_any_figure_are_left_out_and_small_memory_has_two_digits() -> None:
    side = outcome()["sides"][0] | {"peak_bytes": 9_940_000, "seconds": [2.0]}
    del side["loss"]
    table = case_table(outcome() | {"sides": [side], "references": []})
    assert table.head == ["", "seconds", "tokens/s", "peak MB"]
    assert table.rows == [["mine", "2", "2,500", "9.9"]]


def growing() -> list[Result]:
    """W5 before its prediction: the base case with the products, two that grow, and one that failed."""

    def case(axis: str, value: int, seconds: float, operations: int, step_bytes: int, *sides: Result) -> Result:
        mine = {
            "side": "minilora", "program": "ours", "seconds": [seconds], "median_seconds": seconds,
            "peak_bytes": 330_000_000 + value, "imported_bytes": 70_000_000,
        }  # fmt: skip
        return {
            "workload": "W5", "title": f"{value} tokens", "axis": axis, "value": value, "operations": operations,
            "product_operations": 6_000, "step_bytes": step_bytes, "sides": [mine, *sides],
        }  # fmt: skip

    floor = {
        "side": "products", "program": "products", "seconds": [2.0], "median_seconds": 2.0, "imported_bytes": 1,
        "peak_bytes": 5,
    }  # fmt: skip
    failed = {"side": "minilora", "program": "ours", "error": "no memory"}
    return [
        case("", 0, 4.0, 9_000, 150_000_000, floor),
        case("tokens", 512, 6.0, 12_000, 80_000_000),
        case("rank", 64, 3.0, 3_000, 230_000_000) | {"sides": [failed]},
    ]


def test_the_prediction_with_a_pencil() -> None:
    """6,000 operations of the products in 2 s are 3,000 a second; the bytes are those of the imports and the count."""
    outcomes = [outcome(), *growing()]
    predict(outcomes)
    base, tokens, rank = (case["sides"][0] for case in outcomes[1:])
    assert (base["predicted_seconds"], base["predicted_bytes"]) == (3, 220_000_000)
    assert (tokens["predicted_seconds"], tokens["predicted_bytes"]) == (4, 150_000_000)
    assert "predicted_seconds" not in rank and outcomes[0] == outcome()
    assert "predicted_seconds" not in outcomes[1]["sides"][1]


def test_without_the_products_nothing_is_predicted() -> None:
    outcomes = growing()
    outcomes[0]["sides"].pop()
    predict(outcomes)
    assert not any("predicted_seconds" in side for case in outcomes for side in case["sides"])


def test_each_column_of_growth_shows_the_figure_that_it_names() -> None:
    outcomes = growing()
    predict(outcomes)
    table = growth_table(outcomes)
    assert table.head == ["what grows", "step", "seconds", "counted", "ratio", "peak MB", "counted", "ratio"]
    assert table.rows == [
        ["minilora", "0 tokens", "4", "3", "1.33×", "330", "220", "1.50×"],
        ["products", "0 tokens", "2", "", "", "", "", ""],
        ["tokens 512", "512 tokens", "6", "4", "1.50×", "330", "150", "2.20×"],
        ["rank 64", "64 tokens", "failed", "", "", "", "", ""],
    ]
    assert table.notes == ["rank 64 failed: no memory"]
    assert [table.title for table in benchmark_tables([outcome(), *outcomes])] == [
        "W1: a step",
        "W5: how time and memory grow, against what counting says",
    ]
    assert len(benchmark_tables([outcome()])) == 1


def test_a_table_as_text_and_in_markdown_and_the_line_of_the_machine() -> None:
    table = Table("a title", ["", "one", "two"], [["first", "1", "22"], ["b", "333", "4"]], ["a note"])
    assert as_text(table) == "a title\n       one  two\nfirst    1   22\nb      333    4\na note"
    machine = {
        "processor": "a chip", "threads": 3, "cores": 8, "memory_bytes": 17_400_000_000, "gpu": "a GPU",
        "python": "3.9", "numpy": "2.1", "torch": None, "transformers": "4.5", "peft": None, "blas": "a BLAS 0.3",
    }  # fmt: skip
    line = "a chip, 3 threads, 17 GB, a GPU; Python 3.9, numpy 2.1, transformers 4.5, a BLAS 0.3."
    assert machine_line(machine) == line
    assert machine_line(machine | {"gpu": None, "memory_bytes": None}).startswith("a chip, 3 threads; Python")
    assert as_markdown([table], machine, ["the last"]) == (
        f"{line}\n\n### a title\n\n|  | one | two |\n| --- | ---: | ---: |\n| first | 1 | 22 |\n| b | 333 | 4 |\n\n"
        "- a note\n\n- the last\n"
    )


# --- The work that is counted ---


def test_passes_tokens_and_products_with_a_pencil(tmp_path: Path) -> None:
    """The first token of a row is never predicted, so a row without a prompt has one label less than it has tokens."""
    write_job_rows(tmp_path / "rows", [JobRow([1] * 9, 6), JobRow([1] * 5, 0), JobRow([1] * 7, 1)])
    epoch = Job("epoch", "", "", str(tmp_path / "rows"), batch_rows=2)
    generate = Job("generate", "", "", str(tmp_path / "rows"), new_tokens=4)
    assert passes_of(epoch) == [(14, 3 + 4), (7, 6)]
    assert passes_of(generate) == [(21, 3), (3, 3), (3, 3), (3, 3)]
    assert (useful_tokens(epoch), useful_tokens(generate)) == (21, 12)
    config = Config.from_dict(KNOWN_CONFIGS["SmolLM2-135M"])
    linear, head = 30 * (2 * 576**2 + 2 * 192 * 576 + 3 * 1536 * 576), 49152 * 576
    assert product_operations(epoch, config) == 4 * (21 * linear + 13 * head)
    assert product_operations(generate, config) == 2 * (30 * linear + 12 * head)


def test_how_often_each_workload_is_measured_and_what_it_is_compared_with(tmp_path: Path) -> None:
    setup = Setup(Inputs(tmp_path), QUICK, "tiny", "cpu", repeats=10, threads=1)
    found = {name: list(cases(setup)) for name, cases in CASES.items()}
    assert {name: {case.repeats for case in cases} for name, cases in found.items()} == {
        "W1": {10}, "W2": {2}, "W3": {5}, "W5": {3}, "W6": {20},
    }  # fmt: skip
    assert {name: cases[0].references for name, cases in found.items()} == {
        "W1": ("PEFT float32", "PEFT bfloat16"),
        "W2": ("PEFT float32", "PEFT bfloat16"),
        "W3": ("transformers float32", "transformers bfloat16"),
        "W5": (),
        "W6": ("PEFT bfloat16 eager", "PEFT bfloat16 compiled"),
    }
    assert config_of(found["W1"][0]).num_hidden_layers == 2


def test_the_default_job_has_the_figures_of_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = {
        "tokens": 901, "tokens_per_second": 55.5, "peak_memory_bytes": 7_000, "adapted_loss": 1.25, "base_loss": 2.5,
        "training_seconds": 4.0, "seconds": 6.0, "best_valid_loss": 1.5,
    }  # fmt: skip

    def pretend(command: list[str], **_: Any) -> Any:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary))
        return subprocess.CompletedProcess(command, 0, "", "")

    clock = iter([100.0, 108.0])
    monkeypatch.setattr("minilora.benchmark.measure.subprocess.run", pretend)
    monkeypatch.setattr("minilora.benchmark.measure.time.perf_counter", lambda: next(clock))
    found = main_job(Setup(Inputs(tmp_path), QUICK, "tiny", "cpu", 1, 1))
    (side,) = found["sides"]
    assert (found["workload"], found["tokens"], found["summary"]) == ("W4", 901, summary)
    assert [side[name] for name in ("median_seconds", "min_seconds", "max_seconds", "seconds")] == [8, 8, 8, [8]]
    assert (side["tokens_per_second"], side["peak_bytes"], side["loss"]) == (55.5, 7_000, 1.25)
    assert case_table(found).rows == [["minilora", "8", "56", "0.007", "1.2500"]]


# --- The pictures ---


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are drawn, instead of their files."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure) or path)  # type: ignore[func-returns-value]
    yield figures
    plt.close("all")


def test_bars_are_as_long_as_the_figures_and_say_them(drawn: list[Any]) -> None:
    compared = outcome()
    compare(compared)
    plots.plot_bars([compared], Path("nowhere"))
    seconds, memory = drawn[0].axes
    assert seconds.get_title(loc="left") == "W1: a step"
    assert [bar.get_width() for bar in seconds.patches] == [0.5, 8, 5, 2]  # the first side is drawn on top
    assert [text.get_text() for text in seconds.get_yticklabels()] == ["products", "other peer", "peer", "mine"]
    assert [text.get_text() for text in seconds.texts] == [
        "0.5 s", "8 s  (0.62× as fast)", "5 s", "2 s  (2.50× as fast)",
    ]  # fmt: skip
    assert [(a[0], b[0]) for a, b in seconds.collections[0].get_segments()] == [(0.5, 0.5), (8, 8), (5, 5), (1.5, 2.25)]
    assert [bar.get_width() for bar in memory.patches] == [100, 1600, 1000, 400]
    assert memory.get_yticklabels()[0].get_text() == "bytes that must live"
    assert [text.get_text() for text in memory.texts] == [
        "100 MB", "1,600 MB  (1.60× as much)", "1,000 MB", "400 MB  (0.40× as much)",
    ]  # fmt: skip


def test_growth_is_drawn_as_measured_dots_and_counted_lines(drawn: list[Any]) -> None:
    outcomes = growing()
    predict(outcomes)
    smaller = outcomes[1] | {"value": 128, "sides": [outcomes[1]["sides"][0] | {"median_seconds": 1.0}]}
    plots.plot_growth([*outcomes, smaller], Path("nowhere"))
    seconds, memory = drawn[0].axes
    counted, measured = seconds.lines
    assert [tuple(xy) for xy in measured.get_xydata()] == [(128, 1), (512, 6)]
    assert [tuple(xy) for xy in counted.get_xydata()] == [(128, 4), (512, 4)]
    counted, measured = memory.lines
    assert list(measured.get_ydata()) == pytest.approx([330.000512] * 2) and list(counted.get_ydata()) == [150, 150]
    assert (counted.get_label(), measured.get_label()) == ("counted", "measured")
    assert memory.get_xlabel() == "tokens of a step"
