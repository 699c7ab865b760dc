"""An adapter folder of any method, out and in.

Its layout is PEFT's, where `peft_type` in adapter_config.json says which method it holds; or mlx-lm's, which has LoRA
and DoRA, in a file of tensors with a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minilora.backend import Array, to_device, to_host
from minilora.formats.files import HostArray, read_json
from minilora.formats.mlx import TENSORS as MLX_TENSORS
from minilora.formats.mlx import check_sayable, read_mlx_adapter, write_mlx_adapter
from minilora.formats.own_methods import OWN_METHODS, read_own, write_own
from minilora.formats.peft import CONFIG, TENSORS, Adapter, check_copies, read_adapter, write_adapter
from minilora.formats.virtual_tokens import METHODS, read_virtual_tokens, write_virtual_tokens
from minilora.methods import Method
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.lora import LoRA, frozen_site
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.methods.whole_modules import Modules
from minilora.model.config import Config
from minilora.model.model import Model

FORMATS = ("peft", "mlx")


def check_format(format: str, method: Method, config: Config) -> None:
    """ValueError if the format cannot hold what the method trains on such a model."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: choose {', '.join(FORMATS)}")
    if format == "mlx":
        if not isinstance(method, LoRA):
            raise ValueError(f"format mlx is for LoRA and DoRA: mlx-lm does not know {type(method).__name__} adapters")
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
    """Write what a method has trained on such a model, in PEFT's format where PEFT knows the method, or in mlx-lm's."""
    check_format(format, method, config)
    match method:
        case LoRA() if format == "mlx":
            write_mlx_adapter(folder, method, tensors, config, base_model)
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
    adapter = read_lora(folder, model.config)
    copied = {name: frozen_site(model, name.removesuffix(".weight")).weight.dense() for name in adapter.copies}
    check_copies(folder, adapter.copies, {name: to_host(weight) for name, weight in copied.items()})
    return adapter.settings, {name: to_device(tensor.astype(dtype)) for name, tensor in adapter.tensors.items()}


def read_lora(folder: Path, config: Config) -> Adapter:
    """A LoRA or DoRA adapter in either layout, known by the name of its file of tensors."""
    if not (folder / MLX_TENSORS).exists():
        return read_adapter(folder, config)
    if (folder / TENSORS).exists():
        raise ValueError(f"{folder}: holds {TENSORS} and {MLX_TENSORS} too, PEFT's and mlx-lm's: remove one of them")
    return read_mlx_adapter(folder, config)


def load_adapter(model: Model, folder: Path, dtype: str = "float32") -> Model:
    """The model with the adapter of a folder."""
    method, trainable = read_method(folder, model, dtype)
    return method.attach(model, trainable)
