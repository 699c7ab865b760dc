"""Files and folders that appear whole or not at all: written beside their place, put onto the disk, then renamed.

The place beside is always the same, so that what a killed process left is removed by the next. That no two
processes use it at once is seen to by a lock, which ends with its process, however that ends.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it becomes `path` when the block ends, and vanishes if the block fails.

    The place is in a folder of its own, because a library may write under names that nobody knows (safetensors does),
    and a kill would leave those.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(path.with_name(f".{path.name}.lock"), path):
            remove(partial)
            try:
                partial.mkdir()
                yield partial / path.name
                to_disk(partial / path.name)
                os.replace(partial / path.name, path)
                to_disk(path.parent)
            finally:
                remove(partial)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """The same for a folder that is new or empty: one beside it to fill, which becomes `folder`."""
    check_new(folder)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(folder.with_name(f".{folder.name}.lock"), folder):
            remove(partial)
            try:
                partial.mkdir()
                yield partial
                to_disk(partial)
                with suppress(FileNotFoundError):
                    folder.rmdir()  # refuses to remove one that has been filled meanwhile
                partial.rename(folder)
                to_disk(folder.parent)
            finally:
                remove(partial)


def is_unfinished(path: Path) -> bool:
    """Whether this lies beside another file, a place to write it or its lock, as only a kill leaves them."""
    return path.name.startswith(".") and path.name.count(".") > 1 and path.suffix in (".partial", ".lock")


def remove(unfinished: Path) -> None:
    """Remove what a kill has left, file or folder."""
    if unfinished.is_dir() and not unfinished.is_symlink():
        shutil.rmtree(unfinished, ignore_errors=True)
    else:
        unfinished.unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """ValueError unless `folder` can appear by a rename: it is new, or empty and nothing else's."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--out {folder} exists and is not an empty folder: choose another")
    if os.path.ismount(folder) or folder.resolve() == Path.cwd():
        raise ValueError(f"--out {folder} is a folder that cannot be put in its place whole: name a new one in it")


@contextmanager
def only_writer(lock: Path, target: Path) -> Iterator[None]:
    """Be the only process that writes `target`, by a lock on the file `lock`. OSError if another one is.

    A kill leaves that file, but no lock on it.
    """
    with writing(target):
        file = lock.open("ab")
    with file:
        if not _locked(file, lock):
            raise OSError(f"{target} is being written by another process: wait for its end, or choose another place")
        try:
            yield
        finally:
            if os.name == "nt":
                file.close()  # Windows removes no file that is open
            with suppress(OSError):  # the folder may be gone, or another process may hold the file already
                lock.unlink()


def _locked(file: IO[bytes], path: Path) -> bool:
    """Lock an open file until it is closed. False if another process has locked it, or has just removed it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network drives have no locks
                    raise
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False


def to_disk(path: Path) -> None:
    """Have a file, or the list of names of a folder, on the disk itself, where a power cut leaves it."""
    if path.is_dir() and os.name == "nt":
        return  # Windows keeps such lists by itself
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk as one OSError that names `path` and says what to do; those that name theirs already stay."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): {WAY_OUT}") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{path} cannot be written ({error.strerror}): {WAY_OUT}") from error


WAY_OUT = "see that its disk has room, and that you may write there; what was there before is as it was"
