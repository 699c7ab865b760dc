"""A command in a process of its own that is killed, or whose disk is full, at the k-th operation below a folder.

Operations are those that Python tells its audit hooks of, opening to write, renaming, removing, making folders and
copying, and fsync; inside a file that a library writes, only a limit on its size (`at_size`) or a kill at some moment
(`after`) strikes. The process is a fork of one that has imported everything, so that hundreds of attacks take minutes.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.commands import command_module, hear_interrupts
from tqdm import tqdm

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile"}
NEEDS_ROOM = {"open", "os.mkdir", "shutil.copyfile", "fsync"}
tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that is killed would never give it back
tqdm.monitor_interval = 0  # nor may a thread hold it while a fork is made
LONGEST = 600  # seconds that any attacked command may take
TOO_LONG = 98  # the exit status of a command that has used up its seconds


class Ended(NamedTuple):
    """How an attacked command ended."""

    code: int  # its exit status; that of a kill is negative
    operations: int  # those it has begun
    output: str  # standard output and standard error

    @property
    def clear(self) -> bool:
        """One line says what is wrong, and no traceback does."""
        return self.code == 2 and "error: " in self.output and "Traceback" not in self.output


Act = Callable[[int, str], None]


def run(command: str, flags: Sequence[object], watched: Path, act: Act = lambda number, kind: None) -> Ended:
    """`act` gets the number and the kind of each operation just before it; what it raises, the operation raises."""
    return _forked(command, flags, lambda tally: _watch(watched, act, tally))


def killed_at(k: int, command: str, flags: Sequence[object], watched: Path) -> Ended:
    def act(number: int, kind: str) -> None:
        if number == k:
            os.kill(os.getpid(), signal.SIGKILL)

    return run(command, flags, watched, act)


def full_from(k: int, command: str, flags: Sequence[object], watched: Path) -> Ended:
    """The disk is full from the k-th operation on."""

    def act(number: int, kind: str) -> None:
        if number >= k and kind in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return run(command, flags, watched, act)


def at_size(limit: int, command: str, flags: Sequence[object]) -> Ended:
    """No file may grow beyond `limit` bytes, whoever writes it."""

    def arm(tally: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return _forked(command, flags, arm)


def after(seconds: float, number: int, command: str, flags: Sequence[object]) -> Ended:
    """The process gets a signal after some time."""

    def arm(tally: int) -> None:
        def strike() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), number)

        threading.Thread(target=strike, daemon=True).start()

    return _forked(command, flags, arm)


def limited(command: str, flags: Sequence[object], seconds: int, size: int) -> Ended:
    """The process may use so many seconds of the processor, and take so many bytes more than it has."""

    def arm(tally: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGXCPU, lambda *_: os._exit(TOO_LONG))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))

    ended = _forked(command, flags, arm)
    return ended._replace(code=TOO_LONG) if ended.code in (-signal.SIGKILL, -signal.SIGALRM) else ended


def _watch(watched: Path, act: Act, tally: int) -> None:
    number, below, fsync = 0, str(watched), os.fsync

    def strike(kind: str) -> None:
        nonlocal number
        number += 1
        os.pwrite(tally, str(number).encode(), 0)
        act(number, kind)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and arguments[2] and arguments[2] & WRITING)
        if changes and isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(below):
            strike(event)

    def watched_fsync(file: Any) -> None:
        strike("fsync")
        fsync(file)

    os.fsync = watched_fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def _forked(command: str, flags: Sequence[object], arm: Callable[[int], None]) -> Ended:
    module = command_module(command)
    reading, writing = os.pipe()
    tally = os.memfd_create("operations")
    child = os.fork()
    if not child:
        code = 99  # if the command lets an exception through
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            hear_interrupts()
            signal.alarm(LONGEST)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            arm(tally)
            code = module.main([str(flag) for flag in flags])
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        output = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    operations = int(os.pread(tally, 20, 0) or b"0")
    os.close(tally)
    return Ended(code, operations, output)
