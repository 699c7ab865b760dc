"""Arrays by name that lie end to end in a few buffers.

On a GPU each operation takes microseconds to start, whatever its size. An adapter is hundreds of small arrays, and an
optimiser does the same to every number of them: on buffers it starts a dozen operations a step, not a dozen for each
array. On the CPU, where a small array stays in the cache from one operation to the next, there are no buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from minilora.backend import Array, on_cpu, xp
from minilora.training.optimizers.optimizer import Arrays, Optimizer, RateFactors

SMALL = 2**18  # numbers; of larger arrays the operations take longer than their start


class Flat:
    """Small arrays in buffers, and all others as they are.

    `arrays` are views of the buffers, by name: a change of either is one of the other. `parts` are the buffers, by the
    name that `buffer_of` has for their arrays, and the arrays that it does not name.
    """

    def __init__(self, arrays: Arrays, buffer_of: Mapping[str, str]) -> None:
        self.buffer_of = buffer_of
        self.members: dict[str, list[str]] = {}
        for name, buffer in buffer_of.items():
            self.members.setdefault(buffer, []).append(name)
        self.shapes = {name: arrays[name].shape for name in buffer_of}
        self.parts = self.gathered(arrays)
        views = {name: view for buffer in self.members for name, view in self.views(buffer, self.parts[buffer]).items()}
        self.arrays = {name: views.get(name, array) for name, array in arrays.items()}

    def gathered(self, arrays: Arrays) -> dict[str, Array]:
        """The parts of other arrays with the same names and shapes, such as gradients: copies, in buffers of their own.

        A buffer is (n,) for vectors and (1, n) for matrices, because optimisers let matrices alone decay.
        """
        parts: dict[str, Array] = {}
        for name, array in arrays.items():
            buffer = self.buffer_of.get(name)
            if buffer is None:
                parts[name] = array
            elif buffer not in parts:
                numbers = xp.concatenate([arrays[member].reshape(-1) for member in self.members[buffer]])
                parts[buffer] = numbers.reshape(1, -1) if array.ndim >= 2 else numbers
        return parts

    def views(self, buffer: str, numbers: Array) -> dict[str, Array]:
        """What lies in a buffer, by name and in its own shape."""
        views, start, numbers = {}, 0, numbers.reshape(-1)
        for name in self.members[buffer]:
            stop = start + math.prod(self.shapes[name])
            views[name] = numbers[start:stop].reshape(self.shapes[name])
            start = stop
        return views

    def state(self, optimizer: Optimizer) -> dict[str, Array]:
        """The state of an optimiser of `parts`, by the names of the arrays: "m.matrices" is "m.a" and "m.b"."""
        named: dict[str, Array] = {}
        for key, array in optimizer.state().items():
            kind, _, part = key.partition(".")
            views = self.views(part, array) if part in self.members else {part: array}
            named |= {f"{kind}.{name}" if part else kind: view for name, view in views.items()}
        return named


def flatten(arrays: Arrays, rule: type[Optimizer], factors: RateFactors) -> tuple[Flat, RateFactors]:
    """The arrays for an optimiser by this rule, and the factors of the learning rate of their parts.

    Buffers are made on a GPU, for rules that move each number by its own history alone. All numbers of one move alike.
    """
    buffer_of = {}
    if rule.elementwise and not on_cpu():
        for name, array in arrays.items():
            if array.size <= SMALL:
                buffer_of[name] = f"{'matrices' if array.ndim >= 2 else 'vectors'}, rate × {factors.get(name, 1.0)}"
    return Flat(arrays, buffer_of), {buffer_of.get(name, name): factor for name, factor in factors.items()}
