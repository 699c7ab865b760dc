"""A model folder as a Model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.checkpoint import read_config, read_weights
from minilora.model.base import base_model
from minilora.model.model import Model

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "weights" / "tinysmol"


def load_model(
    folder: Path, dtype: str = "float32", frozen: str = "widened", mixed_precision: str = "no"
) -> tuple[Model, dict[str, Any]]:
    """The base model of a checkpoint, everything frozen, and its config.json."""
    config, raw = read_config(folder)
    return base_model(config, read_weights(folder, config), np.dtype(dtype), frozen, mixed_precision), raw
