"""The shape of a Llama-style model, read from Hugging Face's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("llama", "smollm3", "mistral")


@dataclass(frozen=True)
class Config:
    """Hugging Face's names. A head has `head_dim` features; `rope_layers[i]` says whether layer i uses RoPE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, float] | None
    rope_layers: tuple[bool, ...]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Read a parsed `config.json` of transformers 4 or 5. What minilora cannot compute is refused by name."""
        model_type = raw.get("model_type", "llama")
        if model_type not in ARCHITECTURES:
            raise ValueError(
                f"config.json: model_type {model_type!r} is not supported, only {', '.join(ARCHITECTURES)}"
            )
        _require(raw, "hidden_act", "silu")
        _require(raw, "pretraining_tp", 1)
        _require(raw, "use_sliding_window", False)
        if raw.get("sliding_window") and raw.get("use_sliding_window", True):
            raise ValueError(
                "config.json: sliding_window is not supported; minilora's attention sees the whole context"
            )
        try:
            hidden, layers, heads = raw["hidden_size"], raw["num_hidden_layers"], raw["num_attention_heads"]
            theta, scaling = _rope(raw)
            config = cls(
                vocab_size=raw["vocab_size"],
                hidden_size=hidden,
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or hidden // heads,
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                rope_layers=_rope_layers(raw, model_type, layers),
                tie_word_embeddings=raw.get("tie_word_embeddings", model_type == "smollm3"),
                attention_bias=raw.get("attention_bias", False),
                mlp_bias=raw.get("mlp_bias", False),
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
            )
        except KeyError as error:
            raise ValueError(f"config.json: {error.args[0]!r} is missing") from error
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError where numbers cannot go together."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd, and RoPE turns pairs of features")
        if len(self.rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"config.json: no_rope_layers has {len(self.rope_layers)} entries for {self.num_hidden_layers} layers"
            )


def _require(raw: dict[str, Any], key: str, value: object) -> None:
    if raw.get(key, value) != value:
        raise ValueError(f"config.json: {key} {raw[key]!r} is not supported, only {value!r}")


def _rope(raw: dict[str, Any]) -> tuple[float, dict[str, float] | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    keys = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in keys:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported, only default, {', '.join(keys)}")
    missing = [key for key in keys[kind] if key not in rope]
    if missing:
        raise ValueError(f"config.json: rope_type {kind!r} needs {', '.join(missing)}")
    return theta, {key: float(rope[key]) for key in keys[kind]}


def _rope_layers(raw: dict[str, Any], model_type: str, layers: int) -> tuple[bool, ...]:
    """SmolLM3 leaves RoPE out of every fourth layer; its `no_rope_layers` is 1 where RoPE is *used*."""
    if raw.get("no_rope_layers"):
        return tuple(bool(used) for used in raw["no_rope_layers"])
    if model_type == "smollm3":
        interval = raw.get("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    return (True,) * layers
