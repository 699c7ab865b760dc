"""Measure a case: every side loaded in its own process, run in turns, and compared."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minilora.benchmark.formula import needed_bytes, operations, product_operations, step_bytes, useful_tokens
from minilora.benchmark.worker import Worker, WorkerError, environment
from minilora.benchmark.workloads import Case, Setup, Side, config_of
from minilora.runs.folder import SUMMARY_FILE

Result = dict[str, Any]


def measure(case: Case, sides: Sequence[Side], on_run: Callable[[str], Any] = lambda name: None) -> Result:
    """The figures of each of `sides`. `on_run` is called with the name of each side before it is warmed up and run.

    All sides are loaded first, and then measured A B C, A B C, …, so that a drift of the machine's speed meets all
    alike. If there is a single turn, each side is loaded for its turn and ended before the next, since together they
    may need too much memory. The error of a side that fails is recorded, and the side is left out from then on.
    """
    jobs = {side.name: replace(case.job, **side.options) for side in sides}
    results: dict[str, Result] = {side.name: {"side": side.name, "program": side.program, "runs": []} for side in sides}
    workers: dict[str, Worker] = {}

    def attempt(name: str, action: Callable[[Worker], Result]) -> Result:
        try:
            return action(workers[name])
        except WorkerError as error:
            results[name]["error"] = str(error)
            workers.pop(name).close()
            return {}

    def take_turns(sides: Sequence[Side]) -> None:
        for side in sides:
            workers[side.name] = Worker(side.program, case.job.threads)
            workers[side.name].tell("load", jobs[side.name])
        for name in list(workers):
            results[name] |= attempt(name, Worker.answer)
        for name in list(workers):
            on_run(f"{name}, warming up")
            attempt(name, lambda worker: worker.ask("warm_up"))
        for _ in range(case.repeats):
            for name in list(workers):
                on_run(name)
                results[name]["runs"].append(attempt(name, lambda worker: worker.ask("measure")))
        while workers:
            workers.popitem()[1].close()

    try:
        for together in [sides] if case.repeats > 1 else [[side] for side in sides]:
            take_turns(together)
    finally:
        for worker in workers.values():
            worker.close()

    config = config_of(case)
    tokens = useful_tokens(case.job)
    for name, result in results.items():
        result["needed_bytes"] = needed_bytes(jobs[name], config)
        side_summary(result, tokens)
    outcome: Result = {
        "workload": case.workload,
        "title": case.title,
        "kind": case.job.kind,
        "device": case.job.device,
        "tokens": tokens,
        "product_operations": product_operations(case.job, config),
        "references": list(case.references),
        "sides": list(results.values()),
    }
    if case.workload == "W5":
        outcome |= {"axis": case.axis, "value": case.value, "operations": operations(case.job, config)}
        outcome["step_bytes"] = step_bytes(case.job, config)
    compare(outcome)
    return outcome


def side_summary(result: Result, tokens: int) -> None:
    """Replace one side's runs by their seconds, tokens per second, peak memory, and losses or answers."""
    runs = [run for run in result.pop("runs") if run]
    if "error" in result or not runs:
        return
    seconds = [run["seconds"] for run in runs]
    last = runs[-1]
    result |= {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "peak_bytes": last["peak_bytes"],
    }
    if "losses" in last:
        result["losses"] = last["losses"] if "final_loss" in last else [run["losses"][0] for run in runs]
        result["loss"] = last.get("final_loss", last["losses"][-1])
    if "answers" in last:
        result["answers"] = last["answers"]


def compare(outcome: Result) -> None:
    """Compare each side with the references and with the floor.

    `speed_against` and `memory_against` have a ratio for each reference; a reference without a figure is left out.
    `times_floor_seconds` is the time over that of the matrix products alone, `times_floor_bytes` the peak over the
    bytes that must live. Of generated text, `same_tokens` is the share that the first reference generated too.
    """
    done = {side["side"]: side for side in outcome["sides"] if "seconds" in side}
    floor = next((side for side in done.values() if side["program"] == "products"), None)
    references = {name: done[name] for name in outcome["references"] if name in done}
    first: Result = next(iter(references.values()), {})
    for side in done.values():
        if floor:
            side["times_floor_seconds"] = side["median_seconds"] / floor["median_seconds"]
        if side is floor:
            continue
        side["times_floor_bytes"] = side["peak_bytes"] / sum(side["needed_bytes"].values())
        side["speed_against"] = {
            name: side["tokens_per_second"] / other["tokens_per_second"] for name, other in references.items()
        }
        side["memory_against"] = {name: side["peak_bytes"] / other["peak_bytes"] for name, other in references.items()}
        if "answers" in side and "answers" in first:
            pairs = [
                (a, b)
                for x, y in zip(side["answers"], first["answers"], strict=True)
                for a, b in zip(x, y, strict=True)
            ]
            side["same_tokens"] = sum(a == b for a, b in pairs) / len(pairs)
    for side in done.values():
        side.pop("answers", None)


def predict(outcomes: Sequence[Result]) -> None:
    """Predict the seconds of W5 at the speed of the matrix products alone, its bytes as imports + `plan`'s count."""
    growing = [outcome for outcome in outcomes if outcome["workload"] == "W5"]
    floors = [(o, s) for o in growing for s in o["sides"] if s["program"] == "products" and "seconds" in s]
    if not floors:
        return
    outcome, floor = floors[0]
    rate = outcome["product_operations"] / floor["median_seconds"]
    for outcome in growing:
        for side in outcome["sides"]:
            if "seconds" in side and side is not floor:
                side["predicted_seconds"] = outcome["operations"] / rate
                side["predicted_bytes"] = side["imported_bytes"] + outcome["step_bytes"]


def main_job(plan: Setup) -> Result:
    """W4: `python -m minilora.train` without data, in a process of its own, as a user runs it."""
    folder = plan.inputs.scratch / "main-job"
    command = [sys.executable, "-m", "minilora.train", "--out", str(folder), "--device", plan.device]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *plan.size.main_job], capture_output=True, text=True, env=environment(plan.threads)
    )
    seconds = time.perf_counter() - started
    side: Result = {"side": "minilora", "program": "train"}
    outcome: Result = {
        "workload": "W4",
        "title": "the default job, python -m minilora.train on tinysmol",
        "kind": "train",
        "device": plan.device,
        "tokens": 0,
        "references": [],
        "sides": [side],
    }
    if done.returncode:
        side["error"] = (done.stderr.strip().splitlines() or ["ended without a word"])[-1]
        return outcome
    summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    outcome |= {"tokens": summary["tokens"], "summary": summary}
    side |= dict.fromkeys(("median_seconds", "min_seconds", "max_seconds"), seconds)
    side |= {"seconds": [seconds], "tokens_per_second": summary["tokens_per_second"]}
    side |= {"peak_bytes": summary["peak_memory_bytes"], "loss": summary["adapted_loss"]}
    return outcome
