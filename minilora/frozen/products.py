"""Products of few rows with several frozen weights, as generation makes them: in bfloat16 where the machine can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeGuard, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np

from minilora.backend import Array, HostArray, xp
from minilora.frozen.packed import Packed, available
from minilora.frozen.weight import FrozenWeight


@runtime_checkable
class InBfloat16(FrozenWeight, Protocol):
    """A weight whose products may be computed in bfloat16."""

    pieces: int  # of x (`packed`)

    def bfloat16(self) -> HostArray | None:
        """W (out, in), in the memory of the host; None if it is held in another type or for another precision."""


# What was packed stays as long as its first weight lives; the others are known by their number in memory.
_known: WeakKeyDictionary[FrozenWeight, dict[tuple[int, ...], Packed]] = WeakKeyDictionary()


def products_with(weights: Sequence[FrozenWeight]) -> Callable[[Array], Array]:
    """The function x (N, in) → x [W₁; W₂; …]ᵀ (N, Σ out). (docs: O1)

    Where all weights are in bfloat16 and the machine multiplies so, its sums differ from those of `forward` in the last
    bits of float32. For that the weights are packed, once, which takes their memory again.
    """
    if available() and _in_bfloat16(weights):
        known, others = _known.setdefault(weights[0], {}), tuple(map(id, weights[1:]))
        if others not in known:
            known[others] = Packed(np.concatenate([W.bfloat16() for W in weights]))
        return partial(known[others].forward, pieces=weights[0].pieces)
    if len(weights) == 1:
        return weights[0].forward
    return lambda x: xp.concatenate([W.forward(x) for W in weights], axis=1)


def _in_bfloat16(weights: Sequence[FrozenWeight]) -> TypeGuard[Sequence[InBfloat16]]:
    return all(isinstance(W, InBfloat16) and W.bfloat16() is not None for W in weights)
