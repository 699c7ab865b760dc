"""The names of modules and tensors, as Hugging Face writes them. Every name in minilora is formed here."""

from __future__ import annotations

from typing import TypeAlias

from minilora.model.config import ATTENTION, MLP, Config

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
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LINEAR = (*ATTENTION, *MLP)  # roles that are linear maps


def layer_module(layer: int, role: str) -> str:
    """`layer_module(0, "q")` is `model.layers.0.self_attn.q_proj`."""
    return f"model.layers.{layer}.{LAYER[role]}"


def norms(config: Config) -> tuple[str, ...]:
    """The roles of a layer that are norms: of the whole width, and in some models of each head's q and k."""
    return ("attention_norm", "q_norm", "k_norm", "mlp_norm") if config.qk_norm else ("attention_norm", "mlp_norm")


def roles(config: Config) -> list[str]:
    """The roles of a layer that this model has."""
    return [role for role in LAYER if role in LINEAR or role in norms(config)]


def parameter_shapes(config: Config) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, in the order of the forward pass. A tied head has none."""
    D, F = config.hidden_size, config.intermediate_size
    Q, K = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear = {"q": (Q, D), "k": (K, D), "v": (K, D), "o": (D, Q), "gate": (F, D), "up": (F, D), "down": (D, F)}
    within = linear | dict.fromkeys(("q_norm", "k_norm"), (config.head_dim,))
    shapes: dict[str, Shape] = {f"{EMBED}.weight": (config.vocab_size, D)}
    for layer in range(config.num_hidden_layers):
        for role in roles(config):
            module = layer_module(layer, role)
            shapes[f"{module}.weight"] = within.get(role, (D,))
            if role in config.biased:
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
