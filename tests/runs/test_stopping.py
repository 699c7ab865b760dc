"""A signal ends training after the step under way, whose state is saved: a run is stopped, and goes on, at any step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import ADAPTER, RUN_FILES, good, hear_interrupts, process, run
from support.small_runs import PLAN, ROWS, VALID, few, new_run, no_progress_bars, outcome, trained  # noqa: F401

from minilora.runs.folder import train_in
from minilora.runs.stopping import SIGNALS, stopping

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")


@few
@given(step=st.integers(0, PLAN.steps), dropout=st.sampled_from([0.0, 0.3]))
def test_stopped_after_any_step_and_gone_on_with_a_run_is_the_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, step: int, dropout: float
) -> None:
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    expected = outcome(trained(whole, dropout=dropout), whole)
    model, state = new_run(dropout=dropout)
    with pytest.raises(KeyboardInterrupt) as caught:
        train_in(cut, model, state, ROWS, VALID, PLAN, stop=lambda: 15 if state.step >= step else 0)
    assert caught.value.args == (15,) and state.step == step
    assert outcome(trained(cut, dropout=dropout), cut) == expected


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_noted_and_the_second_acts_as_ever(number: signal.Signals) -> None:
    program = f"""
import os, signal
from minilora.runs.stopping import stopping
with stopping() as stop:
    assert stop() == 0
    os.kill(os.getpid(), {number.value})
    assert stop() == {number.value}
    print("still here", flush=True)
    os.kill(os.getpid(), {number.value})
    print("never here")
"""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=hear_interrupts)
    assert found.stdout == "still here\n" and found.returncode in (-number, 130, 1)
    assert "once more stops at once" in found.stderr


def test_signals_that_are_ignored_stay_ignored_and_all_are_as_before_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() == 0
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_the_state_says_how_to_go_on_and_ends_with_its_own_code(
    number: signal.Signals, model: Path, data: Path, tmp_path: Path
) -> None:
    """Without saving in between, all steps before the signal would be lost but for this."""
    flags = ["--model", model, "--data", data / "pairs.jsonl", "--save-every", 0, "--eval-rows", 0, "--steps", 100_000]
    cut = tmp_path / "cut"
    child = process("train", *flags, "--out", cut)
    while child.poll() is None and not (cut / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    child.send_signal(number)
    out, err = child.communicate()
    assert child.returncode == 128 + number, err
    steps = (cut / "metrics.jsonl").read_text().count('"loss"')
    assert f"stopped after step {steps}, which is saved; go on with: python -m minilora.train --resume {cut}" in out
    assert "Traceback" not in err and {path.name for path in cut.iterdir()} <= RUN_FILES
    assert f"{steps} of them done" in _resumed_and_stopped(cut)


def _resumed_and_stopped(folder: Path) -> str:
    child = process("train", "--resume", folder)
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if "before training" in line:
            break
    child.kill()
    child.communicate()
    return "".join(lines)


def test_a_run_that_was_stopped_before_its_first_step_goes_on_by_either_command(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    flags = ["--model", model, "--data", data / "pairs.jsonl", "--steps", 2, "--eval-rows", 0, "--out"]
    good("train", *flags, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("minilora.train.judge", interrupted)
        assert run("train", *flags, tmp_path / "judging").code == 130
        patch.setattr("minilora.runs.settings.Settings.save", interrupted)
        assert run("train", *flags, tmp_path / "beginning").code == 130
    good("train", "--resume", tmp_path / "judging")
    good("train", *flags, tmp_path / "beginning")
    for name in ("judging", "beginning"):
        assert (tmp_path / name / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
