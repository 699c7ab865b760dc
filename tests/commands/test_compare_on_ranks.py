"""The trials of a comparison run at once on several ranks, and lead to what they lead to one after the other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import PAIRS, read, write_rows
from support.on_ranks import needs_mpi, on_ranks

from minilora.compare.rivals import LORA
from minilora.compare.trials import Trial, next_trial, open_trials

# `python -c PROGRAM CHANGE FLAGS` is compare with two rates a method, in which a rank does what CHANGE says.
COMPARE = """
import os, signal, sys, time
from minilora.cli.errors import run_on_ranks
from minilora.compare import __main__ as command, latency, rivals, trials
from minilora.training.ranks import launched
rivals.RIVALS = tuple(rival._replace(rates=rival.rates[:2]) for rival in rivals.RIVALS)
latency.REPEATS = trials.MOST_RATES = 1
exec(sys.argv.pop(1))
sys.exit(run_on_ranks(command.compare_command, None))
"""
DIES = f"""
done = trials.Field.run
def dies(field, trial):
    summary = done(field, trial)
    if launched()[1] == 1:
        os.kill(os.getpid(), {signal.SIGKILL.value})
    return summary
trials.Field.run = dies
"""
NO_TRIAL = "trials.watch = None"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), st.randoms())
def test_in_whatever_order_open_trials_end_they_are_those_of_a_search_one_after_the_other(
    seeds: list[int], random: Any
) -> None:
    def summary(trial: Trial) -> dict[str, Any]:
        return {"best_valid_loss": abs(trial.rate - 0.1)}

    one_by_one: dict[Trial, Any] = {}
    while trial := next_trial(LORA, seeds, one_by_one):
        one_by_one[trial] = summary(trial)
    at_once: dict[Trial, Any] = {}
    while trials := open_trials(LORA, seeds, at_once):
        assert not at_once.keys() & set(trials)
        ended = random.choice(trials)
        at_once[ended] = summary(ended)
    assert at_once == one_by_one
    assert len(open_trials(LORA, seeds, {})) == len(LORA.rates) > 1


def figures(folder: Path) -> list[dict[str, Any]]:
    names = ("method", "rates", "valid_losses", "best_rate", "loss", "exact_match", "drift_kl", "base_loss")
    found = read(folder / "comparison.json")
    return [{name: one.get(name) for name in names} for group in ("methods", "ranks") for one in found[group]]


@needs_mpi
def test_a_comparison_that_lost_a_rank_goes_on_with_any_number_of_ranks_to_the_same_figures(
    model: Path, tmp_path: Path
) -> None:
    for part in ("train", "valid", "test"):
        write_rows(tmp_path / "data" / f"{part}.jsonl", 2 * PAIRS)
    flags: list[object] = ["--methods", "lora,bitfit,few-shot", "--ranks", 2, "--model", model, "--seeds", "0,1"]
    flags += ["--data", tmp_path / "data", "--steps", 6, "--batch-size", 2, "--eval-rows", 2]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    code, _, _ = on_ranks(3, ["-c", COMPARE, DIES, *flags, "--out", cut])
    assert code != 0 and not (cut / "comparison.json").exists()
    done = sorted(path.parent.name for path in cut.glob("trials/*/summary.json"))
    assert 0 < len(done) < 11
    code, out, err = on_ranks(2, ["-c", COMPARE, "", *flags, "--out", cut])
    assert code == 0 and out.count("What the methods are worth") == 1, err
    code, _, err = on_ranks(1, ["-c", COMPARE, "", *flags, "--out", whole])
    assert code == 0, err
    assert figures(cut) == figures(whole)
    assert {p.name for p in cut.glob("trials/*")} == {p.name for p in whole.glob("trials/*")}
    code, _, err = on_ranks(3, ["-c", COMPARE, NO_TRIAL, *flags, "--out", cut])
    assert code == 0, f"what is done is not done again: {err}"


@needs_mpi
def test_a_trial_that_cannot_run_ends_the_comparison_and_is_told_once(model: Path, tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        write_rows(tmp_path / "data" / f"{part}.jsonl", PAIRS)
    flags = ["--model", model, "--data", tmp_path / "data", "--steps", 2, "--eval-rows", 0, "--out", tmp_path / "out"]
    code, _, err = on_ranks(3, ["-c", COMPARE, "", "--methods", "bitfit", *flags])
    assert code == 0, err
    (tmp_path / "out" / "trials" / "lora-0.01-0").mkdir()
    (tmp_path / "out" / "trials" / "lora-0.01-0" / "mine.txt").write_text("not a run's")
    code, _, err = on_ranks(3, ["-c", COMPARE, "", "--methods", "lora", *flags])
    assert code == 2 and err.count("error: lora-0.01-0: ") == 1 and "holds files that are not a run's" in err


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mistake_is_told_once(ranks: int, tmp_path: Path) -> None:
    code, out, err = on_ranks(ranks, ["-m", "minilora.compare", "--methods", "lara", "--out", tmp_path / "out"])
    assert code == 2 and out == "" and err.startswith("error: --methods lara") and err.count("error: ") == 1
