"""A model folder, or a GGUF file, as a Model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.checkpoint import read_config, read_weights
from minilora.formats.gguf import gguf_weights
from minilora.formats.gguf_file import is_gguf
from minilora.model.base import base_model
from minilora.model.model import Model

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "weights" / "tinysmol"


def load_model(
    folder: Path, dtype: str = "float32", frozen: str = "widened", mixed_precision: str = "no"
) -> tuple[Model, dict[str, Any]]:
    """The base model of a checkpoint, everything frozen, and its config.json."""
    config, raw = read_config(folder)
    mapped = frozen == "mapped"
    weights = gguf_weights(folder, config, True, mapped) if is_gguf(folder) else read_weights(folder, config, mapped)
    return base_model(config, weights, np.dtype(dtype), frozen, mixed_precision), raw
