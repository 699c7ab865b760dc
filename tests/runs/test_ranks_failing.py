"""Whatever ends one rank ends all, in seconds and with its reason; nothing is half-written, and the run goes on."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
from support.commands import ADAPTER, CONFIG, PAIRS, RUN_FILES, write_rows
from support.on_ranks import is_open_mpi, needs_mpi, on_ranks, start, train

from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.model.config import Config

# `python -c PROGRAM FLAGS` is train, in which one rank does something else.
TRAIN = """
import os, sys, time
from minilora import train as command
from minilora.cli.errors import run_on_ranks
from minilora.runs import folder, run
from minilora.training import loop
from minilora.training.ranks import world
take_step = loop.take_step
{change}
sys.exit(run_on_ranks(command.train_command, None))
"""
AT_STEP_3 = """
def fails(model, state, *rest):
    if world().rank == {rank} and state.step == 2:
        {what}
    return take_step(model, state, *rest)
loop.take_step = fails
"""
PATIENCE = 30  # seconds, on a busy machine; waiting for ever is what must not happen


@pytest.fixture
def flags(model: Path, data: Path) -> list[object]:
    steps = ("--steps", 4, "--batch-size", 2, "--grad-accumulation", 2, "--save-every", 1, "--eval-rows", 0)
    return ["--model", model, "--data", data / "parts", *steps]


def changed(ranks: int, change: str, *flags: object) -> tuple[int, str, str]:
    return on_ranks(ranks, ["-c", TRAIN.format(change=change), *flags])


def assert_goes_on(cut: Path, flags: list[object], whole: Path) -> None:
    """Nothing in the folder is half-written, and the run ends with the bytes of one that was never cut off."""
    assert {path.name for path in cut.iterdir() if not path.name.startswith(".")} <= RUN_FILES
    assert not (cut / "summary.json").exists()
    for ranks, argv in ((2, ("--resume", cut)), (1, (*flags, "--out", whole))):
        code, _, err = train(ranks, *argv)
        assert code == 0, err
    assert (cut / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", ["ValueError", "LookupError"])
def test_an_exception_of_one_rank_ends_all_and_its_reason_is_printed_once(
    rank: int, error: str, flags: list[object], tmp_path: Path
) -> None:
    started = time.perf_counter()
    change = AT_STEP_3.format(rank=rank, what=f"raise {error}('the disk is on fire')")
    code, _, err = changed(2, change, *flags, "--out", tmp_path / "cut")
    assert code == {"ValueError": 2, "LookupError": 1}[error]
    reasons = [line for line in err.splitlines() if line.endswith("the disk is on fire")]
    assert len(reasons) == 1 and ("Traceback" in err) == (error == "LookupError")
    if error == "ValueError":
        assert reasons[0].endswith(f"{'rank 1: ' if rank else ''}error: the disk is on fire")
    assert time.perf_counter() - started < PATIENCE
    assert_goes_on(tmp_path / "cut", flags, tmp_path / "whole")


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_of_one_rank_ends_all(rank: int, flags: list[object], tmp_path: Path) -> None:
    started = time.perf_counter()
    change = AT_STEP_3.format(rank=rank, what=f"os.kill(os.getpid(), {signal.SIGKILL.value})")
    code, _, _ = changed(2, change, *flags, "--out", tmp_path / "cut")
    assert code != 0
    assert time.perf_counter() - started < PATIENCE
    assert_goes_on(tmp_path / "cut", flags, tmp_path / "whole")


@needs_mpi
def test_a_signal_to_one_rank_stops_all_after_the_same_step(flags: list[object], tmp_path: Path) -> None:
    change = AT_STEP_3.format(rank=1, what=f"os.kill(os.getpid(), {signal.SIGTERM.value})")
    code, out, err = changed(3, change, *flags, "--out", tmp_path / "cut")
    assert code == 143 and "stopped after step 3, which is saved" in out, err
    assert err.count("error") == 0
    assert_goes_on(tmp_path / "cut", flags, tmp_path / "whole")


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_before_training_ends_all_with_one_line(
    rank: int, flags: list[object], tmp_path: Path
) -> None:
    change = f"""
load_model = run.load_model
def signalled(*given, **options):
    if world().rank == {rank}:
        os.kill(os.getpid(), {signal.SIGTERM.value})
    return load_model(*given, **options)
run.load_model = signalled
"""
    code, _, err = changed(2, change, *flags, "--out", tmp_path / "cut")
    assert code == 143 and not (tmp_path / "cut").exists()
    assert err.count("stopped by SIGTERM; no file is left half-written") == 1 and "Traceback" not in err, err


@needs_mpi
def test_a_signal_to_the_launcher_saves_the_state(flags: list[object], tmp_path: Path) -> None:
    if is_open_mpi():
        pytest.skip("Open MPI's mpirun passes no SIGTERM on: it ends its ranks")
    endless = [*flags, "--steps", 100_000, "--save-every", 0, "--out", tmp_path / "cut"]
    process = start(2, ["-m", "minilora.train", *endless])
    while process.poll() is None and not (tmp_path / "cut" / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "which is saved" in out, err


@needs_mpi
def test_a_mistake_that_all_ranks_see_is_told_once_and_minilora_prints_nothing_else(
    flags: list[object], tmp_path: Path
) -> None:
    for mistake in (("--no-such-flag",), ("--steps", -1), ("--data", tmp_path / "nowhere")):
        code, out, err = train(3, *flags, *mistake, "--out", tmp_path / "run")
        assert code == 2 and not (tmp_path / "run").exists()
        assert out == "" and err.startswith("error: ") and err.count("error: ") == 1, err
        assert is_open_mpi() or err.count("\n") == 1, "Open MPI's launcher adds a paragraph of its own"
    code, out, _ = train(2, "--help")
    assert code == 0 and out.count("usage:") == 1


@needs_mpi
def test_a_run_that_diverges_tells_it_once(flags: list[object], tmp_path: Path) -> None:
    wild = ("--learning-rate", 1e30, "--max-grad-norm", 0, "--optimizer", "sgd", "--warmup", 0)
    code, _, err = train(2, *flags, *wild, "--out", tmp_path / "run")
    assert code == 2 and err.count("error: ") == 1 and "Training stopped" in err


@needs_mpi
@pytest.mark.parametrize("what", ["data", "base model", "settings"])
def test_ranks_that_disagree_refuse_to_start(what: str, model: Path, flags: list[object], tmp_path: Path) -> None:
    write_rows(tmp_path / "other.jsonl", PAIRS)
    shutil.copytree(model, tmp_path / "base")
    write_checkpoint(tmp_path / "base", CONFIG, random_weights(Config.from_dict(CONFIG), seed=1), "bfloat16")
    other = {
        "data": ("--data", tmp_path / "other.jsonl"),
        "base model": ("--model", tmp_path / "base"),
        "settings": ("--learning-rate", 0.125),
    }[what]
    words = [str(word) for word in other]
    change = f"if int(os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK', 0))) == 1: sys.argv += {words}"
    code, out, err = changed(2, change, *flags, "--out", tmp_path / "run")
    assert code == 2 and out == ""
    assert err.count("error: ") == 1 and f"rank 1 has other {what} than rank 0" in err, err
    assert what != "settings" or "learning_rate 0.0005 here and 0.125 there" in err
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_ranks_whose_parameters_differ_do_not_save_them(flags: list[object], tmp_path: Path) -> None:
    change = AT_STEP_3.format(rank=1, what="next(iter(state.trainable.values()))[0] *= 1 + 1e-6")
    code, _, err = changed(2, change, *flags, "--out", tmp_path / "cut")
    assert code == 2 and err.count("error: ") == 1 and "the ranks hold different parameters" in err
    assert_goes_on(tmp_path / "cut", flags, tmp_path / "whole")


@needs_mpi
@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_that_started_single_processes_is_found_out(
    variable: str, flags: list[object], tmp_path: Path
) -> None:
    code, _, err = train(1, *flags, "--out", tmp_path / "run", **{variable: "4"})
    assert code == 2 and "4 processes were started, but MPI sees 1" in err and "srun --mpi=" in err
    assert not (tmp_path / "run").exists()


def test_without_mpi4py_processes_that_a_launcher_has_started_are_refused(flags: list[object], tmp_path: Path) -> None:
    change = "sys.modules['mpi4py'] = None"
    environment = {"OMPI_COMM_WORLD_SIZE": "2"}
    argv = ["-c", TRAIN.format(change=change), *flags, "--out", tmp_path / "run"]
    for rank in ("0", "1"):
        code, out, err = on_ranks(1, argv, **environment, OMPI_COMM_WORLD_RANK=rank)
        assert code == 2 and out == ""
        assert ("pip install 'minilora[mpi]'" in err) == (rank == "0") and err.count("\n") == int(rank == "0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [{}, {"PMI_SIZE": "1"}, {"SLURM_NTASKS": "4"}], ids=str)
def test_one_process_imports_nothing_of_mpi(variables: dict[str, str], flags: list[object], tmp_path: Path) -> None:
    program = "import sys\nfrom minilora.train import main\nassert main() == 0\nassert 'mpi4py' not in sys.modules"
    code, _, err = on_ranks(1, ["-c", program, *flags, "--out", tmp_path / "run"], **variables)
    assert code == 0, err
    assert (tmp_path / "run" / ADAPTER).exists()
