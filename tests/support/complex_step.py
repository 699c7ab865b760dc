"""The complex step: the derivative of a function to machine precision. Every gradient in minilora is held against it.

Move the input of a function by an imaginary step i·δ in the direction v. Its Taylor series is

    f(x + i·δ·v) = f(x) + i·δ·f'(x)·v − δ²·f''(x)·v²/2 − …      so      f'(x)·v = Im f(x + i·δ·v) / δ

with an error of order δ². A difference quotient (f(x + δ) − f(x)) / δ has to subtract two nearly equal numbers and
loses half of its digits. Here *nothing is subtracted*: the value travels in the real part and the slope in the
imaginary part, each with all its digits. So δ may be as small as 1e-30; then δ² is far below rounding, and what comes
out is the derivative as exactly as float64 can hold it. A wrong formula has nowhere to hide: we ask for ten digits.

The price is that f must be written holomorphically, with operations whose complex version is the analytic continuation
of the real one: + − × ÷ exp log tanh sqrt and matrix products, but no `abs`, no `norm`, no conjugate. A `max` that only
guards against overflow is taken of the real part. minilora's operations are written so, and run on complex128 as is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]

STEP = 1e-30
RELATIVE = 1e-10  # of the sum of the absolute terms that are added up
ROUNDING = 1e-12  # of the largest gradient anywhere (at least 1): what float64 leaves where terms cancel
UPSTREAM, DIRECTIONS = 101, 102  # streams of random numbers. Were v = dy, an antisymmetric error would vanish in dy·E·v


def check_gradients(loss: Callable[[Arrays], Any], inputs: Arrays, gradients: Arrays, seed: int = 0) -> None:
    """Check that `gradients` are those of the scalar `loss` at `inputs`, one array after the other.

    For each array a random direction v is drawn: f'(x)·v by the complex step must equal Σ gradient·v.
    """
    assert gradients.keys() == inputs.keys(), f"gradients of {sorted(gradients)} for inputs {sorted(inputs)}"
    rng = np.random.default_rng([seed, DIRECTIONS])
    here = {name: x.astype(np.complex128) for name, x in inputs.items()}
    largest = max(1.0, *(float(np.abs(gradient).max(initial=0)) for gradient in gradients.values()))
    for name, x in inputs.items():
        gradient = gradients[name]
        assert gradient.shape == x.shape, f"d{name} has the shape {gradient.shape}, but {name} has {x.shape}"
        v = rng.normal(size=x.shape)
        slope = float(np.imag(loss({**here, name: x + 1j * STEP * v}))) / STEP
        terms = gradient * v
        tolerance = RELATIVE * float(np.abs(terms).sum()) + ROUNDING * largest
        assert abs(slope - terms.sum()) <= tolerance, (
            f"the gradient of {name} is wrong: along a random direction the loss changes by {slope:.15g}, "
            f"but the gradient says {terms.sum():.15g}"
        )


def check_backward(
    forward: Callable[..., tuple[Any, Any]], backward: Callable[[Any, Any], Any], inputs: Arrays, seed: int = 0
) -> None:
    """Check a pair `y, cache = forward(**inputs)` and `gradients = backward(dy, cache)`, in the order of `inputs`.

    The loss is Σ y·dy with random dy, whose gradient with respect to y is dy itself.
    """
    y, cache = forward(**inputs)
    dy = np.random.default_rng([seed, UPSTREAM]).normal(size=y.shape)
    gradients = backward(dy, cache)
    if not isinstance(gradients, tuple):
        gradients = (gradients,)
    named = dict(zip(inputs, gradients, strict=True))
    check_gradients(lambda arrays: (forward(**arrays)[0] * dy).sum(), inputs, named, seed)
