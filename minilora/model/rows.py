"""Rows that are continued side by side, and come and go between tokens (continuous batching; Yu et al., 2022, Orca,
OSDI '22).

Each row is a text of its own: its past holds what it has read, padded on the left so that all rows go on in the same
column. Padding is segment 0, which no token sees, so a row computes what it computes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora.backend import Array, to_device, xp
from minilora.model.layers import Past

PADDING = 0  # the segment of padding


def join(pasts: Sequence[Past]) -> Past:
    """One past with the rows of all of them, in order."""
    longest = max(past.positions.shape[1] for past in pasts)
    padded = [_pad(past, longest - past.positions.shape[1]) for past in pasts]
    layers = [
        (xp.concatenate([k for k, _ in layer]), xp.concatenate([v for _, v in layer]))
        for layer in zip(*(past.layers for past in padded), strict=True)
    ]
    positions, segments = (xp.concatenate([past[i] for past in padded]) for i in (1, 2))
    return Past(layers, positions, segments)


def keep(past: Past, rows: Sequence[int]) -> Past:
    """The past of these rows only, of which there is at least one. Columns that are padding in all of them are cut."""
    chosen = to_device(np.asarray(rows))
    segments = past.segments[chosen]
    start = int(xp.flatnonzero((segments != PADDING).any(axis=0))[0])
    layers = [(k[chosen, start:], v[chosen, start:]) for k, v in past.layers]
    return Past(layers, past.positions[chosen, start:], segments[:, start:])


def _pad(past: Past, columns: int) -> Past:
    """The past with this many columns of padding before it."""
    if columns == 0:
        return past
    layers = [(_zeros_before(k, columns), _zeros_before(v, columns)) for k, v in past.layers]
    return Past(layers, _zeros_before(past.positions, columns), _zeros_before(past.segments, columns))


def _zeros_before(x: Array, columns: int) -> Array:
    """(B, S, …) → (B, columns + S, …). Zeros for the keys and values, and PADDING for the segments."""
    return xp.concatenate([xp.zeros((len(x), columns, *x.shape[2:]), x.dtype), x], axis=1)
