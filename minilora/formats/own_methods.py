"""Adapters of the methods that PEFT does not know: the same two files, under a `peft_type` that PEFT refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.files import HostArray, check_shapes, open_safetensors, read_json, write_json, write_safetensors
from minilora.formats.peft import CONFIG, TENSORS
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.random_subset import RandomSubset
from minilora.methods.whole_modules import Modules
from minilora.model.model import Model

OwnMethod = Bottleneck | BitFit | Modules | RandomSubset
OWN_METHODS: dict[str, type[OwnMethod]] = {
    "MINILORA_BOTTLENECK": Bottleneck,
    "MINILORA_BITFIT": BitFit,
    "MINILORA_MODULES": Modules,
    "MINILORA_RANDOM_SUBSET": RandomSubset,
}


def write_own(
    folder: Path, method: OwnMethod, tensors: Mapping[str, HostArray], base_model: str, revision: str | None
) -> None:
    """`tensors` keep the model's names, without PEFT's prefix."""
    (peft_type,) = (name for name, kind in OWN_METHODS.items() if isinstance(method, kind))
    config = {"peft_type": peft_type, "base_model_name_or_path": base_model, "revision": revision, **asdict(method)}
    write_safetensors(folder / TENSORS, tensors)
    write_json(folder / CONFIG, config)


def read_own(folder: Path, model: Model) -> tuple[OwnMethod, dict[str, HostArray]]:
    """The method, and its tensors in float32. ValueError, naming file and field, where they do not fit the model."""
    path = folder / CONFIG
    raw = read_json(path)
    kind = OWN_METHODS[raw["peft_type"]]
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = raw.get(field.name)
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            value = tuple(value)
        if type(value) is not type(field.default):
            raise ValueError(f"{path}: {field.name} is {value!r}, expected {type(field.default).__name__}")
        values[field.name] = value
    method = kind(**values)
    expected = {name: p.shape for name, p in method.start(model, np.random.default_rng(0)).items()}
    with open_safetensors(folder / TENSORS) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        check_shapes(folder / TENSORS, expected, found, f"The adapter does not fit its {CONFIG} and this base model.")
        return method, {name: file.get_tensor(name).astype(np.float32, copy=False) for name in expected}
