"""Data sets: files to rows, their keys renamed, and rows to parts."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import memory_bytes
from minilora.data.conversations import TEMPLATE_KEYS, type_name
from minilora.data.examples import ACCEPTED_ROWS, SHAPES, Row, row_shape
from minilora.data.json_lines import chosen, read_json_lines
from minilora.data.rows import FileRow, Place, as_ours
from minilora.formats.files import check_regular, read_text

SUFFIXES = (".jsonl", ".json", ".txt")
BYTES_IN_MEMORY = {".json": 5, ".txt": 100}  # for each byte of the file; a .jsonl is never in memory as a whole
MOST_HELD_OUT = 500  # rows: more would make every evaluation slow and hardly more exact

Features = Mapping[str, str]  # "prompt" → the key under which the rows have their prompts
AS_NAMED: Features = {}
FLAGS = {
    "prompt": "--prompt-feature",
    "completion": "--completion-feature",
    "text": "--text-feature",
    "messages": "--chat-feature",
}  # mlx-lm's names


class Dataset(NamedTuple):
    train: Sequence[Row]
    valid: Sequence[Row]
    test: Sequence[Row]


def load_dataset(path: Path, seed: int, valid_share: float = 0.1, features: Features = AS_NAMED) -> Dataset:
    """A folder with train, and perhaps valid and test, files; or one file, of which a share is held out.

    Of rows, a seeded draw is held out (at least 1, at most 500); of a .txt, one long document, its end. For `features`
    see `read_rows`.
    """
    path = Path(path)
    if path.is_dir():
        train = _part(path, features, "train")
        if not train:
            raise FileNotFoundError(f"{path} has no training data: give it a train.jsonl or train.txt")
        return Dataset(train, _part(path, features, "valid", "validation", "dev"), _part(path, features, "test"))
    if not 0 <= valid_share < 1:
        raise ValueError(f"valid_share is {valid_share}; it must be at least 0 and less than 1")
    rows = read_rows(path, features)
    if valid_share == 0:
        return Dataset(rows, [], [])
    if path.suffix == ".txt":
        head, tail = _split_text(rows[0]["document"], 1 - valid_share)
        return Dataset([{"document": head}], [{"document": tail}], [])
    if len(rows) == 1:
        raise ValueError(
            f"{path} has a single row, and one must be held out; add rows, or give a folder with train.jsonl"
        )
    count = min(max(round(len(rows) * valid_share), 1), MOST_HELD_OUT, len(rows) - 1)
    held_out = np.zeros(len(rows), bool)
    held_out[np.random.default_rng(seed).permutation(len(rows))[:count]] = True
    return Dataset(chosen(rows, ~held_out), chosen(rows, held_out), [])


def read_rows(path: Path, features: Features = AS_NAMED) -> Sequence[Row]:
    """The rows of a .jsonl, or of a .json list, all of one shape; a .txt is one row, {"document": …}.

    `features` says where the rows have what a shape needs: {"prompt": "question", "completion": "answer"}. The rows
    come back under the usual names. ValueError names the file and the line, and the key that is missing there.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: data must be a folder or a file that ends in {', '.join(SUFFIXES)}; a data set of the Hugging "
            "Face Hub is not fetched: write it to one, as by Dataset.to_json"
        )
    check_regular(path)
    if path.suffix == ".jsonl":
        lines = read_json_lines(path, partial(_line_to_row, features), OneShape())
        if not lines:
            raise ValueError(f"{path} is empty")
        return lines
    _check_memory(path)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if path.suffix == ".txt":
        if features:
            raise ValueError(f"{path} is a text, without keys: leave out {_flags(features)}")
        return [FileRow({"document": text}, Place(str(path), "line", 1))]
    values = _parse(path, text)
    if not isinstance(values, list):
        raise ValueError(f"{path}: must hold a JSON list of rows; one object a line belongs in a .jsonl")
    if not values:
        raise ValueError(f"{path} holds no rows: {ACCEPTED_ROWS}")
    check, listed = OneShape(), []
    for number, value in enumerate(values, start=1):
        row = _to_row(features, Place(str(path), "row", number), value)
        check(row)
        listed.append(row)
    return listed


def _check_memory(path: Path) -> None:
    """ValueError for a file that is read as a whole and would not fit the memory."""
    size, memory = path.stat().st_size, memory_bytes()
    needed = BYTES_IN_MEMORY[path.suffix] * size
    if 0 < memory < needed:
        raise ValueError(
            f"{path} has {size / 1e9:,.1f} GB and is read as a whole, which would take some {needed / 1e9:,.0f} GB of "
            f"memory; here are {memory / 1e9:,.0f}. Write it as rows in a .jsonl, one JSON object a line, as "
            '{"text": "…"}: these are read one by one'
        )


class OneShape:
    """A check that all rows have one shape: ValueError, naming the place of the first that has another, or none."""

    def __init__(self) -> None:
        self.shape = ""

    def __call__(self, row: FileRow) -> None:
        try:
            this = row_shape(row)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        self.shape = self.shape or this
        if this != self.shape:
            raise ValueError(f"{row.place}: this row is {this}, those before {self.shape}; keep one shape in a file")


def _line_to_row(features: Features, place: Place, text: str) -> FileRow:
    return _to_row(features, place, _parse(place, text))


def _to_row(features: Features, place: Place, value: Any) -> FileRow:
    """A JSON value as a row, under the usual names."""
    if type(value) is not dict:
        raise ValueError(f"{place}: {type_name(value)}, not a JSON object: {ACCEPTED_ROWS}")
    try:
        return FileRow(as_ours(_renamed(value, features)), place)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _renamed(row: Row, features: Features) -> Row:
    """The keys of the one shape that `features` speaks of, under their usual names; of the others, the template's."""
    if not features:
        return row
    spoken_of = [shape for shape in SHAPES if not features.keys().isdisjoint(shape)]
    if len(spoken_of) > 1:
        raise ValueError(f"{_flags(features)} name keys of different shapes of rows: give those of one")
    renamed = {key: row[key] for key in TEMPLATE_KEYS if key in row}
    for name in spoken_of[0]:
        key = features.get(name, name)
        if key not in row:
            raise ValueError(f"the row has no key {key!r}, which {FLAGS[name]} asks for; it has {sorted(row)}")
        renamed[name] = row[key]
    return renamed


def _flags(features: Features) -> str:
    return " and ".join(FLAGS[name] for name in features)


def _parse(place: Place | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{place}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):  # a number of more digits than Python reads
            raise ValueError(f"{place}: not valid JSON ({error})") from error
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{place}: not valid JSON ({error.msg}, {where})") from error


def _part(folder: Path, features: Features, *names: str) -> Sequence[Row]:
    files = [file for name in names for suffix in SUFFIXES if (file := folder / (name + suffix)).exists()]
    if len(files) > 1:
        raise ValueError(f"{folder} has {files[0].name} and {files[1].name}, which mean the same; keep one")
    return read_rows(files[0], features) if files else []


def _split_text(text: str, share: float) -> tuple[str, str]:
    """Cut at the first line break after `share` of the text; there itself if nothing would follow."""
    target = int(len(text) * share)
    cut = text.find("\n", target) + 1
    if cut == 0 or not text[cut:].strip():
        cut = target
    return text[:cut], text[cut:]
