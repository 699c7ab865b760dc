"""Single files in and out, each checked as it is read, and whole or not there as it is written (`whole.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minilora.backend import HostArray
from minilora.formats.finite import finite_fields
from minilora.formats.whole import replacing
from minilora.keys import checked
from minilora.model.names import Shape

BOM = b"\xef\xbb\xbf"  # a byte order mark, which some editors put before UTF-8
DEEPEST = 100  # levels of a JSON file: code behind it may then call itself


def write_safetensors(path: Path, tensors: Mapping[str, HostArray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays of any layout. The library copies raw memory, so a transposed view has to be laid out first."""
    with replacing(Path(path)) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, partial, metadata)
        partial.chmod(mode)  # the library makes files that only their owner can read


def copy_file(source: Path, target: Path) -> None:
    with replacing(target) as partial:
        shutil.copyfile(source, partial)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with its line ends as they are."""
    with replacing(Path(path)) as partial:
        partial.write_bytes(text.encode())


def write_json(path: Path, obj: object) -> None:
    """Write readable JSON. NaN and infinity, which JSON lacks, are a ValueError."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """The text of a regular file, its line ends as \\n, without a byte order mark. OSError or ValueError, naming it.

    A pipe or a device might never end, so it is refused before it is opened.
    """
    path = Path(path)
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, path.read_bytes())) from error


def check_regular(path: Path) -> None:
    """OSError or ValueError, naming it, unless it is a regular file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path}: {kind}, and a regular file is needed here")


def read_lines(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Each line of a regular file as it comes: the byte at which it starts, its bytes, and its text without line end.

    Lines and errors are those of `read_text`, but only one line is in memory at a time.
    """
    check_regular(path)
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(start)
        for number, line in enumerate((line for block in file for line in block.splitlines(keepends=True)), start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(_not_utf8_at(path, number, line[error.start], start + error.start)) from error
            yield start, line, text.rstrip("\r\n")
            start += len(line)


def _not_utf8(path: Path, data: bytes) -> str:
    """The sentence on the first byte that is no UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return _not_utf8_at(path, data.count(b"\n", 0, error.start) + 1, data[error.start], error.start)
    return f"{path}: not UTF-8 text"  # it has been changed meanwhile


def _not_utf8_at(path: Path, line: int, byte: int, place: int) -> str:
    what = f"0x{byte:02x}, byte {place + 1} of the file"
    return f"{path}, line {line}: not UTF-8 text ({what}); convert it first: iconv -f latin1 -t utf-8"


def read_json(path: Path, keys: type | None = None) -> dict[str, Any]:
    """The JSON object in a file, with the types that the TypedDict `keys` declares (keys.py)."""
    value = parsed_json(path, read_text(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object in braces")
    return value if keys is None else checked(path, value, keys)


def parsed_json(place: object, text: str) -> Any:
    """The value that a text of JSON holds. ValueError, naming the place, for a text that holds none.

    Nor may it hold NaN, half of a character, or more levels than code can walk down that calls itself.
    """
    try:
        value = json.loads(text, object_pairs_hook=finite_fields)
        if _depth(value) > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{place}: not valid JSON (\\u{ord(half):04x} is half of a character)") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    return value


def _depth(value: Any) -> int:
    """How many containers stand within each other."""
    depth, level = 0, [value]
    while level := [entry for entry in level if isinstance(entry, dict | list)]:
        depth += 1
        level = [inner for entry in level for inner in (entry.values() if isinstance(entry, dict) else entry)]
    return depth


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one, as they are asked for."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}): download or copy it again (a Git LFS pointer is not it)"
        ) from error


def check_shapes(where: object, expected: Mapping[str, Shape], found: Mapping[str, Shape], hint: str) -> None:
    """Raise ValueError unless `found` has exactly the expected names and shapes."""
    problems = []
    for title, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
        (
            "of wrong shape",
            [
                f"{name} {found[name]}, expected {shape}"
                for name, shape in expected.items()
                if name in found and found[name] != shape
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{title}: {', '.join(names[:5])}{more}")
    if problems:
        raise ValueError(f"{where}: tensors {'; '.join(problems)}. {hint}")
