"""A model folder, and perhaps an adapter folder, as a Model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, to_device
from minilora.formats.checkpoint import read_config, read_weights
from minilora.formats.peft import read_adapter
from minilora.methods.base import base_model
from minilora.methods.lora import LoRASettings, attach
from minilora.model.config import Config
from minilora.model.model import Model

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "weights" / "tinysmol"


def load_model(folder: Path, dtype: str = "float32", stored: bool = False) -> tuple[Model, dict[str, Any]]:
    """The base model of a checkpoint, everything frozen, and its config.json."""
    config, raw = read_config(folder)
    return base_model(config, read_weights(folder, config), np.dtype(dtype), stored), raw


def load_trainable(folder: Path, config: Config, dtype: str = "float32") -> tuple[LoRASettings, dict[str, Array]]:
    """An adapter's settings, and its tensors on the device."""
    settings, tensors, _ = read_adapter(folder, config)
    return settings, {name: to_device(tensor.astype(dtype)) for name, tensor in tensors.items()}


def load_adapter(model: Model, folder: Path, dtype: str = "float32") -> tuple[Model, LoRASettings]:
    """The model with an adapter of PEFT's format at its sites."""
    settings, trainable = load_trainable(folder, model.config, dtype)
    return attach(model, settings, trainable), settings
