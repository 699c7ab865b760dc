"""Measures a planned step in a process of its own, so that its memory is not mixed with this one's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minilora.figures.machine import facts
from minilora.plan.planned_run import PlannedRun
from minilora.plan.report import size


def measured_in_a_process(flags: Sequence[str], planned: PlannedRun, total: int) -> dict[str, int]:
    """The measurements of `measured_step` for the same flags. A shape without weights gets random ones.

    ValueError if the machine has too little memory.
    """
    machine_bytes = facts(1)["memory_bytes"]
    if machine_bytes and total > 0.9 * machine_bytes:
        raise ValueError(f"--measure: such a step takes {size(total)}, and this machine has {size(machine_bytes)}")
    with tempfile.TemporaryDirectory(prefix="minilora-plan-") as scratch:
        folder = planned.folder or Path(scratch, "model")
        if not planned.folder:
            run_alone("random_checkpoint", planned.name, "--out", str(folder), "--dtype", planned.storage.file)
        measured: dict[str, int] = json.loads(run_alone("plan.measured_step", str(folder), *flags))
    return measured


def run_alone(command: str, *arguments: str) -> str:
    """Run another command in a process of its own, and return the last line that it prints."""
    done = subprocess.run([sys.executable, "-m", f"minilora.{command}", *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word, perhaps for want of memory"])[-1]
        raise RuntimeError(f"--measure: {last.removeprefix('error: ')}")
    return done.stdout.strip().splitlines()[-1]
