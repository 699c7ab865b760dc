"""Examples, and many of them held in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from os import SEEK_END
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minilora.formats.whole import writing

MOST_IN_MEMORY = 2**26  # bytes


class Example(NamedTuple):
    """Tokens, and for each whether it is to be predicted (the first never is: nothing precedes it)."""

    tokens: list[int]
    trained: list[bool]


class Examples(Sequence[Example]):
    """Examples end to end in one file, 5 bytes a token, where Python's lists take 16 and more. It is kept in memory
    until it is large, then as a temporary file. An example is read when it is asked for."""

    def __init__(self, examples: Iterable[Example] = (), in_memory: int = MOST_IN_MEMORY) -> None:
        self.file = SpooledTemporaryFile(max_size=in_memory)  # of each example, its tokens in 4 bytes, then its mask
        self.ends = array("q", [0])  # in tokens: where each example ends, and the next one starts
        self.of_labels = array("q")
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        with writing(Path(gettempdir())):
            self.file.write(array("i", example.tokens).tobytes() + bytes(example.trained))
        self.ends.append(self.ends[-1] + len(example.tokens))
        self.of_labels.append(sum(example.trained[1:]))

    def __len__(self) -> int:
        return len(self.of_labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        count = self.ends[i + 1] - self.ends[i]
        self.file.seek(5 * self.ends[i])
        data = self.file.read(5 * count)
        self.file.seek(0, SEEK_END)
        return Example(array("i", data[: 4 * count]).tolist(), [*map(bool, data[4 * count :])])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each example."""
        return np.diff(np.array(self.ends))

    @property
    def labels(self) -> NDArray[np.int64]:
        """The tokens of each example that are to be predicted."""
        return np.array(self.of_labels, np.int64)
