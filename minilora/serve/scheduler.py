"""The batch that all requests share. One thread runs the model; rows join and leave between two tokens.

What the scheduler promises to each row: it is given what it would be given alone, up to the rounding of float32. Its
tokens are chosen by its own `choose`, so no neighbour changes a draw.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minilora.adapters.mixed import continuing
from minilora.backend import HostArray, to_device, to_host
from minilora.model.decoding import Decoder
from minilora.model.generation import Choose, last_logits, read
from minilora.model.model import Model, Past
from minilora.model.rows import join, keep

READ_AT_ONCE = 128  # tokens of prompts between two tokens of the running rows, so that a long prompt does not stop them


@dataclass(eq=False)
class Row:
    """One answer that somebody waits for. The callbacks are called by the scheduler's thread."""

    model: Model
    prompt: Sequence[int]
    choose: Choose
    hear: Callable[
        [int, HostArray], bool
    ]  # takes a token and the logits (V,) it was chosen from; False: the answer ends
    fail: Callable[[Exception], None]  # takes the reason why no answer will come
    gone: bool = False  # set by anybody, at any time: nobody waits any more
    text: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.text = list(self.prompt)


class Reading(NamedTuple):
    """A row whose prompt is being read: its first `done` tokens are in the past."""

    row: Row
    done: int
    past: Past | None


class QueueFull(Exception):
    """No place is left among the rows that wait."""


class Scheduler:
    """At most `most_rows` rows run together, and at most `most_waiting` wait for a place."""

    def __init__(self, most_rows: int, most_waiting: int) -> None:
        self.most_rows = most_rows
        self.most_waiting = most_waiting
        self.waiting: deque[Row] = deque()
        self.reading: Reading | None = None
        self.rows: list[Row] = []
        self.past: Past | None = None  # a row for each of `rows`
        self.decoder: Decoder | None = None  # continues `rows` from `past`; None since a row joined or left
        self.tokens = 0  # computed since the start
        self.stopping = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="scheduler", daemon=True)

    # --- What any thread may call ---

    def submit(self, rows: Sequence[Row]) -> None:
        """Let these rows wait for a place, all or none of them. Raises QueueFull."""
        with self.changed:
            free = self.most_rows - self.running
            if len(self.waiting) + len(rows) > self.most_waiting + free:
                raise QueueFull
            self.waiting.extend(rows)
            self.changed.notify()

    def leave(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these rows any more: they are dropped before the next token."""
        with self.changed:
            for row in rows:
                row.gone = True
            self.waiting = deque(row for row in self.waiting if not row.gone)

    @property
    def running(self) -> int:
        """How many rows have a place."""
        return len(self.rows) + (self.reading is not None)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread after the token it is at, and wait until it has ended."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    # --- What its own thread does ---

    def run(self) -> None:
        """Work until `stop`, and sleep while there is nothing to do."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopping or self.waiting or self.running)
                if self.stopping:
                    return
            self.step()

    def step(self) -> None:
        """Drop who is gone, read some of the prompts that wait, and give each running row a token."""
        try:
            self._keep([b for b, row in enumerate(self.rows) if not row.gone])
            budget = READ_AT_ONCE
            while budget > 0 and self._next_reading():
                budget -= self._read(budget)
            self._continue()
        except Exception as error:  # such as no memory for the batch: it ends here, and the next one begins anew
            for row in self.rows:
                row.fail(error)
            self.rows, self.past, self.decoder = [], None, None

    def _next_reading(self) -> bool:
        """Whether there is a prompt to read: the one begun, or the next that waits if a place is free."""
        with self.changed:
            if self.reading is not None and self.reading.row.gone:
                self.reading = None
            if self.reading is None and self.waiting and len(self.rows) < self.most_rows:
                self.reading = Reading(self.waiting.popleft(), 0, None)
            return self.reading is not None

    def _read(self, most: int) -> int:
        """Read at most this many tokens of the prompt, and return how many. After its last one, the row joins."""
        assert self.reading is not None
        row, start, past = self.reading
        tokens = row.prompt[start : start + most]
        try:
            hidden, past = read(row.model, tokens, start, past)
            if start + len(tokens) < len(row.prompt):
                self.reading = Reading(row, start + len(tokens), past)
                return len(tokens)
            if self._say(row, to_host(last_logits(row.model, hidden, 1))[0]):
                joined = past if self.past is None else join([self.past, past])
                self.rows, self.past, self.decoder = [*self.rows, row], joined, None  # all or, after an error, none
        except Exception as error:
            row.fail(error)
        self.reading = None
        return len(tokens)

    def _continue(self) -> None:
        """One more token for each row. Rows whose answers end leave the batch."""
        if self.past is None:
            return
        if self.decoder is None:
            self.decoder = Decoder(continuing([row.model for row in self.rows]), self.past)
        tokens = to_device(np.array([row.text[-1] for row in self.rows]))
        logits = to_host(self.decoder.step(tokens, self.past.positions[:, -1] + 1))
        self.past = self.decoder.past
        self._keep([b for b, row in enumerate(self.rows) if self._say(row, logits[b])])

    def _say(self, row: Row, logits: HostArray) -> bool:
        """Choose the row's next token and tell it. False if its answer ends."""
        try:
            if not np.isfinite(logits).all():
                raise ArithmeticError("the model computed numbers that are not finite (NaN or infinity)")
            token = int(row.choose(logits[None], [row.text])[0])
            row.text.append(token)
            self.tokens += 1
            return row.hear(token, logits)
        except Exception as error:
            row.fail(error)
            return False

    def _keep(self, staying: Sequence[int]) -> None:
        """Drop all rows but these."""
        if len(staying) == len(self.rows):
            return
        self.rows = [self.rows[b] for b in staying]
        self.past = keep(self.past, staying) if self.past is not None and staying else None
        self.decoder = None
