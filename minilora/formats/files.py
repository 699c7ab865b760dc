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
from minilora.model.names import Shape


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=finite_fields)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except ValueError as error:  # of the JSON or of the UTF-8
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object in braces")
    return value


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
