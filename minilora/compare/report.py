"""The figures as tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from minilora.compare.figures import MethodResult, mean_and_spread
from minilora.figures.tables import Table

SPREAD = "± is half of the way from the least to the most of the seeds"


def comparison_tables(comparison: dict[str, Any]) -> list[Table]:
    """The tables of the methods, of LoRA's rank, of the enciphered task and of the spectrum."""
    tables = []
    if methods := comparison["methods"]:
        tables += [worth_table("What the methods are worth", methods), cost_table("What they cost", methods)]
    if ranks := comparison["ranks"]:
        tables += [worth_table("LoRA's rank: worth", ranks), cost_table("LoRA's rank: cost", ranks)]
    if cipher := comparison["cipher"]:
        tables.append(worth_table("The same task enciphered, far from all that the base knows", cipher))
    if comparison["spectrum"]:
        tables += [share_table(comparison["spectrum"]), cut_table(comparison["spectrum"])]
    return tables


def worth_table(title: str, results: Sequence[MethodResult]) -> Table:
    """Trainable parameters, the best rate, and the quality on held-out rows and on text outside the task."""
    head = ["", "trains", "of all", "rate", "held-out loss", "exact match", "drift KL"]
    rows = [[result["method"], *worth_cells(result)] for result in results]
    trained = next((result for result in results if "base_loss" in result), None)
    if trained:
        loss, match = trained["base_loss"], trained["base_exact_match"]
        rows = [["base", "0", "", "", f"{loss:.3f}", percent(match), "0"], *rows]
    read = next((result["base_python_perplexity"] for result in results if "python_perplexity" in result), None)
    if read:
        head.append("Python perplexity")
        of_rows = [result.get("python_perplexity") for result in results]
        for row, value in zip(rows, [read, *of_rows], strict=True):
            row.append(f"{value:.1f}" if value else "")
    notes = [f"{SPREAD}: {counted(results)}", *failures(results)]
    edges = [result["method"] for result in results if result.get("at_edge")]
    if edges:
        notes.append(f"the best rate is the lowest or the highest tried: {', '.join(edges)}")
    return Table(title, head, rows, notes)


def worth_cells(result: MethodResult) -> list[str]:
    if not result["seeds"]:
        return ["failed", *[""] * 5]
    trained = result["trainable_parameters"]
    share = f"{trained / result['total_parameters']:.2%}" if trained else ""
    rate = f"{result['best_rate']:g}" if trained else ""
    return [
        *(f"{trained:,}", share, rate, with_spread(result["loss"], "{:.3f}")),
        with_spread([100 * share for share in result["exact_match"]], "{:.1f}") + "%" * bool(result["exact_match"]),
        with_spread(result.get("drift_kl", []), "{:.3f}"),
    ]


def cost_table(title: str, results: Sequence[MethodResult]) -> Table:
    """The memory, the size of the saved file, and the times of each method."""
    head = ["", "gradients + AdamW, MB", "peak, MB", "file, MB", "step, ms", "token, ms", "merged, ms"]
    rows = [[result["method"], *cost_cells(result)] for result in results]
    timed = next((result["latency"] for result in results if "latency" in result), None)
    if timed:
        rows = [["base", *[""] * 4, f"{timed['base']:.2f}", ""], *rows]
    notes = ["gradients + AdamW is counted: the numbers that train × 3 × 4 bytes; all else is measured"]
    for result in results:
        if reason := result.get("latency", {}).get("not_merged"):
            notes.append(f"{result['method']} cannot be merged: {reason}")
    return Table(title, head, rows, notes)


def cost_cells(result: MethodResult) -> list[str]:
    times = result.get("latency", {})
    return [
        *(megabytes(result, name) for name in ("update_bytes", "peak_memory_bytes", "file_bytes")),
        f"{1e3 * result['seconds_per_step']:.0f}" if "seconds_per_step" in result else "",
        *(f"{times[name]:.2f}" if name in times else "" for name in ("adapted", "merged")),
    ]


def share_table(spectrum: dict[str, Any]) -> Table:
    """The share of ‖ΔW‖² in the largest singular values, as the median over all linear maps."""
    ranks = [r for r in ("1", "2", "4", "8", "16", "32", "64") if r in spectrum["noise"]["shares"]]
    head = ["median over the linear maps", *(f"r = {r}" for r in ranks), "effective rank"]
    rows = []
    for name, of_maps in (
        ("full fine-tuning's ΔW", [*spectrum["full"].values()]),
        ("LoRA's ΔW", [*spectrum["lora"].values()]),
        ("random numbers", [spectrum["noise"]]),
    ):
        shares = [f"{median([of_map['shares'][r] for of_map in of_maps if r in of_map['shares']]):.1%}" for r in ranks]
        rows.append([name, *shares, f"{median([of_map['effective_rank'] for of_map in of_maps]):.1f}"])
    return Table("The share of ‖ΔW‖² in its r largest singular values", head, rows, [])


def cut_table(spectrum: dict[str, Any]) -> Table:
    """The quality of the base with full fine-tuning's ΔW cut to each rank."""
    names = {0: "0, the base", None: "all"}
    rows = [
        [str(names.get(part["rank"], part["rank"])), f"{part['loss']:.3f}", percent(part["exact_match"])]
        for part in spectrum["cut"]
    ]
    notes = ["the linear maps alone: embedding and norms are the base's throughout"]
    return Table("Full fine-tuning's ΔW cut to rank r afterwards", ["r", "held-out loss", "exact match"], rows, notes)


def counted(results: Sequence[MethodResult]) -> str:
    most = max((len(result["seeds"]) for result in results), default=0)
    return f"{most} of them" if most > 1 else "here there is one seed, and so no spread"


def failures(results: Sequence[MethodResult]) -> list[str]:
    return [f"{name} broke off: {error}" for result in results for name, error in result["failed"].items()]


def with_spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return form.format(mean) + (f" ± {form.format(spread)}" if len(values) > 1 else "")


def megabytes(result: MethodResult, name: str) -> str:
    if name not in result:
        return ""
    count = result[name] / 1e6
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
