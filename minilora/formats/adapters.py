"""An adapter folder in either layout, out and in.

The layout is PEFT's, or mlx-lm's, which has LoRA and DoRA, in a file of tensors with a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minilora.backend import Array, HostArray, to_device, to_host
from minilora.formats.mlx import MLX_TENSORS, check_sayable, read_mlx_adapter, write_mlx_adapter
from minilora.formats.peft import TENSORS, Adapter, check_copies, read_adapter, write_adapter
from minilora.methods.method import Method
from minilora.methods.placement import frozen_site
from minilora.model.config import Config
from minilora.model.model import Model

FORMATS = ("peft", "mlx")


def check_format(format: str, method: Method, config: Config) -> None:
    """ValueError if the format cannot hold what the method trains on such a model."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: choose {', '.join(FORMATS)}")
    if format == "mlx":
        check_sayable(method, config)


def write_method(
    folder: Path,
    method: Method,
    tensors: Mapping[str, HostArray],
    config: Config,
    base_model: str,
    revision: str | None = None,
    format: str = FORMATS[0],
) -> None:
    """Write what a method has trained on such a model."""
    check_format(format, method, config)
    if not method.peft_type:
        raise ValueError(f"{method.name} has no adapter to write")
    if format == "mlx":
        write_mlx_adapter(folder, method, tensors, config, base_model)
    else:
        write_adapter(folder, method, tensors, config, base_model, revision)


def read_layout(folder: Path, config: Config) -> Adapter:
    """An adapter in either layout, known by the name of its file of tensors."""
    if not (folder / MLX_TENSORS).exists():
        return read_adapter(folder, config)
    if (folder / TENSORS).exists():
        raise ValueError(f"{folder}: holds {TENSORS} and {MLX_TENSORS} too, PEFT's and mlx-lm's: remove one of them")
    return read_mlx_adapter(folder, config)


def read_method(folder: Path, model: Model, dtype: str = "float32") -> tuple[Method, dict[str, Array]]:
    """A method's settings, and its tensors on the device. ValueError where they do not fit the model."""
    adapter = read_layout(folder, model.config)
    copied = {name: frozen_site(model, name.removesuffix(".weight")).weight.dense() for name in adapter.copies}
    check_copies(folder, adapter.copies, {name: to_host(weight) for name, weight in copied.items()})
    return adapter.method, {name: to_device(tensor.astype(dtype)) for name, tensor in adapter.tensors.items()}


def load_adapter(model: Model, folder: Path, dtype: str = "float32") -> Model:
    """The model with the adapter of a folder."""
    method, trainable = read_method(folder, model, dtype)
    return method.attach(model, trainable)
