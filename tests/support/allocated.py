"""What arrays cost while something runs: NumPy reports each of them to tracemalloc."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that were held at once, beyond those that were held before."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_of_a_pass(site: Any, x: np.ndarray, dy: np.ndarray) -> int:
    """The same, forwards and backwards through a site."""

    def there_and_back() -> None:
        _, cache = site.forward(x)
        site.backward(dy, cache)

    return peak_bytes(there_and_back)
