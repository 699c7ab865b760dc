"""A command on so many ranks of so many threads each, and the memory of its processes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from minilora.benchmark.worker import environment
from minilora.training.ranks import without_launcher

LOOK_EVERY = 0.05  # seconds, at the memory


class Way(NamedTuple):
    ranks: int
    threads: int  # of each
    frozen: str = "widened"

    def __str__(self) -> str:
        return f"{self.ranks} × {self.threads}, {self.frozen}"

    @property
    def products(self) -> tuple[int, bool]:
        """Ways with equal ones compute the same numbers: `mapped` multiplies the slices that `stored` does."""
        return self.threads, self.frozen == "widened"


def started(way: Way, module_and_flags: Sequence[str]) -> tuple[str, list[int]]:
    """What `python -m …` prints on so many ranks, and the most private memory of each process, in bytes.

    RuntimeError, with its last line, if it fails.
    """
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    mpiexec = shutil.which("mpiexec", path=beside)
    if way.ranks > 1 and mpiexec is None:
        raise ValueError("there is no mpiexec: pip install 'minilora[mpi]' mpich")
    launcher = [str(mpiexec), "-n", str(way.ranks)] if way.ranks > 1 else []
    try:
        import psutil
    except ImportError:
        raise ValueError("the memory of processes is read by psutil: pip install 'minilora[peers]'") from None
    command = [*launcher, sys.executable, "-m", *module_and_flags]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        process = psutil.Popen(
            command, env=without_launcher(environment(way.threads)), stdout=said, stderr=complaints, text=True
        )
        peaks = private_peaks(process, way.ranks)
        said.seek(0)
        complaints.seek(0)
        if process.returncode:
            last = (complaints.read().strip().splitlines() or ["failed"])[-1]
            raise RuntimeError(f"{' '.join(command)}: {last}")
        return said.read(), peaks


def private_peaks(process: Any, ranks: int) -> list[int]:
    """Wait for the process; the most private memory of each rank in it: resident, less the pages of files.

    The ranks are those Python processes that are there the longest: a rank that starts a command is two for a moment.
    """
    import psutil

    seen: dict[int, list[int]] = defaultdict(list)
    while True:
        try:
            process.wait(LOOK_EVERY)
            longest = sorted(seen, key=lambda pid: len(seen[pid]))[-ranks:]
            return [max(of_process) for pid, of_process in seen.items() if pid in longest]
        except psutil.TimeoutExpired:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                for one in [process, *process.children(recursive=True)]:
                    if one.name().startswith("python"):
                        memory = one.memory_info()
                        seen[one.pid].append(memory.rss - memory.shared)
