"""The frame of every command: a user's mistake ends in one line, not in a traceback."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from minilora.cli.parser import any_terminal
from minilora.runs.stopping import Stopped, ended_by_signals
from minilora.training.ranks import join, launched, world

Command = Callable[[list[str] | None], None]

OUT_OF_MEMORY = (
    "out of memory. What usually helps, in this order: a smaller --batch-size with more --grad-accumulation (the same "
    "training), --activation-checkpointing, a shorter --max-length, --frozen stored (16 bits), "
    "--frozen nf4 (4 bits) or --frozen mapped (left in the file)"
)

MISTAKES = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError)  # those of a user, in one line
PATIENCE = 2.0  # seconds in which the other ranks may fail for the same reason


def run(command: Command, argv: list[str] | None) -> int:
    """Run a command and return its exit status: 0, or 2 after one line on an error that the user can mend.

    A signal gives one line, too, and 128 and its number. MINILORA_DEBUG=1 shows an error's traceback instead.
    """
    any_terminal()
    with ended_by_signals():
        try:
            command(argv)
            sys.stdout.flush()
        except (KeyboardInterrupt, Stopped, *MISTAKES) as error:
            if os.environ.get("MINILORA_DEBUG") and isinstance(error, MISTAKES):
                raise
            if _is_of_output(error):
                drop_output()
            with suppress(OSError):  # the terminal may be gone, or full
                print(in_words(error), file=sys.stderr)
            return status_of(error)
    return 0


def drop_output() -> None:
    """Let standard output lead nowhere: Python would try to write the rest as it ends, and complain once more."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _is_of_output(error: BaseException) -> bool:
    """Whether print could not write. Files that cannot be written are told by their names (formats/whole.py)."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE) and not error.filename


def run_on_ranks(command: Command, argv: list[str] | None) -> int:
    """`run`, on every rank that mpirun or srun has started; without a launcher it is `run`.

    Rank 0 alone prints. An exception of one rank ends all of them within seconds, and its reason is printed once: if
    it is that of all, by rank 0.
    """
    processes, rank = launched()
    if processes == 1:
        return run(command, argv)
    any_terminal()
    heard = sys.stderr
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    ranks = world()
    with ended_by_signals():
        try:
            ranks = join()
            command(argv)
            ranks.meet(math.inf)
        except BaseException as error:
            words, status = in_words(error), status_of(error)
            if rank == 0 and words:
                sys.stdout.flush()  # what was printed before would be lost with the process
                print(words, file=heard, flush=True)
            if not ranks.meet(PATIENCE):
                if rank > 0:
                    print(f"rank {rank}: {words}", file=heard, flush=True)
                ranks.abort(status)
            return status
    return 0


def in_words(error: BaseException) -> str:
    """One line on a mistake that the user can mend, the whole traceback of any other error."""
    if isinstance(error, SystemExit):
        return str(error.code) if isinstance(error.code, str) else ""
    if isinstance(error, KeyboardInterrupt):
        return "\ninterrupted"
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, OSError) and _is_of_output(error):
        return f"error: standard output cannot be written ({error.strerror})"
    if isinstance(error, MISTAKES) and not os.environ.get("MINILORA_DEBUG"):
        return f"error: {OUT_OF_MEMORY if is_out_of_memory(error) else error}"
    return "".join(traceback.format_exception(error))


def status_of(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT)  # as a shell has it
    if isinstance(error, Stopped):
        return 128 + error.number
    return 2 if isinstance(error, MISTAKES) else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU ran out of memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the second is CuPy's
