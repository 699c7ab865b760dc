"""A batch for human eyes: every token, and whether it is trained."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from minilora.data.batches import Batch, count_labels
from minilora.data.tokenizer import Tokenizer
from minilora.ops.cross_entropy import IGNORE

WIDTH = 100
BETWEEN = "│"
BRACKETS, INVERSE = ("⟦", "⟧"), ("\033[7m", "\033[0m")


class Shown(NamedTuple):
    """A token of an example; it is trained if the label of the place before it asks for it."""

    position: int
    text: str
    trained: bool


def show_batch(batch: Batch, tokenizer: Tokenizer, color: bool = False) -> Iterator[str]:
    """Lines to print. What is trained stands in brackets, or with `color` inverted, and each line begins with the
    position of its first token. All is taken from the batch's arrays, not from the rows they came from.
    """
    opening, closing = marks = INVERSE if color else BRACKETS
    for number, (tokens, labels, positions, segments) in enumerate(zip(*batch, strict=True), start=1):
        padding = np.count_nonzero(segments == 0)
        yield f"row {number}" + (f", {padding} of its {len(tokens)} places padding" if padding else "")
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            trained = [False, *(labels[here[:-1]] != IGNORE).tolist()]
            yield f"  segment {segment}: {len(here)} tokens, {sum(trained)} trained"
            pieces = [tokenizer.piece(token) for token in tokens[here].tolist()]
            shown = [Shown(*token) for token in zip(positions[here].tolist(), pieces, trained, strict=True)]
            yield from (f"  {line[0].position:>6}  {_marked(line, marks)}" for line in _lines(shown))
    real = np.count_nonzero(batch.segments)
    yield (
        f"{opening}trained{closing}: {count_labels(batch):,} of {real:,} tokens; "
        f"{1 - real / batch.segments.size:.0%} of the batch is padding"
    )


def _lines(shown: Sequence[Shown]) -> Iterator[list[Shown]]:
    """Cut where the text has a line break, and where a line is full."""
    line: list[Shown] = []
    for token in shown:
        line.append(token)
        if "\n" in token.text or sum(len(t.text) + 1 for t in line) > WIDTH:
            yield line
            line = []
    if line:
        yield line


def _marked(line: Sequence[Shown], marks: tuple[str, str]) -> str:
    """The tokens of a line with a bar between any two; a run of trained ones is enclosed by the marks."""
    runs = []
    for trained, run in groupby(line, key=lambda token: token.trained):
        text = BETWEEN.join(_visible(token.text) for token in run)
        runs.append(f"{marks[0]}{text}{marks[1]}" if trained else text)
    return BETWEEN.join(runs)


def _visible(text: str) -> str:
    """Line breaks and whatever else prints nothing, as Python writes it: \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
