"""The one message that ranks exchange: the loss and the gradients of a step, in one flat buffer.

    bytes      0–7      8–15        64 …
    content    Σ loss   checksum    one gradient after the other, each from a multiple of 64 bytes on

A buffer of LoRA's is short: 4 bytes for each number that trains.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minilora.backend import Array, HostArray, to_device, to_host, xp
from minilora.model.sites import Gradients

START = ALIGNED = 64
PIECE = 2**30  # bytes in one call of MPI, which counts in 32 bits


@dataclass
class Sum:
    """Σ_j L_j so far, and its gradients: arrays of their own, or views into `flat`."""

    loss: float = 0.0
    gradients: Gradients = field(default_factory=dict)
    flat: Array | None = None


class Place(NamedTuple):
    """The place of a gradient in the buffer. Its axes are in the order in which it lies in memory: sums over an array
    round by that order."""

    start: int
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: str


class Layout:
    """The places of all gradients, by name, in the order of the gradients, by which their norm rounds. Every rank finds
    the same from gradients of its own."""

    def __init__(self, gradients: Gradients) -> None:
        self.places: dict[str, Place] = {}
        self.bytes = START
        for name, g in gradients.items():
            strides = [stride if length > 1 else g.nbytes for stride, length in zip(g.strides, g.shape, strict=True)]
            axes = tuple(int(axis) for axis in np.argsort([-stride for stride in strides], kind="stable"))
            self.places[name] = Place(self.bytes, tuple(g.shape), axes, g.dtype.str)
            self.bytes += room_for(g.nbytes)
        self.checksum = checksum([repr(self.places).encode()])

    def views(self, flat: Array) -> Gradients:
        """The gradients in a buffer (bytes,) uint8."""
        found = {}
        for name, (start, shape, axes, dtype) in self.places.items():
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            in_memory = flat[start : start + size].view(dtype).reshape([shape[axis] for axis in axes])
            found[name] = in_memory.transpose([axes.index(axis) for axis in range(len(axes))])
        return found


def room_for(nbytes: int) -> int:
    """What a gradient of so many bytes takes in the buffer: filled up to a multiple of ALIGNED."""
    return -(-nbytes // ALIGNED) * ALIGNED


def packed(total: Sum) -> HostArray:
    """The buffer with what `total` holds (bytes,) uint8."""
    layout = Layout(total.gradients)
    if total.flat is None:
        flat = xp.zeros(layout.bytes, np.uint8)
        for name, view in layout.views(flat).items():
            view[...] = total.gradients[name]
    else:
        flat = total.flat
    buffer = to_host(flat)
    buffer[:8].view(np.float64)[0] = total.loss
    buffer[8:16].view(np.uint64)[0] = layout.checksum
    return buffer


def unpack(buffer: HostArray, layout: Layout, total: Sum) -> None:
    """Let `total` be what the buffer holds. RuntimeError if its sender has laid it out in another way."""
    if int(buffer[8:16].view(np.uint64)[0]) != layout.checksum:
        raise RuntimeError("two ranks have gradients of different names or shapes: their versions or flags differ")
    total.flat = to_device(buffer)
    total.loss, total.gradients = float(buffer[:8].view(np.float64)[0]), layout.views(total.flat)


def pieces(buffer: HostArray) -> Iterator[HostArray]:
    """The buffer in pieces that one call can take."""
    return (buffer[start : start + PIECE] for start in range(0, len(buffer), PIECE))


def checksum(parts: Iterable[bytes]) -> int:
    """CRC-32 of all parts, one after the other."""
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found
