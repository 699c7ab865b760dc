"""A measured side: a process that loads once and then computes only on command.

The measuring process writes one line of JSON, the worker answers with one line. Between commands a worker waits in a
read and takes no processor time, so that several can stay loaded and be measured in turns. Its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from minilora.benchmark.job import Figures, Job


class Work(Protocol):
    """A loaded job."""

    def warm_up(self) -> None:
        """Do a little of the work, so that one-time costs are not measured."""

    def reset(self) -> None:
        """Restore, untimed, the state that every run must start from."""

    def run(self) -> Figures:
        """Do the work, timed. Returns when the device, too, has finished."""

    def judge(self) -> Figures:
        """Judge the outcome of a run, untimed."""


def serve(load: Callable[[Job], Work], peak_bytes: Callable[[], int]) -> None:
    """Answer commands from standard input until it ends: "load" with a job, "warm_up", "measure"."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not come between the answers
    work: Work | None = None
    for line in sys.stdin:
        command = json.loads(line)
        reply: Figures = {}
        if command["do"] == "load":
            reply["imported_bytes"] = peak_bytes()
            work = load(Job(**command["job"]))
            reply["loaded_bytes"] = peak_bytes()
        elif command["do"] == "warm_up":
            assert work is not None
            work.warm_up()
        else:
            assert work is not None
            work.reset()
            started = time.perf_counter()
            figures = work.run()
            reply["seconds"] = time.perf_counter() - started
            reply |= figures | {"peak_bytes": peak_bytes()} | work.judge()
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def environment(threads: int) -> dict[str, str]:
    """The environment of a process that computes with this number of threads, whichever library it is built on."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return os.environ | dict.fromkeys(names, str(threads)) | quiet


class WorkerError(RuntimeError):
    """A worker has ended before it answered. The message is its last line of output."""


class Worker:
    """The measuring process's end of a worker."""

    def __init__(self, program: str, threads: int) -> None:
        """Start `python -m minilora.benchmark.PROGRAM`."""
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"minilora.benchmark.{program}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(threads),
        )

    def tell(self, do: str, job: Job | None = None) -> None:
        """Give a command, without waiting."""
        assert self.process.stdin is not None
        command: dict[str, Any] = {"do": do} | ({"job": asdict(job)} if job else {})
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` raises the reason

    def answer(self) -> Figures:
        """Wait for the answer to the last command. Raises WorkerError."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        figures: Figures = json.loads(line)
        return figures

    def ask(self, do: str) -> Figures:
        self.tell(do)
        return self.answer()

    def close(self) -> None:
        """End the process, which holds nothing that must be saved."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass

    def _last_words(self) -> str:
        code = self.process.wait()
        if code == -9:
            return "killed by the system, most likely for want of memory"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with status {code}"
