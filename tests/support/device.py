"""A stand-in for CuPy: NumPy behind walls, with CuPy's manners.

- Its arrays do not mix with NumPy's. They enter by `asarray` and leave by `get`. NumPy's scalars do not mix either,
  because CuPy 13 and 14 do not agree on the dtype of the result.
- Calls have to fit the real CuPy's signatures and dtypes, where CuPy is installed (`cupy_rules`).
- In float32, subnormal numbers are zero: CuPy compiles its kernels so.
- Indices beyond the end count on from the start. Two that are equal may not be assigned to: which wins is undefined.
- A random generator has the few methods of CuPy's, and `empty` gives what one must not rely on.
- `waits` lists what the host has waited for: the device runs behind, and whoever asks for a number stops until it is
  there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.cupy_rules import check_call, check_dtypes
from support.strategies import TINY

from minilora import backend
from minilora.data.batches import collate
from minilora.data.examples import Example
from minilora.model.config import Config
from minilora.model.names import LINEAR

WAITING_FUNCTIONS = {"flatnonzero", "nonzero", "argwhere", "unique", "linalg.svd"}
WAITING_METHODS = {"get", "item", "tolist", "tobytes", "nonzero"}
MOVING = {"view", "reshape", "transpose", "swapaxes", "copy", "repeat", "take", "ravel"}  # methods that compute nothing
SMALLEST = np.finfo(np.float32).tiny
UFUNCS = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide"}
UFUNCS |= {"mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
UFUNCS |= {"lshift": "left_shift", "rshift": "right_shift", "matmul": "matmul"}
UNARY = {"neg": "negative", "invert": "invert", "abs": "absolute"}
COMPARISONS = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater"}
COMPARISONS |= {"ge": "greater_equal"}
SCATTERED = {"?", "i", "I", "L", "Q", "e", "f", "d", "F", "D"}  # what `add.at` has atomic additions for

waits: list[str] = []


class DeviceArray:
    """An array that only the device's own functions, methods and operators can touch."""

    __array_ufunc__ = None  # NumPy's operators and ufuncs refuse it
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, held: np.ndarray) -> None:
        self.held = held

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a NumPy function was called on a device array: use xp, or to_host")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy's other ways in, such as __array_interface__
            raise AttributeError(name)
        attribute = getattr(np.ndarray, "tobytes" if name == "get" else name)
        return Method(self, name) if callable(attribute) else wrap(getattr(self.held, name))

    def __getitem__(self, index: Any) -> DeviceArray:
        return wrap(self.held[wrapped_around(self.held.shape, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        place = wrapped_around(self.held.shape, index)
        parts = place if isinstance(place, tuple) else (place,)
        if any(isinstance(part, np.ndarray) and part.dtype != bool for part in parts):
            written = np.arange(self.held.size).reshape(self.held.shape)[place]
            if len(np.unique(written)) < written.size:
                raise TypeError("two equal indices were assigned to: on a GPU, which of the two wins is undefined")
        self.held[place] = unwrap(value)

    def __iter__(self) -> Iterator[Any]:
        return map(wrap, self.held)

    def __len__(self) -> int:
        return len(self.held)


def wrapped_around(shape: tuple[int, ...], index: Any) -> Any:
    """The index as NumPy takes it. Integers in arrays count around the axis, which is CuPy's way."""
    many = isinstance(index, tuple)
    axis, parts = 0, []
    for part in index if many else (index,):
        part = unwrap(part)
        if isinstance(part, np.ndarray) and part.dtype == bool:
            waits.append("a mask as index")
            axis += part.ndim
        elif isinstance(part, np.ndarray) and part.ndim:
            part, axis = part % shape[axis], axis + 1
        elif part is Ellipsis:
            axis = len(shape) - (sum(x is not None for x in index[len(parts) + 1 :]) if many else 0)
        elif part is not None:
            axis += 1
        parts.append(part)
    return tuple(parts) if many else parts[0]


def flushed(value: Any) -> Any:
    """A result without subnormal numbers, if it is in float32."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype == np.float32:
        small = np.abs(value) < SMALLEST
        return np.where(small, np.float32(0), value) if small.any() else value
    return value


def wrap(value: Any) -> Any:
    """What a function of the device returns. Reductions give arrays without dimensions, as CuPy's do."""
    if isinstance(value, np.ndarray | np.generic):
        return DeviceArray(np.asarray(value))
    if isinstance(value, tuple):  # perhaps a named one
        return tuple(map(wrap, value))
    return list(map(wrap, value)) if isinstance(value, list) else value


def unwrap(value: Any) -> Any:
    """What a function of the device is given: device arrays and Python's numbers."""
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array was given to the device: use to_device")
    if isinstance(value, np.generic):
        raise TypeError("a NumPy scalar was given to the device: what dtype comes out depends on CuPy's version")
    if isinstance(value, DeviceArray):
        return value.held
    return type(value)(map(unwrap, value)) if type(value) in (tuple, list) else value


def unwrapped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    return [unwrap(x) for x in args], {name: unwrap(x) for name, x in kwargs.items()}


def compute(ufunc: np.ufunc, *operands: Any, out: np.ndarray | None = None, **kwargs: Any) -> Any:
    """A ufunc of NumPy, with CuPy's dtypes and without subnormals; cuBLAS, which makes products, knows subnormals."""
    check_dtypes(ufunc, operands)
    if ufunc is np.matmul:
        return ufunc(*operands, out=out)
    with np.errstate(all="ignore"):  # a GPU warns of nothing
        result = flushed(ufunc(*operands, **kwargs))
    if out is None:
        return result
    np.copyto(out, result, casting="same_kind")
    return out


class Method:
    """A method of an array."""

    def __init__(self, owner: DeviceArray, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_call(f"ndarray.{self.name}", (self.owner, *args), kwargs)
        args, kwargs = unwrapped(args, kwargs)
        held = self.owner.held
        if self.name in WAITING_METHODS:
            waits.append(self.name)
        if self.name == "get":
            return np.array(held)
        if self.name == "take":
            return wrap(held.take(*args, **kwargs, mode="wrap"))
        with np.errstate(all="ignore"):
            if self.name in MOVING:
                return wrap(getattr(held, self.name)(*args, **kwargs))
            if self.name == "astype" and not kwargs.get("copy", True) and held.dtype == np.dtype(args[0]):
                return self.owner
            return wrap(flushed(getattr(held, self.name)(*args, **kwargs)))


class Function:
    """A function of the module, a ufunc with its `at`, or a module within it, such as `random`."""

    def __init__(self, name: str, numpy: Any) -> None:
        self.name, self.numpy = name, numpy

    def __getattr__(self, name: str) -> Any:
        return Function(f"{self.name}.{name}", getattr(self.numpy, "Philox" if name == "Philox4x3210" else name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_call(self.name, args, kwargs)
        args, kwargs = unwrapped(args, kwargs)
        if self.name in WAITING_FUNCTIONS:
            waits.append(self.name)
        if self.name == "random.Philox4x3210":
            return self.numpy(*map(int, args))
        if self.name in ("random.Generator", "random.default_rng"):
            return Generator(self.numpy(*args, **kwargs))
        if self.name == "add.at":
            target, index, values = args
            if target.dtype.char not in SCATTERED:
                raise TypeError(f"CuPy's add.at has no {target.dtype}")
            return self.numpy(target, index % len(target), values)
        if self.name == "take_along_axis":
            array, index, axis = args[0], args[1], kwargs["axis"]
            return wrap(np.take_along_axis(array, index % array.shape[axis], axis))
        if isinstance(self.numpy, np.ufunc):
            return wrap(compute(self.numpy, *args, **kwargs))
        result = self.numpy(*args, **kwargs)
        if self.name in ("empty", "empty_like") and result.dtype.kind in "fc":
            result.fill(np.nan)
        return wrap(result)


class Generator:
    """What `default_rng` makes."""

    def __init__(self, numpy: np.random.Generator) -> None:
        self.numpy = numpy

    def __getattr__(self, name: str) -> Any:
        def draw(*args: Any, **kwargs: Any) -> Any:
            check_call(f"random.Generator.{name}", (self, *args), kwargs)
            return wrap(getattr(self.numpy, name)(*args, **kwargs))

        return draw


class Device:
    """The array module."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(np, name)
        if isinstance(attribute, type) and issubclass(attribute, np.generic):
            return attribute  # a dtype
        if not (callable(attribute) or name in ("random", "linalg")):
            return attribute  # a number
        return Function(name, attribute)

    def asarray(self, array: Any, dtype: Any = None) -> DeviceArray:
        """The one door by which NumPy's arrays come in."""
        check_call("asarray", (array, dtype), {})
        return array if isinstance(array, DeviceArray) else DeviceArray(np.array(array, dtype))


def operator(name: str, swapped: bool = False, in_place: bool = False) -> Callable[..., Any]:
    ufunc = getattr(np, name)

    def apply(self: DeviceArray, *others: Any) -> Any:
        operands = [self.held, *map(unwrap, others)]
        if in_place:
            compute(ufunc, *operands, out=self.held)
            return self
        return wrap(compute(ufunc, *(reversed(operands) if swapped else operands)))

    return apply


def conversion(name: str) -> Callable[..., Any]:
    def convert(self: DeviceArray) -> Any:
        waits.append(name)
        return getattr(self.held, name)()

    return convert


for _name, _ufunc in (UFUNCS | UNARY | COMPARISONS).items():
    setattr(DeviceArray, f"__{_name}__", operator(_ufunc))
for _name, _ufunc in UFUNCS.items():
    setattr(DeviceArray, f"__r{_name}__", operator(_ufunc, swapped=True))
    setattr(DeviceArray, f"__i{_name}__", operator(_ufunc, in_place=True))
for _name in ("bool", "int", "float", "complex", "index"):
    setattr(DeviceArray, f"__{_name}__", conversion(f"__{_name}__"))


@contextmanager
def on_the_device() -> Iterator[list[str]]:
    """The stand-in behind `xp`, and what is waited for meanwhile."""
    previous = backend.use_module(Device())
    waits.clear()
    try:
        yield waits
    finally:
        backend.use_module(previous)


@pytest.fixture
def device() -> Iterator[None]:
    with on_the_device():
        yield


BATCHES = [
    collate(
        [[Example([1, 2, 3, 4], [False, True, True, True]), Example([5, 6], [True, True])], [Example([7], [True])]], 0
    ),
    collate([[Example([3, 2, 1], [False, False, True])]], 0, left=True),
]
UNTIED = Config(**{**vars(TINY), "tie_word_embeddings": False, "biased": LINEAR})
