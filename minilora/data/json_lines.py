"""The rows of a .jsonl file, each read where it is asked for: text that has become tokens need not stay in memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minilora.data.rows import FileRow, Place
from minilora.formats.files import read_lines

Parse = Callable[[Place, str], FileRow]  # a place and its text to a row; ValueError names the place


class JsonLines(Sequence[dict[str, Any]]):
    """Rows of a file. In memory there are only the places where its lines start, and which of them are rows."""

    def __init__(self, path: Path, parse: Parse, starts: NDArray[np.int64], lines: NDArray[np.int64]) -> None:
        self.path, self.parse = path, parse
        self.starts = starts  # of every line, in bytes; last, the end of the file
        self.lines = lines  # the numbers, from 1, of the lines that are these rows

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[FileRow]:
        with self.path.open("rb") as file:
            yield from (self._row(file, int(line)) for line in self.lines)

    def __getitem__(self, index: Any) -> Any:
        """One row, or for a slice these rows, unread."""
        if isinstance(index, slice):
            return JsonLines(self.path, self.parse, self.starts, self.lines[index])
        with self.path.open("rb") as file:
            return self._row(file, int(self.lines[index]))

    def _row(self, file: BinaryIO, line: int) -> FileRow:
        start, end = self.starts[line - 1 : line + 1].tolist()
        file.seek(start)
        return self.parse(Place(str(self.path), "line", line), file.read(end - start).decode().rstrip("\r\n"))


def read_json_lines(path: Path, parse: Parse, check: Callable[[FileRow], None]) -> JsonLines:
    """Read the whole file once, so that `parse` and `check` refuse what is wrong before anything begins."""
    starts, lines = array("q"), array("q")
    end = 0
    with tqdm(
        total=path.stat().st_size, desc=f"reading {path.name}", unit="B", unit_scale=True,
        dynamic_ncols=True, leave=False, delay=1, disable=None,
    ) as bar:  # fmt: skip
        for number, (start, raw, text) in enumerate(read_lines(path), start=1):
            bar.update(len(raw))
            starts.append(start)
            end = start + len(raw)
            if text.strip():
                check(parse(Place(str(path), "line", number), text))
                lines.append(number)
    starts.append(end)
    return JsonLines(path, parse, np.array(starts), np.array(lines, np.int64))


def chosen(rows: Sequence[dict[str, Any]], mask: NDArray[np.bool_]) -> Sequence[dict[str, Any]]:
    """The rows that the mask, one boolean a row, has chosen; those of a file stay unread."""
    if isinstance(rows, JsonLines):
        return JsonLines(rows.path, rows.parse, rows.starts, rows.lines[mask])
    return [row for row, wanted in zip(rows, mask, strict=True) if wanted]
