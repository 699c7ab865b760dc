"""The measurement of ranks beside threads: each cell is the figure that it names, and every way does the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.commands import assert_refused, command_module, read, run
from support.on_ranks import needs_mpi

from minilora.benchmark.ranks import Way, as_table
from minilora.formats.load import SHIPPED_MODEL


def figures(seconds: list[float], peaks: list[int], waiting: float = 0.0) -> dict[str, Any]:
    return {
        "seconds": seconds, "tokens": [100] * len(seconds), "peak_bytes": peaks, "message_bytes": 2_500_000,
        "private_bytes": [peak // 2 for peak in peaks],
        "message_seconds": waiting, "trainable_parameters": 625_000, "adapter": "same",
    }  # fmt: skip


def test_each_cell_has_the_figure_that_it_names() -> None:
    runs = {
        Way(1, 1): [figures([4.0, 5.0, 9.0], [10**8]), figures([5.0], [2 * 10**8])],
        Way(2, 1, "mapped"): [figures([2.0, 2.5], [10**8, 3 * 10**8], 0.25), figures([2.5], [2 * 10**8, 10**8], 0.25)],
    }
    table = as_table("small", runs, 0.0125)
    assert table.rows == [
        ["1 × 1, widened", "5.00", "1.00", "17", "100", "200", "", ""],
        ["2 × 1, mapped", "2.50", "2.00", "43", "100 + 150", "200 + 300", "2.50", "250"],
    ]
    assert "625,000 numbers" in table.notes[0] and "12.5 ms" in table.notes[-1]


@needs_mpi
def test_every_way_is_run_and_leaves_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = command_module("benchmark.ranks")
    monkeypatch.setattr(module, "MICRO_BATCHES", 2)
    flags = ("--model", SHIPPED_MODEL, "--steps", 2, "--repeats", 1, "--cores", 2, "--out", tmp_path / "out")
    result = run("benchmark.ranks", *flags)
    assert result.code == 0, result.err
    found = read(tmp_path / "out" / "ranks.json")
    processes = {way: {len(one["peak_bytes"]), len(one["private_bytes"])} for way, (one,) in found["runs"].items()}
    assert processes == {"1 × 1, widened": {1}, "1 × 2, widened": {1}} | {
        f"2 × 1, {frozen}": {2} for frozen in ("widened", "stored", "mapped")
    }
    for (one,) in found["runs"].values():
        assert all(10e6 < private < peak for private, peak in zip(one["private_bytes"], one["peak_bytes"], strict=True))
    assert found["runs"]["2 × 1, mapped"][0]["message_bytes"] > 0 < found["sum_seconds"]
    assert (tmp_path / "out" / "ranks.md").read_text().count("\n| ") == 7


def test_mistakes_are_told_by_flag(tmp_path: Path) -> None:
    assert_refused(run("benchmark.ranks", "--steps", 1, "--out", tmp_path), "--steps")
