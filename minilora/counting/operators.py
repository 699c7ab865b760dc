"""The operators of outlines, and NumPy's universal functions and products of matrices for them."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from minilora.counting.outline import Outline, computed, follow, new


def elementwise(ufunc: np.ufunc, *operands: Any, out: Outline | None = None) -> Outline:
    """What NumPy's universal function makes of arrays and numbers."""
    arrays = [operand for operand in operands if isinstance(operand, Outline)]
    if out is not None:
        return _in_place(out, None)
    first, *others = arrays
    shape = first.shape
    if any(other.shape != shape for other in others):
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
    kinds: Any = [operand.dtype if hasattr(operand, "dtype") else type(operand) for operand in operands]
    return follow(computed(first, shape, _dtype_of(ufunc, *kinds)), ufunc, *operands)


@functools.cache
def _dtype_of(ufunc: np.ufunc, *kinds: Any) -> np.dtype[Any]:
    """The dtype of a result, from operands that are arrays of a dtype or Python's numbers, which adapt to them."""
    ones = [np.ones((1,) * (1 + (ufunc is np.matmul)), k) if isinstance(k, np.dtype) else k(1) for k in kinds]
    result: np.dtype[Any] = ufunc(*ones).dtype
    return result


def matmul(a: Outline, b: Outline, out: Outline | None = None) -> Outline:
    """(…, m, k) @ (…, k, n), which is 2 m k n operations for each of the products."""
    (*before_a, m, k), (*before_b, into, n) = a.shape, b.shape
    assert k == into, f"matmul of {a.shape} and {b.shape}"
    before = tuple(before_a) if before_a == before_b else np.broadcast_shapes(tuple(before_a), tuple(before_b))
    a.tally.product(2 * math.prod(before) * m * k * n)
    if out is not None:
        return out
    return new(a, (*before, m, n), a.dtype if a.dtype == b.dtype else _dtype_of(np.matmul, a.dtype, b.dtype))


def _operator(ufunc: np.ufunc, swapped: bool = False) -> Any:
    def operator(self: Outline, *others: Any) -> Outline:
        return elementwise(ufunc, *((*others, self) if swapped else (self, *others)))

    return operator


def _in_place(self: Outline, other: Any) -> Outline:
    self.tally.calls += 1
    self.numbers = None
    return self


_BINARY = {"sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide", "mod": "remainder"}
_BINARY |= {"add": "add", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
_BINARY |= {"lshift": "left_shift", "rshift": "right_shift"}
_OTHERS = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
_OTHERS |= {"neg": "negative", "invert": "invert", "abs": "absolute"}
_outline: Any = Outline
_outline.__matmul__ = matmul
for _name, _ufunc in (_BINARY | _OTHERS).items():
    setattr(Outline, f"__{_name}__", _operator(getattr(np, _ufunc)))
for _name, _ufunc in _BINARY.items():
    setattr(Outline, f"__r{_name}__", _operator(getattr(np, _ufunc), swapped=True))
    setattr(Outline, f"__i{_name}__", _in_place)
