"""Examples laid side by side (padding) and end to end (packing) in rectangular arrays."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minilora.data.store import Example, Examples
from minilora.ops.cross_entropy import IGNORE

Ints = NDArray[np.int64]
Rows = Sequence[Sequence[Example]]  # a row of a batch is one example, or several packed end to end


class Batch(NamedTuple):
    """The model's inputs and its labels; every array is int64 (B, T)."""

    tokens: Ints
    labels: Ints  # the token that should follow tokens[b, t], or IGNORE
    positions: Ints  # 0, 1, 2, … from the start of each example
    segments: Ints  # 0 is padding; 1, 2, … are the examples of the row, which must not see each other


class ExampleRows(Sequence[list[Example]]):
    """Rows of one example each; or, where `members` says of which examples, of several end to end. A row is made when
    it is asked for."""

    def __init__(self, examples: Examples, members: Sequence[Sequence[int]] | None = None) -> None:
        self.examples, self.members = examples, members

    def __len__(self) -> int:
        return len(self.examples if self.members is None else self.members)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return [self.examples[i] for i in ([index] if self.members is None else self.members[index])]

    @property
    def lengths(self) -> Ints:
        """The tokens of each row, all its examples together."""
        return self._totals(self.examples.lengths)

    @property
    def labels(self) -> Ints:
        """The tokens of each row that are to be predicted."""
        return self._totals(self.examples.labels)

    def _totals(self, of_examples: Ints) -> Ints:
        if self.members is None:
            return of_examples
        return np.array([of_examples[row].sum() for row in self.members], np.int64)


def row_length(row: Sequence[Example]) -> int:
    """Tokens of a row, all its examples together."""
    return sum(len(example.tokens) for example in row)


def collate(rows: Rows, pad_id: int, left: bool = False) -> Batch:
    """One batch row for each of `rows`, its examples end to end, filled up with `pad_id`.

    The shift by one is done here and nowhere else: labels[t] = tokens[t + 1] where that token is trained.
    The last token of an example has no label: what follows it is another example, or nothing.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    lengths = [row_length(row) for row in rows]
    shape = len(rows), max(lengths)
    batch = Batch(
        tokens=np.full(shape, pad_id, np.int64),
        labels=np.full(shape, IGNORE, np.int64),
        positions=np.zeros(shape, np.int64),
        segments=np.zeros(shape, np.int64),
    )
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = shape[1] - length if left else 0
        for segment, (tokens, trained) in enumerate(row, start=1):
            here = slice(start, start + len(tokens))
            batch.tokens[b, here] = tokens
            batch.labels[b, here][:-1] = np.where(trained[1:], tokens[1:], IGNORE)
            batch.positions[b, here] = np.arange(len(tokens))
            batch.segments[b, here] = segment
            start = here.stop
    return batch


def pad(examples: Sequence[Example], pad_id: int, left: bool = False) -> Batch:
    """One example a row; on the left the filler comes first, so that all rows can be continued together."""
    return collate([[example] for example in examples], pad_id, left)


def pack(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Group examples of these lengths, by index, into rows of at most `most` tokens: each goes to the first row it
    fits.

    Raises ValueError for an example that is longer than a row.
    """
    rows: list[list[int]] = []
    room = np.full(len(lengths), most)
    smallest, full = min(lengths, default=0), 0  # the first `full` rows have no room for any example
    for index, size in enumerate(lengths):
        if size > most:
            raise ValueError(f"example {index} has {size} tokens; pack rows longer than {most}, or leave it out")
        while full < len(rows) and room[full] < smallest:
            full += 1
        row = full + int(np.argmax(room[full : len(rows) + 1] >= size))  # the last of these is still empty: it fits
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= size
    return rows


def of_like_length(lengths: Ints, batch_size: int) -> list[Ints]:
    """The numbers of all rows in groups of `batch_size`, rows of like length together, so that little of a batch is
    padding.

    A training step cuts away even that (`divide`); generation and the drift do not. The loss is a sum over tokens: the
    order of the rows, and which of them share a batch, change nothing.
    """
    ordered = np.argsort(lengths, kind="stable")
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def batches_of(rows: Rows, batch_size: int, pad_id: int) -> list[Batch]:
    """All rows in batches, as `of_like_length` groups them."""
    groups = of_like_length(np.array([row_length(row) for row in rows], np.int64), batch_size)
    return [collate([rows[i] for i in group], pad_id) for group in groups]


def divide(batch: Batch, parts: int) -> list[Batch]:
    """The examples of a batch in `parts` batches of nearly equal size, without padding.

    If all examples of a part have the same length, they become its rows; else they stand end to end in a single row.
    """
    numbers = numbered_examples(batch)
    examples, lengths = np.unique(numbers[numbers > 0], return_counts=True)
    members: list[list[int]] = [[] for _ in range(parts)]  # of each part, numbers into `examples`
    sizes = [0] * parts
    for i in np.argsort(-lengths, kind="stable"):  # the longest first, each to the smallest part
        part = int(np.argmin(sizes))
        members[part].append(i)
        sizes[part] += lengths[i]
    divided = []
    for part_members in members:
        rows = len(part_members) if len(set(lengths[part_members])) == 1 else 1
        used = np.isin(numbers, examples[part_members])
        divided.append(Batch(*(array[used].reshape(rows, -1) for array in batch._replace(segments=numbers))))
    return divided


def numbered_examples(batch: Batch) -> Ints:
    """The segments (B, T), renumbered so that examples of different rows differ too. Padding is still 0."""
    before = np.arange(len(batch.segments))[:, None] * batch.segments.max()
    return np.where(batch.segments > 0, before + batch.segments, 0)


def count_examples(batch: Batch) -> int:
    """The number of examples in a batch; those packed into one row are counted separately."""
    return len(np.unique(numbered_examples(batch))) - bool((batch.segments == 0).any())


def padding_share(batches: Iterable[Ints]) -> float:
    """The share of padding in batches of rows of these lengths: 1 − tokens / (rows × the longest row of each batch)."""
    tokens = places = 0
    for lengths in batches:
        tokens += int(lengths.sum())
        places += len(lengths) * int(lengths.max())
    return 1 - tokens / max(places, 1)


def count_labels(batch: Batch) -> int:
    """The number of labelled tokens: the terms of the batch's summed loss."""
    return int(np.count_nonzero(batch.labels != IGNORE))
