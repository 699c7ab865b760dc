"""A frozen weight that stays in its file, mapped into memory: the system reads the pages that a product touches.

Such pages belong to the file, not to the process. Every process that maps the file has the same ones, and the system
takes them back, without writing anything, when memory is short; then the next use reads them again. A disk answers
late, so a layer that begins asks for the pages of the layer after it, and lets go of those before it:

    forward:  ask for layer l + 1, let go of layer l − 1        backward:  ask for layer l − 1, let go of layer l + 1

Pages that were let go are no longer counted as the process's, but stay in memory as long as there is room.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from minilora.backend import Array, HostArray, read_only
from minilora.frozen.weight import FrozenWeight


class MappedWeight:
    """`weight`, whose products read `array` in a mapped file. The first and the last weight of a layer know the arrays
    of the layers `before` and `after` theirs."""

    def __init__(self, weight: FrozenWeight, array: HostArray) -> None:
        self.weight = weight
        self.array = read_only(array)
        self.shape = weight.shape
        self.before: list[HostArray] = []
        self.after: list[HostArray] = []

    def forward(self, x: Array) -> Array:
        ask_for(self.after)
        let_go(self.before)
        return self.weight.forward(x)

    def backward(self, dy: Array) -> Array:
        ask_for(self.before)
        let_go(self.after)
        return self.weight.backward(dy)

    def rows(self, index: Array) -> Array:
        return self.weight.rows(index)

    def dense(self) -> Array:
        return self.weight.dense()


def put_in_order(layers: Sequence[Sequence[MappedWeight]]) -> None:
    """Make the weights of each layer known to its neighbours. Layers, and weights within a layer, stand in the order of
    the forward pass, so the first weight is the first one used forwards, and the last one backwards."""
    for layer, after in pairwise(layers):
        for weight in (layer[0], layer[-1]):
            weight.after = [each.array for each in after]
        for weight in (after[0], after[-1]):
            weight.before = [each.array for each in layer]


def ask_for(arrays: Sequence[HostArray]) -> None:
    """Have the system read the pages of these arrays, and do not wait for it."""
    _advise(arrays, "MADV_WILLNEED")


def let_go(arrays: Sequence[HostArray]) -> None:
    """Give back the pages of these arrays. The next use finds them in the system's memory, or reads them again."""
    _advise(arrays, "MADV_DONTNEED")


def _advise(arrays: Sequence[HostArray], advice: str) -> None:
    """What is not in a mapped file is passed over: of other memory, DONTNEED would clear it. Windows has no advice."""
    for array in arrays:
        owner: object = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap) and hasattr(mmap, advice):
            begin = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
            start = begin - begin % mmap.PAGESIZE
            owner.madvise(getattr(mmap, advice), start, begin + array.nbytes - start)
