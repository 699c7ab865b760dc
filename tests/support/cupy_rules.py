"""What the real CuPy says of a call, where it is installed: no GPU and no driver are needed to ask.

Without CuPy nothing is known, and everything is allowed.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import numpy as np

try:
    import cupy

    assert cupy.random.Generator  # it is imported when first asked for, and a test may have replaced `cupy` by then
except ImportError:  # it is an extra
    cupy = None

PYTHONS = (bool, int, float, complex)
KNOWN = set(np.typecodes["All"]) - {"V"}  # the dtypes that NumPy can name, which bfloat16 is not one of


def found(name: str) -> Any:
    """What has this dotted name within CuPy. TypeError, which names it, if nothing has."""
    try:
        return functools.reduce(getattr, name.split("."), cupy)
    except AttributeError:
        raise TypeError(f"CuPy has no {name}") from None


@functools.cache
def signature(name: str) -> inspect.Signature:
    """The parameters of cupy.<name>. Compiled functions state theirs in the first line of their documentation."""
    function = found(name)
    try:
        return inspect.signature(function)
    except ValueError:
        documentation = (function.__doc__ or "").replace("\\*", "*")
    stated = re.match(r"[\w.]+\((.*?)\)( ->|\n|$)", documentation)
    assert stated, f"CuPy does not say what {name} takes"
    untyped = re.sub(r"\w+ (\w+)", r"\1", stated[1])
    without_defaults = re.sub(r"=[^,]+", "=None", untyped)
    defined: dict[str, Any] = {}
    exec(f"def function({without_defaults}): ...", defined)
    return inspect.signature(defined["function"])


def check_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """TypeError unless cupy.<name> takes these arguments. Of a method, `args` begin with the object."""
    if cupy is None:
        return
    try:
        signature(name).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"CuPy's {name} does not take this: {error}") from None


def check_dtypes(ufunc: np.ufunc, operands: tuple[Any, ...]) -> None:
    """TypeError unless CuPy computes this ufunc of these operands in NumPy's dtype.

    CuPy takes the first of its kernels to which all operands can be cast safely. Python's numbers adapt to the arrays.
    Dtypes that NumPy does not know itself, such as bfloat16, are not checked.
    """
    name = ufunc.__name__
    kinds = [x.dtype if isinstance(x, np.ndarray) else type(x) for x in operands]
    if cupy is None or name == "matmul" or not all(kind in PYTHONS or kind.isbuiltin == 1 for kind in kinds):
        return
    *given, expected = ufunc.resolve_dtypes((*kinds, None))
    given = [own if kind in PYTHONS else kind for own, kind in zip(given, kinds, strict=True)]
    for kernel in found(name).types:
        into, out = kernel.split("->")
        if set(into) <= KNOWN and all(map(np.can_cast, given, into)):
            if np.dtype(out) != expected:
                raise TypeError(f"CuPy's {name} of {given} is {np.dtype(out)}, and NumPy's {expected}")
            return
    raise TypeError(f"CuPy has no kernel of {name} for {given}")
