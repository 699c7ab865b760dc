"""An adapter folder of any method, out and in. `peft_type` in its adapter_config.json says which method it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minilora.backend import Array, to_device, to_host
from minilora.formats.files import HostArray, read_json
from minilora.formats.own_methods import OWN_METHODS, read_own, write_own
from minilora.formats.peft import CONFIG, check_copies, read_adapter, write_adapter
from minilora.formats.virtual_tokens import METHODS, read_virtual_tokens, write_virtual_tokens
from minilora.methods import Method
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.lora import LoRA, frozen_site
from minilora.methods.modules import Modules
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.model.config import Config
from minilora.model.model import Model


def write_method(
    folder: Path,
    method: Method,
    tensors: Mapping[str, HostArray],
    config: Config,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Write what a method has trained on such a model, in PEFT's format where PEFT knows the method."""
    match method:
        case LoRA():
            write_adapter(folder, method, tensors, base_model, revision)
        case PrefixTuning() | PromptTuning():
            write_virtual_tokens(folder, method, tensors, config, base_model, revision)
        case Bottleneck() | BitFit() | Modules() | RandomSubset():
            write_own(folder, method, tensors, base_model, revision)
        case _:
            raise ValueError(f"{type(method).__name__} has no adapter to write")


def read_method(folder: Path, model: Model, dtype: str = "float32") -> tuple[Method, dict[str, Array]]:
    """A method's settings, and its tensors on the device. ValueError where they do not fit the model."""
    tensors: dict[str, HostArray]
    kind = read_json(folder / CONFIG).get("peft_type") if (folder / CONFIG).is_file() else None
    if kind in METHODS or kind in OWN_METHODS:
        method: Method
        if kind in METHODS:
            method, tensors = read_virtual_tokens(folder, model.config)
        else:
            method, tensors = read_own(folder, model)
        return method, {name: to_device(tensor.astype(dtype)) for name, tensor in tensors.items()}
    adapter = read_adapter(folder, model.config)
    copied = {name: frozen_site(model, name.removesuffix(".weight")).weight.dense() for name in adapter.copies}
    check_copies(folder, adapter.copies, {name: to_host(weight) for name, weight in copied.items()})
    return adapter.settings, {name: to_device(tensor.astype(dtype)) for name, tensor in adapter.tensors.items()}


def load_adapter(model: Model, folder: Path, dtype: str = "float32") -> Model:
    """The model with the adapter of a folder."""
    method, trainable = read_method(folder, model, dtype)
    return method.attach(model, trainable)
