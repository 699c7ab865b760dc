"""A model folder, and perhaps an adapter folder, as a Model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, to_device, to_host
from minilora.formats.checkpoint import read_config, read_weights
from minilora.formats.peft import check_copies, read_adapter
from minilora.methods.base import base_model
from minilora.methods.lora import LoRA, frozen_site
from minilora.model.model import Model

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "weights" / "tinysmol"


def load_model(folder: Path, dtype: str = "float32", stored: bool = False) -> tuple[Model, dict[str, Any]]:
    """The base model of a checkpoint, everything frozen, and its config.json."""
    config, raw = read_config(folder)
    return base_model(config, read_weights(folder, config), np.dtype(dtype), stored), raw


def load_trainable(folder: Path, model: Model, dtype: str = "float32") -> tuple[LoRA, dict[str, Array]]:
    """An adapter's settings, and its tensors on the device."""
    adapter = read_adapter(folder, model.config)
    copied = {name: frozen_site(model, name.removesuffix(".weight")).weight.dense() for name in adapter.copies}
    check_copies(folder, adapter.copies, {name: to_host(weight) for name, weight in copied.items()})
    return adapter.settings, {name: to_device(tensor.astype(dtype)) for name, tensor in adapter.tensors.items()}


def load_adapter(model: Model, folder: Path, dtype: str = "float32") -> tuple[Model, LoRA]:
    """The model with an adapter of PEFT's format at its sites."""
    settings, trainable = load_trainable(folder, model, dtype)
    return settings.attach(model, trainable), settings
