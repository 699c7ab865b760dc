"""Arrays that have a shape and a dtype but no numbers: the step runs on them, and is counted while it runs.

An outline of a hundred billion numbers takes no more memory than one of ten. Every operation makes the outline of its
result, books its bytes and one call, and computes nothing. What is a view in NumPy is a view here: it shares the
allocation and costs no call.

The course of a step depends on a few numbers: which tokens have a label, which keys a block of queries sees. All of
them follow from the integers of the batch. So an outline of integers or booleans may have `numbers`, a function that
works them out; it is called only where the step asks. What no number is known of is 1 when it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minilora.counting.tally import Allocation, Tally

Numbers = Callable[[], np.ndarray]
_BYTE = np.zeros((), np.int8)


class Outline:
    """An array without numbers.

    `layout` is a NumPy array of the same shape and strides, by which NumPy itself says what a view looks like; None
    stands for one in C order. It reaches far beyond the one byte that it is made of, and must never be read.
    """

    __slots__ = ("_layout", "allocation", "dtype", "numbers", "shape", "tally")
    __array_ufunc__ = None  # NumPy's own arrays and scalars leave their operators to these
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, tally: Tally, shape: tuple[int, ...], dtype: Any, allocation: Allocation | None = None, layout: Any = None
    ) -> None:
        self.tally = tally
        self.shape = shape
        self.dtype = dtype if isinstance(dtype, np.dtype) else np.dtype(dtype)
        self.allocation = allocation or Allocation(tally, math.prod(shape) * self.dtype.itemsize)
        self._layout = layout
        self.numbers: Numbers | None = None

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an outline has no numbers, so it is no NumPy array")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.linalg.qr:  # (out, in) → Q and R
            (out, into), rank = self.shape, min(self.shape)
            return new(self, (out, rank), self.dtype), new(self, (rank, into), self.dtype)
        return NotImplemented

    # --- What NumPy's arrays say of themselves ---

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def real(self) -> Outline:
        return self

    @property
    def T(self) -> Outline:
        return self.transpose()

    @property
    def layout(self) -> Any:
        if self._layout is None:
            return np.lib.stride_tricks.as_strided(_BYTE, self.shape, _c_strides(self.shape))
        return self._layout

    @property
    def contiguous(self) -> bool:
        return self._layout is None

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Outline]:
        return (self[i] for i in range(len(self)))

    def item(self) -> Any:
        return 1 if self.numbers is None else self.numbers().item()

    def tolist(self) -> Any:
        return np.ones(self.shape).tolist() if self.numbers is None else self.numbers().tolist()

    def __int__(self) -> int:
        return int(self.item())

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    # --- Views ---

    def _view(self, layout: Any, how: Callable[[Any], Any]) -> Outline:
        view = Outline(
            self.tally, layout.shape, self.dtype, self.allocation, None if layout.flags.c_contiguous else layout
        )
        return follow(view, how, self)

    def transpose(self, *axes: int) -> Outline:
        return self._view(self.layout.transpose(*axes), lambda x: x.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> Outline:
        return self._view(self.layout.swapaxes(a, b), lambda x: x.swapaxes(a, b))

    def broadcast_to(self, shape: tuple[int, ...]) -> Outline:
        return self._view(np.broadcast_to(self.layout, shape), lambda x: np.broadcast_to(x, shape))

    def view(self, dtype: Any) -> Outline:
        assert np.dtype(dtype).itemsize == self.dtype.itemsize
        return Outline(self.tally, self.shape, dtype, self.allocation, self._layout)

    def reshape(self, *shape: Any) -> Outline:
        """A view where the strides allow one, else a copy."""
        asked = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        known = math.prod(n for n in asked if n != -1)
        full = tuple(self.size // known if n == -1 else n for n in asked)
        if self._layout is None:
            view = Outline(self.tally, full, self.dtype, self.allocation)
            return follow(view, lambda x: x.reshape(full), self)
        layout = self._layout.view()
        try:
            layout.shape = full  # refuses where it would have to copy
        except AttributeError:
            return follow(computed(self, full, self.dtype), lambda x: x.reshape(full), self)
        return self._view(layout, lambda x: x.reshape(full))

    def ravel(self) -> Outline:
        return self.reshape(-1)

    def __getitem__(self, index: Any) -> Outline:
        parts = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(part, Outline | np.ndarray) for part in parts):
            whole = parts if any(part is ... for part in parts) else (*parts, ...)  # with …, never a scalar, but a view
            return self._view(self.layout[whole], lambda x: x[index])
        arrays = [i for i, part in enumerate(parts) if isinstance(part, Outline | np.ndarray)]
        assert arrays == list(range(arrays[0], arrays[-1] + 1)), "index arrays that stand apart"
        before = self.layout[parts[: arrays[0]]].shape[: arrays[0]]
        chosen = np.broadcast_shapes(*(parts[i].shape for i in arrays))
        indices = [parts[i].astype(np.int64, copy=False) for i in arrays]  # NumPy looks up by these alone
        result = computed(self, before + chosen + self.shape[len(parts) :], self.dtype)
        self.tally.calls -= sum(parts[i].dtype != np.int64 for i in arrays)  # that is a part of the same call
        del indices
        if len(parts) == 1:
            return follow(result, lambda x, i: x[i], self, parts[0])
        return result

    def __setitem__(self, index: Any, value: Any) -> None:
        """One call; none where an array gets what is in that place already, as at the end of `a[i] += b`."""
        self.numbers = None
        if not (isinstance(value, Outline) and value.allocation is self.allocation):
            self.tally.calls += 1

    # --- Copies, and what makes a new array ---

    def astype(self, dtype: Any, copy: bool = True) -> Outline:
        if self.dtype == dtype and not copy:
            return self
        return follow(computed(self, self.shape, dtype), lambda x: x.astype(dtype), self)

    def copy(self) -> Outline:
        return self.astype(self.dtype)

    def take(self, indices: Outline, axis: int) -> Outline:
        assert axis == 0
        return self[indices]

    def _reduced(self, name: str, dtype: Any, axis: Any = None, keepdims: bool = False) -> Outline:
        axes = range(self.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        gone = {a % self.ndim for a in axes} if self.ndim else set()
        kept = tuple(1 if i in gone else n for i, n in enumerate(self.shape) if keepdims or i not in gone)
        return follow(
            computed(self, kept, dtype), lambda x: np.asarray(getattr(x, name)(axis=axis, keepdims=keepdims)), self
        )

    def sum(self, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Outline:
        own = np.dtype(np.int64) if self.dtype.kind in "bi" else self.dtype
        return self._reduced("sum", dtype or own, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Outline:
        return self._reduced("mean", self.dtype, axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Outline:
        return self._reduced("max", self.dtype, axis, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> Outline:
        return self._reduced("min", self.dtype, axis, keepdims)

    def any(self, axis: Any = None, keepdims: bool = False) -> Outline:
        return self._reduced("any", np.bool_, axis, keepdims)

    def all(self, axis: Any = None, keepdims: bool = False) -> Outline:
        return self._reduced("all", np.bool_, axis, keepdims)

    def argmax(self, axis: Any = None) -> Outline:
        return self._reduced("argmax", np.int64, axis)


def new(like: Outline, shape: tuple[int, ...], dtype: Any) -> Outline:
    """Room for an array, with nothing done to it yet."""
    return Outline(like.tally, shape, dtype)


def computed(like: Outline, shape: tuple[int, ...], dtype: Any) -> Outline:
    """The result of one call."""
    like.tally.calls += 1
    return Outline(like.tally, shape, dtype)


def follow(result: Outline, how: Callable[..., Any], *operands: Any) -> Outline:
    """`result`, whose integers or booleans are `how(…)` of the operands' if those are known. They are not kept alive:
    the function holds the operands' functions, not the operands."""
    if result.dtype.kind in "bi":
        ways = [operand.numbers if isinstance(operand, Outline) else operand for operand in operands]
        if all(way is not None for way in ways):
            result.numbers = lambda: how(*(way() if callable(way) else way for way in ways))
    return result


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
