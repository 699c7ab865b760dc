"""docs/lora_in_one_file.py as a module, with an adapter and examples for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FILE = Path(__file__).parents[2] / "docs" / "lora_in_one_file.py"
EXAMPLES = [([0, 17, 999, 4095, 3, 17, 250, 0], 3), ([5, 6, 7], 1), ([2047, 300, 300, 12, 0], 4)]


def one_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_in_one_file", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_adapter(one: ModuleType, model: dict[str, Any]) -> dict[str, np.ndarray]:
    """A of a fresh adapter, and a B that is not zero."""
    rng = np.random.default_rng(1)
    return {
        name: p if name.endswith(".A") else rng.normal(0, 0.1, p.shape).astype(p.dtype)
        for name, p in one.start(model, rng).items()
    }
