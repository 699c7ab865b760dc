"""Ctrl-C, SIGTERM and SIGHUP end training after the step under way, whose state is saved; a second one, at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from minilora.training.ranks import world

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """A function that gives the number of the signal that asks to stop, or 0.

    Signals that are ignored stay so: nohup means it. Outside the main thread, which alone has signals, it gives 0.
    A signal to one rank of several stops all after the same step, so each has to ask at the same time.
    """
    asked, before = 0, dict[int, Any]()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        restore()  # so that a second one acts as ever
        if not world().is_first:
            return
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, on_signal)
    try:
        yield lambda: max(world().gather(asked))
    finally:
        restore()
