"""PEFT's adapters in and out: a folder with `adapter_config.json` and `adapter_model.safetensors`, for every method.

`peft_type` says which method a folder holds; what else the configuration says of it stands in the method's own file.
Methods that PEFT does not know are written under a `peft_type` that PEFT refuses. Reading is strict where PEFT is
silent: every tensor is used, every setting that changes the result is understood, or the load fails, saying which.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import HostArray
from minilora.formats.files import check_shapes, open_safetensors, read_json, write_json, write_safetensors
from minilora.formats.finite import finite
from minilora.formats.mapped import STORED
from minilora.methods.fields import AdapterKeys
from minilora.methods.method import Method, method_held_by
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, Shape, parameter_shapes

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


class Adapter(NamedTuple):
    """An adapter as its folder holds it."""

    method: Method
    tensors: dict[str, HostArray]  # float32, named as in the model: `model.….q_proj.lora_A.weight`
    base_model: str  # the name or folder of the model it was trained on
    copies: dict[str, HostArray]  # base weights that PEFT saved beside it, by name, as stored; see check_copies


def write_adapter(
    folder: Path,
    method: Method,
    tensors: Mapping[str, HostArray],
    config: Config,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Write an adapter of a model with this configuration. `tensors` are named as in the model."""
    raw: dict[str, Any] = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "auto_mapping": None,
        "inference_mode": True,
        **method.fields(config),
    }
    folder = Path(folder)
    named = {method.key_prefix + name: finite("to be written", name, tensor) for name, tensor in tensors.items()}
    write_safetensors(folder / TENSORS, named, {"format": "pt"})
    write_json(folder / CONFIG, raw)


def read_adapter(folder: Path, config: Config) -> Adapter:
    """Read an adapter for a model of this configuration. ValueError or OSError, naming file and field or tensor."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / CONFIG
    raw = read_json(path, AdapterKeys)
    try:
        method = method_held_by(path, raw).from_fields(path, raw, config)
        expected = method.shapes(config)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    tensors, copies = _read_tensors(folder, method.key_prefix, expected, config)
    return Adapter(method, tensors, raw.get("base_model_name_or_path") or "", copies)


def check_copies(folder: Path, copies: Mapping[str, HostArray], weights: Mapping[str, HostArray]) -> None:
    """ValueError where a base weight that PEFT saved beside an adapter is not the base model's.

    PEFT saves embedding and head along when they are adapted. Had they been changed, passing over them would be wrong.
    Rounded alike they must be equal: the adapter may have been trained on a base in bfloat16.
    """
    for name, copy in copies.items():
        own = weights[name if name in weights else f"{EMBED}.weight"]
        if not np.array_equal(copy, own.astype(copy.dtype)):
            raise ValueError(
                f"{folder / TENSORS}: holds a {name} of its own that differs from the base model's: "
                "the adapter belongs to another base, or one whose vocabulary was changed"
            )


def _read_tensors(
    folder: Path, prefix: str, expected: Mapping[str, Shape], config: Config
) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
    """The adapter's tensors, and the base weights beside them."""
    path = folder / TENSORS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(f"{path}: no such file; convert adapter_model.bin to safetensors with PEFT")
    vocabulary = parameter_shapes(config)[f"{EMBED}.weight"]
    with open_safetensors(path) as file:
        stored = stored_shapes(path, file)
        fitting = {prefix + name: shape for name, shape in expected.items()}
        copies: dict[str, str] = {}
        for module, suffix in product((EMBED, HEAD), ("base_layer.weight", "weight")):
            key = f"{prefix}{module}.{suffix}"
            if prefix and key in stored and key not in fitting:
                copies.setdefault(f"{module}.weight", key)
        hint = f"The adapter does not fit its {CONFIG} and this base model."
        check_shapes(path, fitting | dict.fromkeys(copies.values(), vocabulary), stored, hint)
        found = {name: file.get_tensor(prefix + name).astype(np.float32, copy=False) for name in expected}
        tensors = {name: finite(path, prefix + name, tensor) for name, tensor in found.items()}
        return tensors, {name: file.get_tensor(key) for name, key in copies.items()}


def stored_shapes(path: Path, file: Any) -> dict[str, Shape]:
    """Name and shape of every tensor of an open file. ValueError for one that holds no floating-point numbers."""
    headers = {name: file.get_slice(name) for name in file.keys()}
    for name, header in headers.items():
        if header.get_dtype() not in STORED:
            raise ValueError(f"{path}: {name} is stored as {header.get_dtype()}, not as {', '.join(STORED)}")
    return {name: tuple(header.get_shape()) for name, header in headers.items()}
