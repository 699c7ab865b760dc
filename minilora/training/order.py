"""The order of the rows: a new permutation for every epoch, and a position in it that can be saved."""

from __future__ import annotations

import numpy as np


class Order:
    """Deals the numbers 0 … count − 1, in a fresh random order for each epoch."""

    def __init__(self, count: int) -> None:
        self.epoch = 0
        self.cursor = count  # an epoch's end: the first call draws the first permutation
        self.permutation = np.arange(count)

    def take(self, size: int, rng: np.random.Generator) -> list[int]:
        """The next `size` numbers, fewer at the end of an epoch: every row counts, and none is seen twice in one."""
        if self.cursor >= len(self.permutation):
            self.permutation = rng.permutation(len(self.permutation))
            self.cursor = 0
            self.epoch += 1
        taken = self.permutation[self.cursor : self.cursor + size]
        self.cursor += len(taken)
        return [int(i) for i in taken]
