"""The names of modules and tensors, as Hugging Face writes them. Every name in minilora is formed here."""

from __future__ import annotations

from typing import TypeAlias

from minilora.model.config import Config

Shape: TypeAlias = "tuple[int, ...]"

EMBED = "model.embed_tokens"
NORM = "model.norm"
HEAD = "lm_head"

LAYER = {  # role within a layer → module name within a layer
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")  # roles that are linear maps


def layer_module(layer: int, role: str) -> str:
    """`layer_module(0, "q")` is `model.layers.0.self_attn.q_proj`."""
    return f"model.layers.{layer}.{LAYER[role]}"


def parameter_shapes(config: Config) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, in the order of the forward pass. A tied head has none."""
    D, F = config.hidden_size, config.intermediate_size
    Q, K = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear = {"q": (Q, D), "k": (K, D), "v": (K, D), "o": (D, Q), "gate": (F, D), "up": (F, D), "down": (D, F)}
    shapes: dict[str, Shape] = {f"{EMBED}.weight": (config.vocab_size, D)}
    for layer in range(config.num_hidden_layers):
        for role in LAYER:
            module = layer_module(layer, role)
            shapes[f"{module}.weight"] = linear.get(role, (D,))
            if role in LINEAR and (config.mlp_bias if role in ("gate", "up", "down") else config.attention_bias):
                shapes[f"{module}.bias"] = linear[role][:1]
    shapes[f"{NORM}.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes[f"{HEAD}.weight"] = (config.vocab_size, D)
    return shapes


def weight_shapes(config: Config) -> dict[str, Shape]:
    """`parameter_shapes`, and the head's also where it is the embedding: what an untied model has."""
    shapes = parameter_shapes(config)
    return shapes | {f"{HEAD}.weight": shapes[f"{EMBED}.weight"]}


def parameter_count(config: Config) -> int:
    """How many numbers a checkpoint of this configuration holds."""
    total = 0
    for shape in parameter_shapes(config).values():
        total += shape[0] * (shape[1] if len(shape) == 2 else 1)
    return total
