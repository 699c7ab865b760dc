"""Examples laid side by side (padding) and end to end (packing) in rectangular arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minilora.ops.cross_entropy import IGNORE
from minilora.text.examples import Example

Ints = NDArray[np.int64]
Rows = Sequence[Sequence[Example]]  # a row of a batch is one example, or several packed end to end


class Batch(NamedTuple):
    """What a model reads and what it should answer; every array is int64 (B, T)."""

    tokens: Ints
    labels: Ints  # the token that should follow tokens[b, t], or IGNORE
    positions: Ints  # 0, 1, 2, … from the start of each example
    segments: Ints  # 0 is padding; 1, 2, … are the examples of the row, which must not see each other


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


def pack(examples: Sequence[Example], length: int) -> list[list[int]]:
    """Group examples, by index, into rows of at most `length` tokens: each goes to the first row it fits.

    Raises ValueError for an example that is longer than a row.
    """
    rows: list[list[int]] = []
    room = np.full(len(examples), length)
    for index, example in enumerate(examples):
        size = len(example.tokens)
        if size > length:
            raise ValueError(f"example {index} has {size} tokens; pack rows longer than {length}, or leave it out")
        row = int(np.argmax(room[: len(rows) + 1] >= size))  # the last of these is still empty: it fits
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= size
    return rows


def of_like_length(rows: Rows, batch_size: int) -> list[Rows]:
    """All rows in groups of `batch_size`, rows of like length together, so that little of a batch is padding.

    The loss is a sum over tokens: the order of the rows, and which of them share a batch, change nothing.
    """
    ordered = sorted(rows, key=row_length)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def batches_of(rows: Rows, batch_size: int, pad_id: int) -> list[Batch]:
    """All rows in batches, as `of_like_length` groups them."""
    return [collate(group, pad_id) for group in of_like_length(rows, batch_size)]


def divide(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch in so many parts, as equal as can be; columns that are filler in a whole part are cut off."""
    divided = []
    for rows in np.array_split(np.arange(len(batch.tokens)), parts):
        used = (batch.segments[rows] > 0).any(axis=0)
        divided.append(Batch(*(array[rows][:, used] for array in batch)))
    return divided


def padding_share(groups: Sequence[Rows]) -> float:
    """Which share of the batches of these groups is filler: 1 − tokens / (rows × the longest row of each batch)."""
    lengths = [[row_length(row) for row in group] for group in groups]
    return 1 - sum(map(sum, lengths)) / max(sum(len(group) * max(group) for group in lengths), 1)


def count_labels(batch: Batch) -> int:
    """How many tokens the batch trains: what its loss is a sum over."""
    return int(np.count_nonzero(batch.labels != IGNORE))
