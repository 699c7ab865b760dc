"""Ctrl-C, SIGTERM and SIGHUP end training after the step under way, whose state is saved; a second one, at once.

Elsewhere they end a command by an exception, so that whatever it was writing is cleared away.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from minilora.training.ranks import world

Handler = Callable[[int, FrameType | None], None]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """A function that gives the number of the signal that asks to stop, or 0.

    Signals that are ignored stay so: nohup means it. Outside the main thread, which alone has signals, it gives 0.
    A signal to one rank of several stops all after the same step, so each has to ask at the same time.
    """
    asked = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        restore(before)  # so that a second one acts as ever
        if not world().is_first:
            return
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    before = install(on_signal, SIGNALS)
    try:
        yield lambda: max(world().gather(asked))
    finally:
        restore(before)


class Stopped(BaseException):
    """A signal ends the command. It is no KeyboardInterrupt, which in `chat` ends an answer only."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; no file is left half-written")
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped, as Ctrl-C raises KeyboardInterrupt, where Python would end on the spot."""
    last = -math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > 1:  # `timeout` sends two, and the second would cut off the clearing away
            raise Stopped(number)

    before = install(on_signal, [number for number in SIGNALS if number != signal.SIGINT])
    try:
        yield
    finally:
        restore(before)


def install(handler: Handler, numbers: Iterable[int]) -> dict[int, Any]:
    """Let `handler` have the signals that are not ignored, if this is the main thread; the handlers before it."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
