"""The frame of every command: a user's mistake ends in one line, not in a traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from minilora.parser import any_terminal

OUT_OF_MEMORY = (
    "out of memory. What usually helps, in this order: a smaller --batch-size with more --grad-accumulation (the same "
    "training), --activation-checkpointing, a shorter --max-length, --frozen stored (16 bits), "
    "--frozen nf4 (4 bits) or --frozen mapped (left in the file)"
)


def run(command: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Run a command and return its exit status: 0, or 2 after one line on an error that the user can mend.

    MINILORA_DEBUG=1 shows the traceback instead of the line.
    """
    any_terminal()
    try:
        command(argv)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        with suppress(OSError):  # the terminal may be gone
            print("\ninterrupted", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)  # as a shell has it
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        if os.environ.get("MINILORA_DEBUG"):
            raise
        reason = OUT_OF_MEMORY if is_out_of_memory(error) else str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE) and not error.filename:
            # Files that cannot be written are told by their names (formats/whole.py), so this is print's.
            reason = f"standard output cannot be written ({error.strerror})"
            drop_output()
        with suppress(OSError):  # standard error may be full or closed, too
            print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


def drop_output() -> None:
    """Let standard output lead nowhere: Python would try to write the rest as it ends, and complain once more."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or the GPU ran out of memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the second is CuPy's
