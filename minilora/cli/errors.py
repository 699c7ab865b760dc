"""The frame of every command: a user's mistake ends in one line, not in a traceback."""

from __future__ import annotations

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
    except KeyboardInterrupt as error:
        with suppress(OSError):  # the terminal may be gone
            print("\ninterrupted", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)  # as a shell has it
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        if os.environ.get("MINILORA_DEBUG"):
            raise
        print(f"error: {OUT_OF_MEMORY if is_out_of_memory(error) else error}", file=sys.stderr)
        return 2
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or the GPU ran out of memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the second is CuPy's
