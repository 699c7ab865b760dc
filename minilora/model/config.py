"""The shape of a Llama-style model, read from Hugging Face's `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypedDict

from minilora.keys import Count, Layers, Positions, Positive, TokenId, checked, stated

ARCHITECTURES = ("llama", "smollm3", "mistral", "qwen2", "qwen3")
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")  # the linear maps of a layer


class RopeKeys(TypedDict, total=False):
    """`rope_parameters` and `rope_scaling`."""

    rope_type: str
    type: str
    rope_theta: Positive
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Positive
    beta_fast: Positive
    beta_slow: Positive
    attention_factor: Positive
    mscale: float
    mscale_all_dim: float
    truncate: bool
    partial_rotary_factor: float


class ConfigKeys(TypedDict, total=False):
    """`config.json`: each key that is read, or that has to have the one value that is computed here."""

    model_type: str
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    max_position_embeddings: Positions
    original_max_position_embeddings: Positive
    rms_norm_eps: Positive
    rope_theta: Positive
    rope_scaling: RopeKeys
    rope_parameters: RopeKeys
    no_rope_layers: list[int | bool]
    no_rope_layer_interval: Count
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    pretraining_tp: int
    partial_rotary_factor: float
    sliding_window: int
    use_sliding_window: bool
    layer_types: list[str]
    eos_token_id: TokenId | list[TokenId]
    dtype: str
    torch_dtype: str


@dataclass(frozen=True)
class Config:
    """Hugging Face's names, and three of our own: `rope_layers[i]` says whether layer i uses RoPE, `biased` which of a
    layer's linear maps have a bias, and `qk_norm` whether the q and k of each head are normalised (Qwen3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, float] | None
    rope_layers: tuple[bool, ...]
    tie_word_embeddings: bool
    biased: tuple[str, ...]
    qk_norm: bool

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Read a parsed `config.json` of transformers 4 or 5. What minilora cannot compute is refused by name."""
        raw = stated(checked("config.json", raw, ConfigKeys))
        kind = raw.get("model_type", "llama")
        _refuse_unsupported(raw, kind)
        for key in NEEDED if kind == "llama" else (*NEEDED, "num_key_value_heads"):
            if key not in raw:
                raise ValueError(f"config.json: {key!r} is missing")
        hidden, heads, layers = raw["hidden_size"], raw["num_attention_heads"], raw["num_hidden_layers"]
        if "head_dim" not in raw and kind != "qwen3" and hidden % heads:
            raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        positions = raw.get("max_position_embeddings", 2048)
        theta, scaling = _rope(raw, kind, positions)
        config = cls(
            vocab_size=raw["vocab_size"],
            hidden_size=hidden,
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads", heads),
            head_dim=raw.get("head_dim", 128 if kind == "qwen3" else hidden // heads),
            max_position_embeddings=positions,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_layers=_rope_layers(raw, kind, layers),
            tie_word_embeddings=raw.get("tie_word_embeddings", kind == "smollm3"),
            biased=_biased(raw, kind),
            qk_norm=kind == "qwen3",
        )
        if heads % config.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        if config.head_dim % 2:
            raise ValueError(f"config.json: head_dim {config.head_dim} is odd, and RoPE turns pairs of features")
        if len(config.rope_layers) != layers:
            raise ValueError(f"config.json: no_rope_layers has {len(config.rope_layers)} entries for {layers} layers")
        return config


def _refuse_unsupported(raw: dict[str, Any], kind: str) -> None:
    """Raise ValueError for what would change the computation and is not implemented here."""
    if kind not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    if "quantization_config" in raw:
        raise ValueError("config.json: quantization_config: quantised checkpoints are not supported")
    rope = raw.get("rope_parameters", {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("config.json: rope_parameters that differ from layer to layer are not supported")
    supported = {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1, "use_sliding_window": False}
    for key, value in supported.items():
        given = raw.get(key, rope.get(key, value))
        if given != value:
            raise ValueError(f"config.json: {key} {given!r} is not supported, only {value!r}")
    windows = set(raw.get("layer_types", ())) - {"full_attention"} or (kind == "mistral" and "sliding_window" in raw)
    if windows:
        raise ValueError("config.json: sliding_window is not supported: attention here sees the whole context")


def _rope(raw: dict[str, Any], kind: str, positions: int) -> tuple[float, dict[str, float] | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = stated(raw.get("rope_parameters", raw.get("rope_scaling", {})))
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0 if kind == "llama" else None))
    if theta is None:
        raise ValueError("config.json: 'rope_theta' is missing")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    keys = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
    if kind not in keys:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported, only default, {', '.join(keys)}")
    original = raw.get("original_max_position_embeddings", positions)
    rope = {"original_max_position_embeddings": original} | rope
    missing = [key for key in keys[kind] if key not in rope]
    if missing:
        raise ValueError(f"config.json: rope_type {kind!r} needs {', '.join(missing)}")
    scaling = {key: float(rope[key]) for key in keys[kind]}
    return float(theta), scaling | (yarn(rope, scaling["factor"]) if kind == "yarn" else {})


def yarn(rope: dict[str, Any], factor: float) -> dict[str, float]:
    """What else YaRN is set by, each as transformers has it where it is not given. `truncate` is 1 or 0."""

    def size(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    given = stated(rope)
    both = given.get("mscale") and given.get("mscale_all_dim")
    usual = size(given["mscale"]) / size(given["mscale_all_dim"]) if both else size(1)
    return {
        "beta_fast": float(given.get("beta_fast") or 32),
        "beta_slow": float(given.get("beta_slow") or 1),
        "attention_factor": float(given.get("attention_factor", usual)),
        "truncate": float(given.get("truncate", True)),
    }


def _biased(raw: dict[str, Any], kind: str) -> tuple[str, ...]:
    """Qwen2 always has three biases a layer and Mistral none; elsewhere two settings say it."""
    if kind == "qwen2":
        return ATTENTION[:3]
    if kind == "mistral":
        return ()
    mlp = kind != "qwen3" and raw.get("mlp_bias", False)
    return (ATTENTION if raw.get("attention_bias", False) else ()) + (MLP if mlp else ())


def _rope_layers(raw: dict[str, Any], kind: str, layers: int) -> tuple[bool, ...]:
    """SmolLM3 leaves RoPE out of every fourth layer; its `no_rope_layers` is 1 where RoPE is *used*."""
    if kind != "smollm3":
        return (True,) * layers
    if raw.get("no_rope_layers"):
        return tuple(bool(used) for used in raw["no_rope_layers"])
    interval = raw.get("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(layers))
