"""A signal outside the training loop ends a command with one line and the code of a shell, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import REPOSITORY, RUN_FILES, good, hear_interrupts

from minilora.runs.stopping import SIGNALS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

SENDS = """
import importlib, os, sys
from support.commands import command_module
command, place, number, *flags = sys.argv[1:]
main = command_module(command).main
module, _, name = place.rpartition(".")
module = importlib.import_module(module)
function = getattr(module, name)
def at_this_moment(*given, **options):
    setattr(module, name, function)
    os.kill(os.getpid(), int(number))
    return function(*given, **options)
setattr(module, name, at_this_moment)
sys.exit(main(flags))
"""
TRAINING = {  # the moment and the function that begins then, on the way to training and after it
    "the model is read": "minilora.runs.run.load_model",
    "the rows are encoded": "minilora.runs.task.encode_rows",
    "the first state is saved": "minilora.formats.whole.to_disk",
    "held-out rows are judged": "minilora.runs.run.mean_loss",
    "held-out rows are answered": "minilora.runs.run.answers",
    "drift is measured": "minilora.runs.run.drift",
    "the page is written": "minilora.train.write_page",
}
BEFORE_A_STATE = [*TRAINING.values()][:3]
OTHERS = {  # the command and the function in which the signal comes
    "evaluate": "minilora.evaluate.load_adapter",
    "generate": "minilora.generate.room",
    "chat": "minilora.chat.load",
    "merge": "minilora.merge.save_tokenizer_files",
    "combine": "minilora.formats.whole.to_disk",
    "convert": "minilora.formats.whole.to_disk",
    "random_checkpoint": "minilora.formats.whole.to_disk",
    "rows.docstrings": "minilora.formats.whole.to_disk",
    "plan": "minilora.plan.measurement.run_alone",
    "pretrain": "minilora.pretrain.__main__.python_split",
}


def signalled(
    number: int, place: str, folder: Path, command: str, *flags: object
) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """The command, which gets the signal as it calls the function `place`, and the temporary files that it leaves."""
    temporary = folder / "temporary"
    temporary.mkdir()
    argv = [sys.executable, "-c", SENDS, command, place, str(int(number)), *map(str, flags)]
    paths = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])
    ended = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=hear_interrupts,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": paths},
        timeout=120,
    )
    return ended, [path for path in temporary.iterdir() if "minilora" in path.name]


def assert_obeyed(ended: subprocess.CompletedProcess[str], number: signal.Signals) -> None:
    line = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}; no file is left half-written"
    assert ended.returncode == 128 + number, ended.stderr
    assert ended.stderr.splitlines()[-1] == line and "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("place", TRAINING.values(), ids=TRAINING)
def test_a_signal_before_and_after_training_ends_the_run_and_a_state_that_is_saved_is_told(
    number: signal.Signals, place: str, model: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--model", model, "--data", data / "pairs.jsonl", "--steps", 2, "--eval-rows", 2]
    ended, left = signalled(number, place, tmp_path, "train", *flags, "--out", run)
    assert_obeyed(ended, number)
    assert not left
    assert not run.exists() or {path.name for path in run.iterdir()} <= RUN_FILES
    begun = (run / "settings.json").exists()
    assert begun == (f"stopped at once; go on with: python -m minilora.train --resume {run}" in ended.stdout)
    assert begun == (place not in BEFORE_A_STATE)
    good("train", *(["--resume", run] if begun else [*flags, "--out", run]))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("command", OTHERS)
def test_a_signal_to_any_other_command_ends_it_and_leaves_nothing(
    number: signal.Signals, command: str, model: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "out", ["--model", model]
    flags = {
        "evaluate": [*base, "--adapter", adapter, "--data", data / "pairs.jsonl"],
        "generate": [*base, "--prompt", "up"],
        "chat": base,
        "merge": [*base, "--adapter", adapter, "--out", out],
        "combine": [*base, "--adapter", adapter, "--adapter", f"twin={adapter}", "--out", out],
        "convert": [*base, "--adapter", adapter, "--format", "mlx", "--out", out],
        "random_checkpoint": [model / "config.json", "--tokenizer", model, "--out", out],
        "rows.docstrings": ["--out", out],
        "plan": [*base, "--measure"],
        "pretrain": ["--out", out, "--run", tmp_path / "run"],
    }[command]
    ended, left = signalled(number, OTHERS[command], tmp_path, command, *flags)
    assert_obeyed(ended, number)
    assert not left and not [path for path in tmp_path.rglob(".*") if path.suffix in (".partial", ".lock")]
    assert not out.exists() or not [*out.iterdir()]


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGINT])
def test_a_signal_that_is_ignored_as_under_nohup_ends_nothing(
    number: signal.Signals, model: Path, tmp_path: Path
) -> None:
    before = f"import signal\nsignal.signal({int(number)}, signal.SIG_IGN)\n"
    argv = ["generate", "minilora.generate.room", str(int(number)), "--model", str(model), "--prompt", "up"]
    paths = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])
    ended = subprocess.run(
        [sys.executable, "-c", before + SENDS, *argv], capture_output=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert ended.returncode == 0, ended.stderr
