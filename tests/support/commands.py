"""The commands of minilora as modules, for tests that call them in their own process."""

from __future__ import annotations

import importlib
from typing import Any


def command_module(command: str) -> Any:
    """What `python -m minilora.COMMAND` runs: a file, or a package's `__main__`."""
    module = importlib.import_module(f"minilora.{command}")
    return importlib.import_module(f"minilora.{command}.__main__") if hasattr(module, "__path__") else module
