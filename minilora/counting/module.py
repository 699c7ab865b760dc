"""NumPy's interface for outlines: what stands behind `xp` while a step is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minilora.backend import use_module
from minilora.counting.operators import elementwise, matmul
from minilora.counting.outline import Outline, computed, follow, new
from minilora.counting.tally import Allocation, Tally


class OutlineModule:
    """The functions of NumPy that the step and the methods use. Any other is an AttributeError that names it.

    `on_cpu` says which way is counted where the code goes one way on the CPU and another on a GPU.
    """

    def __init__(self, tally: Tally, on_cpu: bool = True) -> None:
        self.tally = tally
        self.on_cpu = on_cpu
        self.random, self.linalg = Random(self), Decompositions()

    def __getattr__(self, name: str) -> Any:
        known = getattr(np, name)
        if isinstance(known, np.ufunc):
            return Elementwise(known)
        if isinstance(known, type) or not callable(known):
            return known
        raise AttributeError(f"xp.{name} cannot be counted: counting/module.py does not have it")

    def outline(self, shape: tuple[int, ...], dtype: Any = float) -> Outline:
        """An array that comes from the host: no call."""
        return Outline(self.tally, shape, dtype)

    def asarray(self, array: Any, dtype: Any = None) -> Outline:
        """Outlines as they are, and the outline of a host array, which on the CPU is that array itself."""
        if isinstance(array, Outline):
            return array
        array = np.asarray(array, dtype)
        allocation = Allocation(self.tally, 0 if self.on_cpu else array.nbytes)
        result = Outline(self.tally, array.shape, array.dtype, allocation)
        return follow(result, lambda: array)

    # --- New arrays ---

    def empty(self, shape: Any, dtype: Any = float) -> Outline:
        return self.outline(_shape(shape), dtype)

    def full(self, shape: Any, value: Any, dtype: Any = None) -> Outline:
        result = self.empty(shape, dtype or np.asarray(value).dtype)
        self.tally.calls += 1
        return follow(result, lambda: np.full(shape, value, dtype))

    def zeros(self, shape: Any, dtype: Any = float) -> Outline:
        return self.full(shape, 0, dtype)

    def ones(self, shape: Any, dtype: Any = float) -> Outline:
        return self.full(shape, 1, dtype)

    def empty_like(self, x: Outline, dtype: Any = None) -> Outline:
        return new(x, x.shape, dtype or x.dtype)

    def zeros_like(self, x: Outline, dtype: Any = None) -> Outline:
        return self.zeros(x.shape, dtype or x.dtype)

    def ones_like(self, x: Outline, dtype: Any = None) -> Outline:
        return self.ones(x.shape, dtype or x.dtype)

    def arange(self, *bounds: int) -> Outline:
        self.tally.calls += 1
        return follow(self.outline((len(range(*bounds)),), np.int64), lambda: np.arange(*bounds))

    # --- Arrays of arrays ---

    def concatenate(self, arrays: Sequence[Outline], axis: int = 0) -> Outline:
        first = arrays[0]
        shape, axis = list(first.shape), axis % first.ndim
        shape[axis] = sum(array.shape[axis] for array in arrays)
        result = computed(first, tuple(shape), np.result_type(*(array.dtype for array in arrays)))
        return follow(result, lambda *parts: np.concatenate(parts, axis), *arrays)

    def stack(self, arrays: Sequence[Outline], axis: int = 0) -> Outline:
        shape = list(arrays[0].shape)
        shape.insert(axis, len(arrays))
        return computed(arrays[0], tuple(shape), arrays[0].dtype)

    def split(self, x: Outline, parts: int, axis: int = 0) -> list[Outline]:
        size, before = x.shape[axis] // parts, (slice(None),) * (axis % x.ndim)
        return [x[(*before, slice(i * size, (i + 1) * size))] for i in range(parts)]

    def broadcast_to(self, x: Outline, shape: tuple[int, ...]) -> Outline:
        return x.broadcast_to(shape)

    def ascontiguousarray(self, x: Outline) -> Outline:
        return x if x.contiguous else x.copy()

    # --- Choosing ---

    def where(self, condition: Outline, a: Any, b: Any) -> Outline:
        shapes = (x.shape for x in (condition, a, b) if isinstance(x, Outline))
        dtype = np.result_type(*(x.dtype if isinstance(x, Outline) else x for x in (a, b)))
        return follow(computed(condition, np.broadcast_shapes(*shapes), dtype), np.where, condition, a, b)

    def copyto(self, target: Outline, source: Any, where: Any = True) -> None:
        target.numbers = None
        self.tally.calls += 1

    def take_along_axis(self, x: Outline, indices: Outline, axis: int) -> Outline:
        return computed(x, indices.shape, x.dtype)

    def flatnonzero(self, x: Outline) -> Outline:
        """The one function whose result has a shape that depends on numbers."""
        if x.numbers is None:
            raise TypeError("flatnonzero: which entries are not zero does not follow from the batch")
        found = np.flatnonzero(x.numbers())
        return follow(computed(x, found.shape, np.int64), lambda: found)

    def fuse(self, kernel_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """CuPy's way to make one call of a formula: nothing in between is ever an array."""

        def decorate(formula: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                tally = self.tally
                calls, most = tally.calls, dict(tally.most)
                result = formula(*arguments)
                tally.calls, tally.most = calls + 1, most
                tally.enter(tally.moment)
                return result

            return call

        return decorate

    def matmul(self, a: Outline, b: Outline, out: Outline | None = None) -> Outline:
        return matmul(a, b, out)


class Elementwise:
    """A universal function of NumPy: `xp.exp(x, out=x)`, `xp.add.at(x, i, y)`."""

    def __init__(self, ufunc: np.ufunc) -> None:
        self.ufunc = ufunc

    def __call__(self, *operands: Any, out: Outline | None = None) -> Outline:
        return elementwise(self.ufunc, *operands, out=out)

    def at(self, target: Outline, indices: Any, values: Any) -> None:
        target.numbers = None
        target.tally.calls += 1


class Decompositions:
    """`xp.linalg`."""

    def svd(self, x: Outline, full_matrices: bool = True) -> tuple[Outline, Outline, Outline]:
        assert not full_matrices
        (out, into), rank = x.shape, min(x.shape)
        return computed(x, (out, rank), x.dtype), new(x, (rank,), x.dtype), new(x, (rank, into), x.dtype)


class Random:
    """`xp.random`, and the generator that it makes; methods that draw on the host are given one too."""

    def __init__(self, module: OutlineModule) -> None:
        self.module = module

    def default_rng(self, seed: int) -> Random:
        return self

    def random(self, shape: Any, dtype: Any = float) -> Outline:
        self.module.tally.calls += 1
        return self.module.empty(shape, dtype)

    standard_normal = random

    def uniform(self, low: float, high: float, shape: Any) -> Outline:
        return self.random(shape)

    normal = uniform

    def integers(self, high: int, size: Any) -> Outline:
        return self.random(size, np.int64)


@contextmanager
def outlines(on_cpu: bool = True) -> Iterator[OutlineModule]:
    """`xp` makes outlines, with a tally of its own."""
    module = OutlineModule(Tally(), on_cpu)
    previous = use_module(module)
    try:
        yield module
    finally:
        use_module(previous)


def _shape(shape: Any) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)
