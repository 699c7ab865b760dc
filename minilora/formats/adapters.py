"""An adapter folder of any method, out and in. `peft_type` in its adapter_config.json says which method it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minilora.backend import Array, to_device, to_host
from minilora.formats.files import HostArray
from minilora.formats.peft import check_copies, read_adapter, write_adapter
from minilora.methods import Method
from minilora.methods.lora import LoRA, frozen_site
from minilora.model.model import Model


def write_method(
    folder: Path, method: Method, tensors: Mapping[str, HostArray], base_model: str, revision: str | None = None
) -> None:
    """Write what a method has trained, in PEFT's format where PEFT knows the method."""
    match method:
        case LoRA():
            write_adapter(folder, method, tensors, base_model, revision)
        case _:
            raise ValueError(f"{type(method).__name__} has no adapter to write")


def read_method(folder: Path, model: Model, dtype: str = "float32") -> tuple[Method, dict[str, Array]]:
    """A method's settings, and its tensors on the device. ValueError where they do not fit the model."""
    adapter = read_adapter(folder, model.config)
    copied = {name: frozen_site(model, name.removesuffix(".weight")).weight.dense() for name in adapter.copies}
    check_copies(folder, adapter.copies, {name: to_host(weight) for name, weight in copied.items()})
    return adapter.settings, {name: to_device(tensor.astype(dtype)) for name, tensor in adapter.tensors.items()}


def load_adapter(model: Model, folder: Path, dtype: str = "float32") -> Model:
    """The model with the adapter of a folder."""
    method, trainable = read_method(folder, model, dtype)
    return method.attach(model, trainable)
