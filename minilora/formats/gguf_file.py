"""A GGUF file, open: its fields with the types that they must have, and its tensors, memory-mapped."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.frozen.gguf import gguf_library
from minilora.keys import Count, Layers, Positions, Positive, checked

TENSOR_TYPES = (  # by the library's names: plain numbers, and blocks
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}  # ours → theirs
FIELDS = {
    **{"general.architecture": str, "general.type": str, "split.count": int},
    **{"tokenizer.ggml.model": str, "tokenizer.ggml.pre": str, "tokenizer.ggml.tokens": list[str]},
    **{"tokenizer.ggml.token_type": list[int], "tokenizer.ggml.merges": list[str]},
    **{"tokenizer.ggml.add_bos_token": bool, "tokenizer.ggml.add_eos_token": bool},
}
FIELDS_OF_AN_ARCHITECTURE = {
    **{"context_length": Positions, "embedding_length": Count, "feed_forward_length": Count, "block_count": Layers},
    **{"attention.head_count": Count, "attention.head_count_kv": Count, "attention.key_length": Count},
    **{"attention.value_length": Count, "attention.sliding_window": int, "expert_count": int},
    **{"attention.layer_norm_rms_epsilon": Positive, "rope.dimension_count": Count, "rope.freq_base": Positive},
    **{"rope.scaling.type": str, "rope.scaling.factor": Positive},
    **{"rope.scaling.original_context_length": Positive},
}


class Architecture(NamedTuple):
    """What is to be known of a `general.architecture`."""

    model_type: str  # Hugging Face's name
    class_name: str
    permuted: bool  # whether the rows of q and k are in llama.cpp's order


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", False),
}


class File:
    """An open file: its fields as Python values, and its tensors as the library gives them, memory-mapped."""

    def __init__(self, path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields
        self.tensors = tensors

    def __getitem__(self, field: str) -> Any:
        if field not in self.fields:
            raise ValueError(f"{self.path}: the field {field} is missing")
        return self.fields[field]


def is_gguf(path: Path) -> bool:
    """Whether this is one file in this format, and no folder."""
    return path.suffix == ".gguf" and not path.is_dir()


def open_gguf(path: Path) -> File:
    """The file of a model. ValueError or OSError if it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    state = path.stat()
    return _opened(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2)  # configuration, weights and tokenizer each ask for it, and the library takes a second to read it
def _opened(path: Path, size: int, changed: int) -> File:
    reader_class = _reader()
    try:
        reader = reader_class(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises whatever its arrays raise
        raise ValueError(f"{path}: not a whole GGUF file ({error}): download or copy it again") from error
    file = File(path, fields, {tensor.name: tensor for tensor in reader.tensors})
    checked(path, file.fields, FIELDS)
    kind = file.fields.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{path}: holds no model, its general.type is {kind!r}")
    if file.fields.get("split.count", 1) > 1:
        parts = file["split.count"]
        raise ValueError(f"{path}: one of {parts} parts: make them one with llama.cpp's gguf-split --merge")
    if (name := file["general.architecture"]) not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {name!r} is not supported, only {', '.join(ARCHITECTURES)}")
    checked(path, file.fields, {f"{name}.{key}": kind for key, kind in FIELDS_OF_AN_ARCHITECTURE.items()})
    for name, tensor in file.tensors.items():
        if (type := tensor.tensor_type.name) not in TENSOR_TYPES:
            raise ValueError(
                f"{path}: {name} is of type {type}, which is not supported, only {', '.join(TENSOR_TYPES)}"
            )
    return file


@cache
def _reader() -> Any:
    """The library's reader, which by itself would go on behind the end of the file: with a count of 2⁶⁰ for ever."""

    class Reader(gguf_library().GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **options: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > self.data.size:
                raise ValueError(f"it ends at byte {self.data.size:,}, before what it says it holds")
            return super()._get(offset, dtype, count, *more, **options)

    return Reader
