"""Trials at once, one on each rank but the first, which hands them out.

They leave their folders, as all trials do. After them the comparison finds every trial done, and only reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minilora.backend import cores
from minilora.compare.rivals import Rival
from minilora.compare.trials import Field, Summary, Trial, open_trials, steps_done
from minilora.training.ranks import Ranks


class Competition(NamedTuple):
    """A rival, the seeds that it runs with, and the setting in which it competes."""

    field: Field
    rival: Rival
    seeds: Sequence[int]


@contextmanager
def workers(ranks: Ranks) -> Iterator[Executor | None]:
    """On rank 0 an executor whose calls run on the other ranks; None on these, after the last call; and None alone.

    An exception does not wait for the calls that are under way: the frame of the command ends all ranks, and with a
    rank ends its trial.
    """
    if ranks.size == 1:
        yield None
        return
    from mpi4py.futures import MPICommExecutor

    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(cores()))  # the trials do not know how many they are
    pool: Any = MPICommExecutor(ranks.comm, root=0)
    yield pool.__enter__()
    pool.__exit__(None, None, None)


def run_at_once(executor: Executor, competitions: Sequence[Competition], bar: tqdm[Any]) -> None:
    """Run all trials that are not done yet. Each rival's trials are those that it would run alone."""
    done: list[dict[Trial, Summary]] = [{} for _ in competitions]
    running: dict[Future[Summary], tuple[int, Trial]] = {}
    handed_out: set[Path] = set()  # by folder: two competitions may share a trial
    while True:
        for i, (field, rival, seeds) in enumerate(competitions):
            for trial in open_trials(rival, seeds, done[i]):
                if field.folder(trial) not in handed_out:
                    handed_out.add(field.folder(trial))
                    given = field.out, field.shared, field.evaluated, field.steps, trial
                    running[executor.submit(run_trial, *given)] = i, trial
        if not running:
            return
        for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
            i, trial = running.pop(future)
            done[i][trial] = future.result()
        steps = sum(field.steps for i, (field, *_) in enumerate(competitions) for trial in done[i] if trial.rate)
        steps += sum(steps_done(competitions[i].field.folder(trial)) for i, trial in running.values())
        bar.total = max(bar.total or 0, steps)
        bar.update(steps - bar.n)


def run_trial(out: Path, shared: Sequence[str], evaluated: Sequence[str], steps: int, trial: Trial) -> Summary:
    """`Field.run`, on another rank and without a bar."""
    return Field(out, shared, evaluated, steps, tqdm(disable=True)).run(trial)
