"""The figures as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minilora.benchmark.measure import Result
from minilora.figures.tables import Table


def benchmark_tables(outcomes: Sequence[Result]) -> list[Table]:
    """A table for each case; those of W5 in one."""
    tables = [case_table(outcome) for outcome in outcomes if outcome["workload"] != "W5"]
    growing = [outcome for outcome in outcomes if outcome["workload"] == "W5"]
    return tables + ([growth_table(growing)] if growing else [])


def case_table(outcome: Result) -> Table:
    """A line for each side. The references are numbered: "2.00×" under "speed / [1]" is twice the first's speed."""
    done = {side["side"] for side in outcome["sides"] if "seconds" in side}
    references = {name: f"[{i}]" for i, name in enumerate((n for n in outcome["references"] if n in done), start=1)}
    head = ["", "seconds", "least to most", "tokens/s", *(f"speed / {mark}" for mark in references.values())]
    head += ["peak MB", *(f"memory / {mark}" for mark in references.values()), "time / floor", "memory / floor"]
    head += ["loss", "same tokens"]
    rows, notes = [], []
    for side in outcome["sides"]:
        name = f"{side['side']} {references.get(side['side'], '')}".strip()
        if "seconds" not in side:
            rows.append([name, "failed", *[""] * (len(head) - 2)])
            notes.append(f"{name} failed: {side['error']}")
            continue
        peak = sum(side["needed_bytes"].values()) if side["program"] == "products" else side["peak_bytes"]
        several = len(side["seconds"]) > 1
        row = [name, f"{side['median_seconds']:.3g}"]
        row += [f"{side['min_seconds']:.3g} to {side['max_seconds']:.3g}" if several else ""]
        row += [f"{side['tokens_per_second']:,.0f}", *_ratios(side, "speed_against", references)]
        row += [_megabytes(peak), *_ratios(side, "memory_against", references)]
        row += [_times(side.get("times_floor_seconds")), _times(side.get("times_floor_bytes"))]
        row += [f"{side['loss']:.4f}" if "loss" in side else ""]
        row += [f"{side['same_tokens']:.0%}" if "same_tokens" in side else ""]
        rows.append(row)
    return _without_empty_columns(Table(f"{outcome['workload']}: {outcome['title']}", head, rows, notes))


def growth_table(outcomes: Sequence[Result]) -> Table:
    """W5: the measured and the counted figures, side by side."""
    head = ["what grows", "step", "seconds", "counted", "ratio", "peak MB", "counted", "ratio"]
    rows, notes = [], []
    for outcome in outcomes:
        for side in outcome["sides"]:
            row = [f"{outcome['axis']} {outcome['value']}" if outcome["axis"] else side["side"], outcome["title"]]
            if "error" in side:
                notes.append(f"{row[0]} failed: {side['error']}")
            row += [f"{side['median_seconds']:.3g}" if "seconds" in side else "failed"]
            if "predicted_seconds" in side:
                seconds, peak = side["predicted_seconds"], side["predicted_bytes"]
                row += [f"{seconds:.3g}", _times(side["median_seconds"] / seconds)]
                row += [_megabytes(side["peak_bytes"]), _megabytes(peak), _times(side["peak_bytes"] / peak)]
            rows.append(row + [""] * (len(head) - len(row)))
    return Table("W5: how time and memory grow, against what counting says", head, rows, notes)


def _ratios(side: Result, figure: str, references: Iterable[str]) -> list[str]:
    return [_times(side.get(figure, {}).get(name)) for name in references]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 10e6 else f"{count / 1e6:.2g}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _without_empty_columns(table: Table) -> Table:
    kept = [i for i in range(len(table.head)) if i == 0 or any(row[i] for row in table.rows)]
    return table._replace(head=[table.head[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows])
