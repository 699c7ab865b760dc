"""Products of few rows with several frozen weights, as generation makes them: in bfloat16 where the machine can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from minilora.backend import Array, HostArray, xp
from minilora.frozen.packed import Packed, available
from minilora.frozen.weight import FrozenWeight


@runtime_checkable
class InBfloat16(FrozenWeight, Protocol):
    """A weight whose products may be computed in bfloat16."""

    pieces: int  # of x (`packed`)

    def bfloat16(self) -> HostArray | None:
        """W (out, in), in the memory of the host; None if it is held in another type or for another precision."""


# What was packed stays as long as its first weight lives. The others are known by their number in memory: weights that
# are multiplied together are those of a layer of one base, and live as long as it does.
_known: WeakKeyDictionary[FrozenWeight, dict[tuple[int, ...], Packed]] = WeakKeyDictionary()


def products_with(weights: Sequence[FrozenWeight]) -> Callable[[Array], Array]:
    """The function x (N, in) → x [W₁; W₂; …]ᵀ (N, Σ out). (docs: O1)

    Where all weights are in bfloat16 and the machine multiplies so, NumKong does (`packed`). With three pieces of x its
    sums differ from those of `forward` in the last bits of float32. With one, in mixed precision, they are not rounded
    to bfloat16 once more, as `forward` does. For few rows the weights are laid out anew, once, which takes their memory
    again.
    """
    first, *others = weights
    arrays = [W.bfloat16() if isinstance(W, InBfloat16) else None for W in weights]
    found = [W for W in arrays if W is not None]
    if available() and isinstance(first, InBfloat16) and len(found) == len(weights):
        known, numbers = _known.setdefault(first, {}), tuple(map(id, others))
        if numbers not in known:
            known[numbers] = Packed(found)
        return partial(known[numbers].forward, pieces=first.pieces)
    if not others:
        return first.forward
    return lambda x: xp.concatenate([W.forward(x) for W in weights], axis=1)
