"""A stand-in for a device's array module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.strategies import TINY

from minilora import backend
from minilora.data.batches import collate
from minilora.data.examples import Example
from minilora.model.config import Config
from minilora.model.names import LINEAR


class DeviceArray:
    """An array that only the device's own functions, methods and operators can touch."""

    __array_ufunc__ = None  # NumPy's operators and ufuncs refuse it
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, held: Any) -> None:
        self.held = held

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a NumPy function was called on a device array: use xp, or to_host")

    def get(self) -> np.ndarray:
        return np.array(self.held)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy's other ways in, such as __array_interface__
            raise AttributeError(name)
        attribute = getattr(self.held, name)
        return on_device(attribute) if callable(attribute) else wrap(attribute)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.held[unwrap(index)] = unwrap(value)

    def __iter__(self) -> Iterator[Any]:
        return map(wrap, self.held)

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)


def wrap(value: Any) -> Any:
    """What a function of the device returns. Reductions give arrays without dimensions, as CuPy's do."""
    if isinstance(value, np.ndarray | np.generic):
        return DeviceArray(np.asarray(value))
    return type(value)(map(wrap, value)) if isinstance(value, tuple | list) else value


def unwrap(value: Any) -> Any:
    """What a function of the device is given: device arrays and Python's numbers."""
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array was given to the device: use to_device")
    if isinstance(value, DeviceArray):
        return value.held
    return type(value)(map(unwrap, value)) if type(value) in (tuple, list) else value


def on_device(function: Any) -> Any:
    """The same function, of device arrays."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrap(function(*map(unwrap, args), **{name: unwrap(value) for name, value in kwargs.items()}))

    return wrapped


def operation(name: str) -> Any:
    def apply(self: DeviceArray, *others: Any) -> Any:
        result = getattr(self.held, name)(*map(unwrap, others))
        if name.startswith("__i") and name not in ("__invert__", "__index__"):
            self.held = result
            return self
        return result if result is NotImplemented else wrap(result)

    return apply


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
OPERATORS = [f"__{kind}{name}__" for name in BINARY for kind in ("", "r", "i")]


class Namespace:
    """A module of the device, such as `random`, or a ufunc with its methods, such as `add.at`."""

    def __init__(self, numpy: Any) -> None:
        self.numpy = numpy

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.numpy, name)
        if isinstance(attribute, type):  # a dtype
            return attribute
        if name == "default_rng":
            return lambda seed: Namespace(attribute(seed))
        return Namespace(attribute) if callable(attribute) or name == "random" else attribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return on_device(self.numpy)(*args, **kwargs)


class Device(Namespace):
    """The array module. `asarray` is its one door: it takes NumPy arrays."""

    def __init__(self) -> None:
        super().__init__(np)

    def asarray(self, array: Any, dtype: Any = None) -> DeviceArray:
        return array if isinstance(array, DeviceArray) else DeviceArray(np.array(array, dtype))


@pytest.fixture
def device() -> Iterator[None]:
    previous = backend.use_module(Device())
    yield
    backend.use_module(previous)


BATCHES = [
    collate(
        [[Example([1, 2, 3, 4], [False, True, True, True]), Example([5, 6], [True, True])], [Example([7], [True])]], 0
    ),
    collate([[Example([3, 2, 1], [False, False, True])]], 0, left=True),
]
UNTIED = Config(**{**vars(TINY), "tie_word_embeddings": False, "biased": LINEAR})
