"""Somebody's implementation of LoRA, as the laws of `specification/laws` call it: a file of functions, loaded by path.

The names and shapes are those of `specification/implementations/template.py`. This file needs NumPy and pytest alone.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

IMPLEMENTATIONS = Path(__file__).parents[1] / "specification" / "implementations"
TEMPLATE = IMPLEMENTATIONS / "template.py"
OURS = IMPLEMENTATIONS / "minilora_itself.py"
DTYPES = {"float32": np.float32, "float64": np.float64}
STEP, IMAGINARY_STEP = {"float32": 2.0**-3, "float64": 2.0**-7}, 1e-30
convention = pytest.mark.convention  # a law that others keep in another way without being wrong
WEIGHTS = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}  # of f(x + kh) − f(x − kh), for an error of the order h⁶


def functions_asked_for() -> list[str]:
    """The names that an implementation may offer, in the template's order."""
    return [node.name for node in ast.parse(TEMPLATE.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]


class Called(NamedTuple):
    result: Any
    given: list[Any]  # the arguments as they were after the call


class Implementation:
    """The functions of a file. One that is missing, or raises NotImplementedError, skips the law that calls it."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.module: Any = load(self.path)
        self.dtype = str(getattr(self.module, "DTYPE", "float64"))
        self.complex = bool(getattr(self.module, "COMPLEX", False))
        if self.dtype not in DTYPES:
            raise ValueError(f'{path}: DTYPE is {self.dtype!r}: say "float32" or "float64"')
        if self.complex and self.dtype != "float64":
            raise ValueError(f'{path}: COMPLEX needs DTYPE = "float64"')
        asked = functions_asked_for()
        own = {name for name, value in vars(self.module).items() if callable(value) and not name.startswith("_")}
        if not own & set(asked):
            raise ValueError(f"{path}: offers none of the functions of {TEMPLATE}")
        for name in sorted(own - set(asked)):
            if near := difflib.get_close_matches(name, sorted(set(asked) - own), cutoff=0.9):
                raise ValueError(f"{path}: no law asks for {name}: is it {near[0]}?")

    @property
    def exact(self) -> float:
        """The relative error that rounding may leave in a value."""
        return {"float32": 2e-5, "float64": 1e-11}[self.dtype]

    @property
    def exact_slope(self) -> float:
        """The relative error that rounding and the step may leave in a derivative."""
        return {"float32": 3e-4, "float64": 1e-9}[self.dtype]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # Python's and other tools' questions
            raise AttributeError(name)
        return lambda *arguments: plain(self.call(name, *arguments).result)

    def call(self, name: str, *arguments: Any) -> Called:
        """Call a function on copies of the arguments, in the implementation's dtype."""
        function = getattr(self.module, name, None)
        if function is None:
            pytest.skip(f"not offered: {name}")
        is_complex = any(isinstance(argument, np.ndarray) and argument.dtype.kind == "c" for argument in arguments)
        dtype = np.complex128 if is_complex else DTYPES[self.dtype]
        given = [copied(argument, dtype) for argument in arguments]
        try:
            result = function(*given)
        except NotImplementedError:
            pytest.skip(f"not offered: {name}")
        assert result is not None or name == "adapter_write", f"{name} returned nothing"
        return Called(result, given)

    def slope(self, loss: Callable[[np.ndarray], Any], x: np.ndarray, d: np.ndarray) -> float:
        """The derivative of `loss` at x in the direction d.

        By the complex step, or by central differences of sixth order: exact for polynomials up to the sixth degree.
        """
        if self.complex:
            return float(np.imag(loss(x + 1j * IMAGINARY_STEP * d)) / IMAGINARY_STEP)
        h = STEP[self.dtype]
        return sum(weight * (loss(x + k * h * d) - loss(x - k * h * d)) for k, weight in WEIGHTS.items()) / h


def copied(argument: Any, dtype: Any) -> Any:
    """The same values in arrays of their own, all but integers in one dtype."""
    if isinstance(argument, np.ndarray):
        return argument.astype(dtype if argument.dtype.kind in "fc" else argument.dtype)
    if isinstance(argument, list | tuple):
        return type(argument)(copied(part, dtype) for part in argument)
    if isinstance(argument, dict):
        return {key: copied(part, dtype) for key, part in argument.items()}
    return argument


def load(path: Path) -> ModuleType:
    """Run the file. ValueError if there is none or if it fails, with the line that does."""
    if not path.is_file():
        raise ValueError(f"--implementation {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"implementation_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # a file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{place_in(path, error)}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def place_in(path: Path, error: BaseException) -> str:
    """The file, and the last of its lines that led to the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"{path}:{lines[-1]}" if lines else f"{path}"


def plain(result: Any) -> Any:
    """Arrays as float64 or complex128, so that the laws compute without rounding of their own."""
    if isinstance(result, tuple | list):
        return tuple(map(plain, result))
    if isinstance(result, dict):
        return {key: plain(part) for key, part in result.items()}
    array = np.asarray(result)
    return array.astype({"f": np.float64, "c": np.complex128}.get(array.dtype.kind, array.dtype))


def agree(what: str, found: Any, expected: Any, tolerance: float, terms: Any = 0.0) -> None:
    """`found` equals `expected` but for rounding, relative to the largest of the `terms` that were added up."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what} has the shape {found.shape} instead of {expected.shape}"
    if not found.size:
        return
    size = max(1.0, float(np.abs(expected).max()), float(np.abs(terms).max()))
    apart = np.where(np.isfinite(found), np.abs(found - expected), np.inf)
    worst = np.unravel_index(int(apart.argmax()), found.shape)
    at = f" at {[int(i) for i in worst]}" if found.ndim else ""
    assert apart[worst] <= tolerance * size, f"{what} is {found[worst]:.7g} instead of {expected[worst]:.7g}{at}"


def check_gradients(
    implementation: Implementation,
    function: str,
    arguments: dict[str, Any],
    gradients: dict[str, np.ndarray],
    dy: Any,
    seed: int,
) -> None:
    """Each gradient is that of L = Σ y ⊙ dy, y being the function of the arguments: told by a random direction."""
    rng = np.random.default_rng([seed, 7])
    y = getattr(implementation, function)(*arguments.values())
    for name, gradient in gradients.items():
        x = arguments[name]
        assert gradient.shape == x.shape, f"d{name} has the shape {gradient.shape} instead of {name}'s {x.shape}"
        d = rng.integers(1, 9, x.shape) * rng.choice([-1, 1], x.shape) / 8

        def loss(moved: np.ndarray, name: str = name) -> Any:
            return (getattr(implementation, function)(*{**arguments, name: moved}.values()) * dy).sum()

        slope, told = implementation.slope(loss, x, d), float((gradient * d).sum())
        size = 1.0 + float(np.abs(gradient * d).sum()) + float(np.abs(y * dy).sum())
        assert abs(slope - told) <= implementation.exact_slope * size, (
            f"d{name} says that the loss changes by {told:.7g} in a direction in which it changes by {slope:.7g}"
        )
