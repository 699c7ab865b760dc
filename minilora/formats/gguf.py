"""GGUF files, as llama.cpp and Ollama have them: a whole model in one file, here as config.json and tensors.

The file is Hugging Face's checkpoint under other names, with two differences. Matrices may be in blocks of few bits
(`frozen/gguf.py`). And where llama.cpp turns neighbours (2i, 2i + 1) in RoPE, Hugging Face turns (i, i + d/2): the rows
of q and k are in another order within each head. Both are undone here, exactly. Reading is strict: what would change
the computation and is not understood is refused by name. The tokenizer is in `gguf_tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilora.backend import HostArray
from minilora.formats.files import check_shapes
from minilora.formats.finite import finite
from minilora.formats.gguf_file import ARCHITECTURES, ROLES, File, open_gguf
from minilora.frozen.gguf import Blocks
from minilora.frozen.mapped import let_go
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, NORM, layer_module, parameter_shapes, roles
from minilora.ops.rope import rope_frequencies

GGUF_LAYER = {  # role within a layer → module name within a layer of a GGUF file
    **{"attention_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"},
    **{"q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "mlp_norm": "ffn_norm"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}
ROPE_FACTORS = "rope_freqs.weight"  # by which llama.cpp divides the frequencies: where Llama 3's scaling is kept


def gguf_config(path: Path) -> dict[str, Any]:
    """What config.json would say, with the file's own numbers."""
    file = open_gguf(path)
    name = file["general.architecture"]

    def own(key: str, default: Any = None) -> Any:
        return file[f"{name}.{key}"] if default is None else file.fields.get(f"{name}.{key}", default)

    heads = own("attention.head_count")
    head_dim = own("attention.key_length", own("embedding_length") // heads)
    for key, only in {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.sliding_window": 0,
        "expert_count": 0,
    }.items():
        if own(key, only) != only:
            raise ValueError(f"{path}: {name}.{key} {own(key)!r} is not supported, only {only!r}")
    theta = own("rope.freq_base", 10000.0)
    architecture = ARCHITECTURES[name]
    raw = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": _tensor(file, "token_embd.weight").data.shape[0],
        "hidden_size": own("embedding_length"),
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own("context_length"),
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, name, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "hidden_act": "silu",
        "dtype": {"F16": "float16", "BF16": "bfloat16"}.get(
            _tensor(file, "blk.0.ffn_up.weight").tensor_type.name, "float32"
        ),
    }
    ids = {role: file.fields.get(f"tokenizer.ggml.{theirs}_token_id") for role, theirs in ROLES.items()}
    return raw | {f"{role}_id": id for role, id in ids.items() if id is not None and role != "unk_token"}


def _tensor(file: File, name: str) -> Any:
    """A matrix of the file."""
    if name not in file.tensors or file.tensors[name].data.ndim != 2:
        raise ValueError(f"{file.path}: the tensor {name} is missing, or no matrix")
    return file.tensors[name]


def _rope_scaling(file: File, name: str, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Linear scaling and YaRN's are fields. Llama 3's is a tensor of factors, of which only the result is kept: among
    the settings that releases have, those that give these very factors are taken."""
    kind = file.fields.get(f"{name}.rope.scaling.type", "none")
    if ROPE_FACTORS not in file.tensors:
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": file[f"{name}.rope.scaling.factor"]}
        if kind == "linear":
            return scaling
        if kind == "yarn":
            return scaling | {"original_max_position_embeddings": file[f"{name}.rope.scaling.original_context_length"]}
        raise ValueError(f"{file.path}: {name}.rope.scaling.type {kind!r} is not supported, only none, linear and yarn")
    factors = file.tensors[ROPE_FACTORS].data
    for original in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
        numbers = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        numbers["original_max_position_embeddings"] = original
        if factors.shape == (head_dim // 2,) and np.allclose(
            factors, rope_factors(head_dim, theta, numbers), rtol=1e-5, atol=0
        ):
            return {"rope_type": "llama3", **numbers, "original_max_position_embeddings": original}
    raise ValueError(f"{file.path}: the factors in {ROPE_FACTORS} are not those of a known scaling of Llama 3's kind")


def rope_factors(head_dim: int, theta: float, scaling: dict[str, float]) -> HostArray:
    """What the plain frequencies are divided by, (head_dim/2,)."""
    factors: HostArray = rope_frequencies(head_dim, theta) / rope_frequencies(head_dim, theta, scaling)
    return factors


def tensor_names(config: Config) -> dict[str, str]:
    """The name in a GGUF file of every tensor of a checkpoint, under our name for it."""
    modules = {EMBED: "token_embd", NORM: "output_norm", HEAD: "output"}
    for layer in range(config.num_hidden_layers):
        for role in roles(config):
            modules[layer_module(layer, role)] = f"blk.{layer}.{GGUF_LAYER[role]}"
    split = {name: name.rpartition(".") for name in parameter_shapes(config)}
    return {name: f"{modules[module]}.{kind}" for name, (module, _, kind) in split.items()}


def turned_heads(config: Config, name: str) -> int:
    """The heads of a tensor whose rows are in another order in the file: of q and k. 0 for all others."""
    if ".self_attn.q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".self_attn.k_proj." in name else 0


def order_in_file(rows: int, heads: int) -> HostArray:
    """Our row i of a head is the file's row order[i]: features (i, i + d/2) for us are (2i, 2i + 1) there."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def order_for_file(rows: int, heads: int) -> HostArray:
    """The other way: the file's row i is our row order[i]."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


class GGUFWeights(Mapping[str, Any]):
    """The tensors of a file by our names, each dequantised when it is asked for; or, with `blocks`, matrices in blocks
    as `Blocks`. 16-bit and 32-bit tensors are the file's own bytes, memory-mapped; where rows have to change places
    they are a copy, unless `mapped`, which leaves those of 16 bits in the file too."""

    def __init__(self, file: File, config: Config, blocks: bool = False, mapped: bool = False) -> None:
        self.file = file
        self.config = config
        self.blocks = blocks
        self.mapped = mapped
        self.names = tensor_names(config)
        self.permuted = ARCHITECTURES[file["general.architecture"]].permuted

    def __getitem__(self, name: str) -> Any:
        tensor = self.file.tensors[self.names[name]]
        data, kind = np.asarray(tensor.data), tensor.tensor_type
        if kind.name == "BF16":
            data = data.view(ml_dtypes.bfloat16)
        heads = turned_heads(self.config, name) if self.permuted else 0
        order = order_in_file(len(data), heads) if heads else None
        if kind.name in ("F32", "F16", "BF16") and not (self.mapped and heads and data.itemsize == 2):
            found: Any = finite(self.file.path, tensor.name, data if order is None else data[order])
        else:
            held = Blocks(data.view(np.uint8), kind, order)
            finite(self.file.path, tensor.name, data if data.itemsize == 2 else held.scales())
            found = held if self.blocks else held.rows()
        if self.mapped:
            let_go([data])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def gguf_weights(path: Path, config: Config, blocks: bool = False, mapped: bool = False) -> GGUFWeights:
    """Every tensor of the configuration, and not one more or less."""
    file = open_gguf(path)
    names = tensor_names(config)
    expected = {names[name]: shape for name, shape in parameter_shapes(config).items()}
    found = {name: tuple(reversed(t.shape.tolist())) for name, t in file.tensors.items() if name != ROPE_FACTORS}
    check_shapes(path, expected, found, "The tensors and the fields of the file do not belong together.")
    return GGUFWeights(file, config, blocks, mapped)
