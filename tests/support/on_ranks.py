"""Runs of `train` on several ranks, really started by an `mpiexec`; skipped with the reason where there is none."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from support.commands import REPOSITORY, hear_interrupts

from minilora.runs.metrics import read_metrics
from minilora.runs.state_file import STATE_FILE

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpiexec or no mpi4py: pip install mpi4py mpich",
)
OPEN_MPI = {  # as root, and on fewer cores than ranks
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def is_open_mpi() -> bool:
    """Open MPI's launcher ends its ranks at once on a signal; MPICH's passes it on."""
    return "Open MPI" in subprocess.run([str(MPIEXEC), "--version"], capture_output=True, text=True).stdout


MANY_RUNS = """
import json, os, sys
from minilora.train import train_command
from minilora.training.ranks import join
if join().rank > 0:
    sys.stdout = sys.stderr = open(os.devnull, "w")
for flags in json.load(open(sys.argv[1])):
    train_command(flags)
"""


def start(ranks: int, argv: Sequence[object], threads: int = 1, **variables: str) -> subprocess.Popen[str]:
    """`python ARGV` on so many ranks, each with so many threads, 0: as many as it finds; 1 rank is a plain process."""
    launcher = [] if ranks == 1 else [str(MPIEXEC), "-n", str(ranks)]
    number = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    hears: dict[str, Any] = {} if os.name == "nt" else {"preexec_fn": hear_interrupts}
    return subprocess.Popen(
        [*launcher, sys.executable, *map(str, argv)],
        cwd=REPOSITORY,
        env={**environment, **OPEN_MPI, **(number if threads else {}), **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **hears,
    )


def on_ranks(ranks: int, argv: Sequence[object], threads: int = 1, **variables: str) -> tuple[int, str, str]:
    """The exit code and what was printed. It may not take longer than a minute or two: nobody waits for ever."""
    process = start(ranks, argv, threads, **variables)
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    return process.returncode, out, err


def train(ranks: int, *flags: object, threads: int = 1, **variables: str) -> tuple[int, str, str]:
    return on_ranks(ranks, ["-m", "minilora.train", *flags], threads, **variables)


def many_runs(
    ranks: int, folder: Path, cases: Mapping[str, Sequence[object]], threads: int = 1
) -> dict[str, dict[str, Any]]:
    """What each run leaves, by its name. One start serves them all."""
    folder.mkdir()
    flags = [[*map(str, case), "--out", str(folder / name)] for name, case in cases.items()]
    (folder / "flags.json").write_text(json.dumps(flags))
    code, _, err = on_ranks(ranks, ["-c", MANY_RUNS, folder / "flags.json"], threads)
    assert code == 0, err
    return {name: left_in(folder / name) for name in cases}


def left_in(folder: Path) -> dict[str, Any]:
    """All that a run leaves, to the last bit, except for how long it took and how much memory."""
    machine = ("seconds", "training_seconds", "tokens_per_second", "peak_memory_bytes", "ranks")
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "weights": {path.name: path.read_bytes() for path in folder.glob("*model.safetensors")},
        "state": {name: array.tobytes() for name, array in load_file(folder / STATE_FILE).items()},
        "summary": {name: value for name, value in summary.items() if name not in machine},
        "metrics": [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder)],
        "files": sorted(path.name for path in folder.iterdir()),
    }
