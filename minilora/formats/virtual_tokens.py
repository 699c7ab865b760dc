"""PEFT's folders of prefix and prompt tuning in and out: one tensor, `prompt_embeddings`, and how it is to be cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.files import HostArray, check_shapes, open_safetensors, read_json, write_json, write_safetensors
from minilora.formats.peft import CONFIG, TENSORS
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.virtual_tokens import EMBEDDINGS, check_room
from minilora.model.config import Config

VirtualTokens = PrefixTuning | PromptTuning
PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
METHODS: dict[str, type[VirtualTokens]] = {PREFIX: PrefixTuning, PROMPT: PromptTuning}

WITHOUT_EFFECT = {  # on what finished virtual tokens compute
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config", "revision"),
    *("base_model_name_or_path", "init_weights"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("prefix_projection", "encoder_hidden_size"),  # PEFT saves what the projection gave, and not the projection
}


def write_virtual_tokens(
    folder: Path,
    method: VirtualTokens,
    tensors: Mapping[str, HostArray],
    config: Config,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Write a prefix or a prompt that PEFT loads."""
    folder = Path(folder)
    raw: dict[str, Any] = {
        "peft_type": PREFIX if isinstance(method, PrefixTuning) else PROMPT,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "auto_mapping": None,
        "inference_mode": True,
        **_geometry(method, config),
    }
    if isinstance(method, PrefixTuning):
        raw |= {"prefix_projection": False, "encoder_hidden_size": None}
    else:  # where a text was given, PEFT would ask for its tokenizer before it overwrites the start by the tensor
        raw |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    write_safetensors(folder / TENSORS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, raw)


def read_virtual_tokens(folder: Path, config: Config) -> tuple[VirtualTokens, dict[str, HostArray]]:
    """The method, and its tensor in float32. ValueError or OSError, naming file and field or tensor."""
    path = Path(folder) / CONFIG
    raw = read_json(path)
    count = raw.get("num_virtual_tokens")
    if isinstance(count, bool) or not isinstance(count, int):
        raise ValueError(f"{path}: num_virtual_tokens is {count!r}, expected a whole number")
    method = METHODS[raw["peft_type"]](count)
    try:
        check_room(config, count)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    fitting = _geometry(method, config)
    for field, value in raw.items():
        if field in fitting:
            if value not in (None, fitting[field]):  # PEFT fills in what is null
                raise ValueError(f"{path}: {field} is {value!r}, but with this base model it is {fitting[field]}")
        elif value and field not in WITHOUT_EFFECT:
            raise ValueError(f"{path}: {field} {value!r} is not supported")
    tensors = Path(folder) / TENSORS
    with open_safetensors(tensors) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        check_shapes(tensors, {EMBEDDINGS: _shape(method, config)}, found, f"It does not fit {CONFIG} and this base.")
        return method, {EMBEDDINGS: np.asarray(file.get_tensor(EMBEDDINGS).astype(np.float32, copy=False))}


def _geometry(method: VirtualTokens, config: Config) -> dict[str, int]:
    """The fields by which PEFT cuts the tensor; those of a prefix are of key heads, of which there may be fewer."""
    heads, width = config.num_attention_heads, config.hidden_size
    if isinstance(method, PrefixTuning):
        heads, width = config.num_key_value_heads, config.num_key_value_heads * config.head_dim
    return {
        "num_virtual_tokens": method.num_virtual_tokens,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }


def _shape(method: VirtualTokens, config: Config) -> tuple[int, int]:
    """Of the tensor: (n, 2·L·K·d) of a prefix, (n, D) of a prompt."""
    width = _geometry(method, config)["token_dim"]
    of_each = 2 * config.num_hidden_layers if isinstance(method, PrefixTuning) else 1
    return method.num_virtual_tokens, of_each * width
