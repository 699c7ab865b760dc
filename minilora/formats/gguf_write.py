"""GGUF files out: a whole model with its tokenizer, or a LoRA adapter, for llama.cpp and Ollama.

What differs from Hugging Face's checkpoint is said in `gguf.py`. A written model reads back to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from minilora.backend import HostArray
from minilora.formats.checkpoint import as_dtype, named_dtype
from minilora.formats.files import write_text
from minilora.formats.gguf import (
    ROPE_FACTORS,
    order_for_file,
    rope_factors,
    tensor_names,
    turned_heads,
)
from minilora.formats.gguf_file import ARCHITECTURES
from minilora.formats.whole import replacing
from minilora.frozen.gguf import gguf_library
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.model.config import Config, yarn
from minilora.model.names import EMBED, HEAD

Q8_0 = "q8_0"  # 8 bits a weight and a scale for each 32, the one kind of blocks that is offered
GGUF_DTYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), Q8_0: ("Q8_0", 7)}
MODELFILE = "Modelfile"


def architecture_of(model_type: str, config: Config) -> str:
    """llama.cpp's name for the architecture. ValueError for one that is not written."""
    names = {known.model_type: name for name, known in ARCHITECTURES.items()} | {"mistral": "llama"}
    if model_type not in names:
        raise ValueError(f"format gguf: model_type {model_type!r} is not supported, only {', '.join(names)}")
    every_fourth = tuple((layer + 1) % 4 != 0 for layer in range(config.num_hidden_layers))
    if model_type == "smollm3" and config.rope_layers != every_fourth:
        raise ValueError("format gguf: llama.cpp leaves RoPE out of every fourth layer of smollm3, and this model not")
    if model_type == "qwen3" and config.biased:
        raise ValueError("format gguf: llama.cpp's qwen3 has no biases, and this model has")
    return names[model_type]


def write_gguf(
    path: Path,
    model_type: str,
    config: Config,
    weights: Mapping[str, HostArray],
    dtype: str,
    tokenizer: Mapping[str, Any],
    stops: Iterable[str] = (),
) -> None:
    """A whole model: `weights` by our names, rounded to `dtype`; `tokenizer` is its fields (`gguf_tokenizer.py`).

    Biases and the gains of norms are in float32, as llama.cpp wants them. Beside the file goes Ollama's `Modelfile`,
    in which `stops` end an answer.
    """
    name = architecture_of(model_type, config)
    kind, file_type = GGUF_DTYPES[dtype]
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_scaling or {}
    if scaling.keys() == {"factor"}:
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if "beta_fast" in scaling:
        own |= _yarn(scaling)
    fields = {"general.type": "model", "general.file_type": file_type, "general.quantization_version": 2}
    fields |= {f"{name}.{key}": value for key, value in own.items()} | dict(tokenizer)
    tensors: dict[str, tuple[str, HostArray]] = {}
    for ours, theirs in tensor_names(config).items():
        tensor = weights[ours]
        if ARCHITECTURES[name].permuted and (heads := turned_heads(config, ours)):
            tensor = tensor[order_for_file(len(tensor), heads)]
        tensors[theirs] = (kind if tensor.ndim == 2 else "F32", tensor)
    if "low_freq_factor" in scaling:
        tensors[ROPE_FACTORS] = "F32", rope_factors(config.head_dim, config.rope_theta, scaling)
    with replacing(path) as partial:
        _write(partial, name, fields, tensors)
        write_text(path.with_name(MODELFILE), modelfile(path.name, stops))  # where the model is, all is


def _yarn(scaling: Mapping[str, float]) -> dict[str, Any]:
    """YaRN's fields. llama.cpp has all else as the paper has it; ValueError where this model differs."""
    factor = scaling["factor"]
    for key, value in yarn({}, factor).items():
        if not math.isclose(scaling[key], value):
            raise ValueError(f"format gguf: YaRN's {key} is {scaling[key]:g} here, and {value:g} in llama.cpp")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"]),
    }


def check_free(path: Path, whole_model: bool) -> None:
    """ValueError if this is no name for a new GGUF file, beside which a new Modelfile goes for a whole model."""
    if path.suffix != ".gguf":
        raise ValueError(f"--out {path}: with --format gguf, name a file that ends in .gguf")
    beside = path.with_name(MODELFILE)
    begins = modelfile(path.name, ())  # as in one that a killed process has left alone
    of_another = whole_model and beside.exists() and not (beside.is_file() and _begins_with(beside, begins))
    for file, taken in ((path, path.exists()), (beside, of_another)):
        if taken:
            raise ValueError(f"--out {path}: {file} exists, and would be replaced: choose another place")


def _begins_with(path: Path, text: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(text.encode())) == text.encode()


def modelfile(name: str, stops: Iterable[str]) -> str:
    """What `ollama create NAME -f Modelfile` reads; the chat template is in the GGUF file."""
    return "".join([f"FROM ./{name}\n", *(f'PARAMETER stop "{stop}"\n' for stop in stops)])


def write_gguf_adapter(
    path: Path, method: Method, tensors: Mapping[str, HostArray], model_type: str, config: Config
) -> None:
    """A LoRA adapter for llama.cpp's --lora, in float32. `tensors` are named as in the model.

    llama.cpp scales B A by alpha / r with one alpha for all modules; by 1 if alpha is 0. So each s is multiplied into
    its B, and α/√r and an α for each module are kept. ValueError for what the format has no place for.
    """
    name = architecture_of(model_type, config)
    places = check_gguf_adapter(method, config)
    names = tensor_names(config)
    written: dict[str, tuple[str, HostArray]] = {}
    for module, place in places.items():
        theirs = names[f"{module}.weight"]
        if module == EMBED:  # x = E[tokens] + (Aᵀ B)[tokens]: there A is the one with V rows
            A, B = tensors[f"{EMBED}.lora_embedding_A"].T, tensors[f"{EMBED}.lora_embedding_B"]
        else:
            A, B = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
            if ARCHITECTURES[name].permuted and (heads := turned_heads(config, f"{module}.weight")):
                B = B[order_for_file(len(B), heads)]
        written |= {f"{theirs}.lora_a": ("F32", A), f"{theirs}.lora_b": ("F32", np.float32(place.scale) * B)}
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(0)}
    with replacing(path) as partial:
        _write(partial, name, fields, written)


def check_gguf_adapter(method: Method, config: Config) -> Mapping[str, Any]:
    """The modules that are adapted. ValueError, with the way out, where the format has no place for such an adapter."""
    merge = "merge it instead: python -m minilora.merge --format gguf"
    if not method.thin_change:
        raise ValueError(f"an adapter in GGUF is LoRA's A and B, and this is {method.name}: {merge}")
    settings = cast(LoRA, method)
    if settings.modules_to_save:
        raise ValueError(f"GGUF has no modules_to_save, here {', '.join(settings.modules_to_save)}: {merge}")
    places = settings.places(config)
    if config.tie_word_embeddings and {EMBED, HEAD} & places.keys():
        adapted = " and ".join(module for module in (EMBED, HEAD) if module in places)
        raise ValueError(
            f"embedding and head of this model are one matrix, which llama.cpp would adapt in both places, and this "
            f"adapter changes {adapted}: {merge} --untie"
        )
    return places


def _write(path: Path, architecture: str, fields: Mapping[str, Any], tensors: dict[str, tuple[str, HostArray]]) -> None:
    """Tensors are converted one by one, as they are written."""
    library = gguf_library()
    writer = library.GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add_field(writer, key, value)
    for name, (kind, tensor) in tensors.items():
        type = library.GGMLQuantizationType[kind]
        try:
            bytes_of_row = library.quants.quant_shape_to_byte_shape(tensor.shape, type)
        except ValueError:
            raise ValueError(
                f"{name} has rows of {tensor.shape[-1]} numbers, and {Q8_0} is for whole blocks of 32: "
                "take another --dtype"
            ) from None
        length = int(np.prod(bytes_of_row))
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), length, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (kind, tensor) in tensors.items():
        writer.write_tensor_data(in_blocks(name, tensor, kind))
    writer.close()


def in_blocks(name: str, tensor: HostArray, kind: str) -> HostArray:
    """The tensor as a file holds it. ValueError, naming it, where a number is too large for 16 bits."""
    if kind == "BF16":
        return np.ascontiguousarray(as_dtype(name, tensor, np.dtype(ml_dtypes.bfloat16))).view(np.uint8)
    plain = as_dtype(name, tensor, named_dtype("float16" if kind == "F16" else "float32"))
    if kind != "Q8_0":
        return np.ascontiguousarray(plain)
    blocks: HostArray = gguf_library().quants.quantize(
        np.ascontiguousarray(plain), gguf_library().GGMLQuantizationType.Q8_0
    )
    return blocks


def rounded(name: str, tensor: HostArray, dtype: str) -> HostArray:
    """The tensor as a reader of a written file will have it. ValueError as for in_blocks."""
    if tensor.ndim != 2:
        return as_dtype(name, tensor, named_dtype("float32"))
    if dtype != Q8_0:
        return as_dtype(name, tensor, named_dtype(dtype))
    library = gguf_library()
    values: HostArray = library.quants.dequantize(in_blocks(name, tensor, "Q8_0"), library.GGMLQuantizationType.Q8_0)
    return values


def _add_field(writer: Any, key: str, value: Any) -> None:
    """Each in the type that llama.cpp looks for."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
