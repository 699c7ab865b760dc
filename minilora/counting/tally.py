"""What is counted while outlines are computed with: bytes that live, calls, and the operations of matrix products."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Tally:
    """`live` bytes now, and the most at each moment of the step; calls; FLOPs by (way, purpose).

    Whoever runs the step says which moment it is, which way the model is gone through, and what products are for.
    """

    def __init__(self) -> None:
        self.live = 0
        self.calls = 0
        self.flops: Counter[tuple[str, str]] = Counter()
        self.way = "forward"
        self.purpose = "attention"
        self.moment = "the start"
        self.most = {self.moment: 0}

    def enter(self, moment: str) -> None:
        """From now on it is this moment of the step."""
        self.moment = moment
        self.most[moment] = max(self.most.get(moment, 0), self.live)

    def allocate(self, nbytes: int) -> None:
        self.live += nbytes
        if self.live > self.most[self.moment]:
            self.most[self.moment] = self.live

    def product(self, flops: int) -> None:
        self.calls += 1
        self.flops[self.way, self.purpose] += flops


class Allocation:
    """The bytes of an array. All views of it hold the same allocation, and it lives as long as any of them does."""

    __slots__ = ("nbytes", "tally")

    def __init__(self, tally: Tally, nbytes: int) -> None:
        self.tally, self.nbytes = tally, nbytes
        tally.allocate(nbytes)

    def __del__(self, *_: Any) -> None:
        self.tally.live -= self.nbytes
