"""NumPy behind `xp`, with every operation on arrays seen: what a counted step is held against.

An array is wrapped; its operators, methods and the module's functions do what NumPy's do. A call is an operation that
makes an array or writes to one. What returns a view of what it was given is none, nor is the way from or to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minilora.backend import use_module

FREE = {"asarray", "empty", "empty_like"}  # functions that compute nothing
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
OPERATORS = [f"__{kind}{name}__" for name in BINARY for kind in ("", "r")]
OPERATORS += [f"__{name}__" for name in ("neg", "invert", "abs", "eq", "ne", "lt", "le", "gt", "ge", "getitem")]


class WrappedModule:
    """NumPy, counting `calls`, and the operations of matrix products in `flops`."""

    on_cpu = True

    def __init__(self) -> None:
        self.calls = 0
        self.flops = 0

    def __getattr__(self, name: str) -> Any:
        known = getattr(np, name)
        if isinstance(known, type):
            return known
        return Wrapped(self, known) if callable(known) or name in ("random", "linalg") else known

    def seen(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What NumPy returns, wrapped, and counted."""
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        result = function(*plain_args, **plain_kwargs)
        owner = getattr(function, "__self__", None)  # of an operator or a method
        given = [x for x in (owner, *_leaves(plain_args)) if isinstance(x, np.ndarray)]
        if "matmul" in name:
            self.flops += 2 * result.size * given[0].shape[-1]
        made = [x for x in _leaves(result) if isinstance(x, np.ndarray | np.generic) and x.size]
        views = name == "__getitem__" and isinstance(result, np.generic)
        views |= all(any(np.shares_memory(x, y) for y in given) for x in made) and result is not None
        if not (views or name in FREE) or kwargs.get("out") is not None:
            self.calls += 1
        return wrap(self, result)


class Wrapped:
    """An array, a function or a namespace of NumPy."""

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, module: WrappedModule, held: Any) -> None:
        self.module, self.held = module, held

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "get":
            raise AttributeError(name)
        attribute = getattr(self.held, name)
        if isinstance(attribute, np.ndarray) or not callable(attribute) or isinstance(attribute, np.dtype | type):
            return wrap(self.module, attribute)
        if name == "default_rng":
            return lambda seed: Wrapped(self.module, attribute(seed))
        return Wrapped(self.module, attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.seen(getattr(self.held, "__name__", ""), self.held, *args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        if not (isinstance(value, Wrapped) and np.shares_memory(self.held, value.held)):
            self.module.calls += 1
        self.held[plain(index)] = plain(value)

    def __iter__(self) -> Iterator[Any]:
        return (wrap(self.module, x) for x in self.held)

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.asarray(self.held)


def _operator(name: str) -> Any:
    def operator(self: Wrapped, *others: Any) -> Any:
        return self.module.seen(name, getattr(self.held, name), *others)

    return operator


def _in_place(name: str) -> Any:
    def operator(self: Wrapped, other: Any) -> Wrapped:
        self.module.calls += 1
        self.held = getattr(self.held, name)(plain(other))
        return self

    return operator


for _name in OPERATORS:
    setattr(Wrapped, _name, _operator(_name))
for _name in BINARY:
    setattr(Wrapped, f"__i{_name}__", _in_place(f"__i{_name}__"))


def plain(value: Any) -> Any:
    """The same without wrapping, in tuples, lists and dicts too."""
    if isinstance(value, Wrapped):
        return value.held
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def wrap(module: WrappedModule, value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return Wrapped(module, np.asarray(value))
    return [wrap(module, x) for x in value] if isinstance(value, tuple | list) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for x in value:
            yield from _leaves(x)
    else:
        yield value


@contextmanager
def wrapped_numpy() -> Iterator[WrappedModule]:
    module = WrappedModule()
    previous = use_module(module)
    try:
        yield module
    finally:
        use_module(previous)
