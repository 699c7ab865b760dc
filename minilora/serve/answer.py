"""The text of one answer as it grows: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora.backend import HostArray
from minilora.data.streamed_text import StreamedText
from minilora.data.tokenizer import Tokenizer


class TokenChance(NamedTuple):
    """A token, its log-probability, and the best tokens at its place with theirs."""

    token: int
    logprob: float
    best: list[tuple[int, float]]
    start: int  # how many characters of the answer came before it


class Piece(NamedTuple):
    """The next part of an answer. `finish_reason` is empty until the last one."""

    text: str
    chances: list[TokenChance]
    finish_reason: str = ""


@dataclass(frozen=True)
class Ends:
    """What ends an answer."""

    limit: int  # tokens
    stop_ids: frozenset[int]
    stops: tuple[str, ...]


class Answer:
    """Takes an answer's tokens one by one, and gives its text in pieces.

    The text of all pieces is the answer, cut before the first stop string, wherever in the tokens that begins and ends.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Ends, best: int | None) -> None:
        """`best` is how many of the most probable tokens are told of each place; None: no probabilities at all."""
        self.text = StreamedText(tokenizer)
        self.ends = ends
        self.best = best
        self.sent = 0  # characters
        self.chances: list[TokenChance] = []  # those that are not sent yet
        self.tokens = 0

    def add(self, token: int, logits: HostArray) -> Piece:
        """The piece that this token completes; it may be empty."""
        if token in self.ends.stop_ids:
            return self._last("stop")
        self.tokens += 1
        if self.best is not None:
            self.chances.append(chance(token, logits, self.best, len(self.text.text)))
        self.text.add(token)
        if (stop := first_stop(self.text.text, self.ends.stops, self.sent)) >= 0:
            return self._piece(stop, "stop")
        if self.tokens == self.ends.limit:
            return self._last("length")
        return self._piece(len(self.text.text) - held_back(self.text.text, self.ends.stops))

    def _last(self, reason: str) -> Piece:
        """All that is left, with the bytes that never became a character."""
        self.text.rest()
        stop = first_stop(self.text.text, self.ends.stops, self.sent)
        return self._piece(len(self.text.text), reason) if stop < 0 else self._piece(stop, "stop")

    def _piece(self, end: int, reason: str = "") -> Piece:
        """The text up to this character, and the tokens that begin before it; with a reason, the rest is dropped."""
        end = max(end, self.sent)
        text, self.sent = self.text.text[self.sent : end], end
        whole = reason and end == len(self.text.text)
        told = [c for c in self.chances if c.start < end or whole]
        self.chances = self.chances[len(told) :]
        return Piece(text, told, reason)


def first_stop(text: str, stops: Sequence[str], start: int) -> int:
    """Where the first stop string begins that the text holds after `start`; −1 if it holds none."""
    return min((place for stop in stops if (place := text.find(stop, start)) >= 0), default=-1)


def held_back(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of the text with which a stop string may begin."""
    return max(
        (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
    )


def chance(token: int, logits: HostArray, best: int, start: int) -> TokenChance:
    """log softmax(logits) at the token and at the `best` most probable ones, these in descending order."""
    z = logits.astype(np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    order = np.argpartition(-z, best)[:best]
    order = order[np.argsort(-z[order], kind="stable")]
    return TokenChance(token, float(z[token]), [(int(i), float(z[i])) for i in order], start)
