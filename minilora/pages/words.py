"""Two texts side by side: which words of one are not in the other."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import NamedTuple

WORD = re.compile(r"\w+|\s+|[^\w\s]")


class Piece(NamedTuple):
    text: str
    differs: bool


def marked(text: str, right: str) -> list[Piece]:
    """The text in pieces; those differ that stand in no longest common run of words with the right text."""
    words, others = WORD.findall(text.strip()), WORD.findall(right.strip())
    pieces: list[Piece] = []
    for kind, start, end, *_ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        if start < end:
            pieces.append(Piece("".join(words[start:end]), kind != "equal"))
    return pieces
