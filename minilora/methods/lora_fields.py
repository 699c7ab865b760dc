"""LoRA and DoRA in PEFT's `adapter_config.json`: the fields of LoraConfig, written and read.

Reading is strict where PEFT is silent: every field that changes the result is understood, or refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from minilora.keys import Count, Share, checked, stated
from minilora.methods.fields import check_patterns, refuse_unknown, whole
from minilora.methods.placement import PlacementKeys, read_placement, write_placement
from minilora.methods.targets import pattern_value
from minilora.model.config import Config

if TYPE_CHECKING:
    from minilora.methods.lora import LoRA

Number = TypeVar("Number", int, float)


class LoraKeys(PlacementKeys, total=False):
    """PEFT's fields that are read."""

    r: Count
    lora_alpha: float
    lora_dropout: Share
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, Count]
    alpha_pattern: dict[str, float]
    init_lora_weights: bool | str


WITHOUT_EFFECT = {  # on what a finished adapter computes
    *("megatron_core", "qalora_group_size"),  # each only with another field
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # each only with an init_lora_weights
}
# Others (pissa, olora, corda, loftq, …) change the base weights too, so that A and B alone do not say what is computed.
INITIALISATIONS = {True: "kaiming", False: "kaiming"} | {
    "gaussian": "gaussian",
    "orthogonal": "kaiming",
    "eva": "kaiming",
}


def write(method: LoRA, config: Config) -> dict[str, Any]:
    """The fields of an adapter of such a model."""
    if method.init == "pissa":
        raise ValueError("A and B of PiSSA say nothing without its residual weights: write their LoRA.saved_form")
    adapted = method.adapted_modules(config)
    younger = {  # old versions of PEFT raise on fields they do not know, so these only where they are needed
        "use_rslora": method.rslora,
        "rank_pattern": _used(method.rank_pattern, adapted),
        "alpha_pattern": {name: whole(alpha) for name, alpha in _used(method.alpha_pattern, adapted).items()},
    }
    return {
        "r": method.rank,
        "lora_alpha": whole(method.alpha),
        "lora_dropout": method.dropout,
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
        **write_placement(method),
        **{field: value for field, value in younger.items() if value},
    }


def _used(patterns: Mapping[str, Number], modules: Collection[str]) -> dict[str, Number]:
    """The patterns that name an adapted module, since PEFT warns of others."""
    return {key: n for key, n in patterns.items() if any(pattern_value({key: True}, name, False) for name in modules)}


def read(place: object, raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The settings of LoRA or DoRA by name. ValueError, naming place and field, for what cannot be honoured."""
    for key in ("r", "lora_alpha", "lora_dropout"):
        if raw.get(key, 0) is None:  # elsewhere null is PEFT's own default
            raise ValueError(f"{place}: {key} is None, expected a number")
    raw = stated(checked(place, raw, LoraKeys))
    init = raw.get("init_lora_weights", True)
    if init not in INITIALISATIONS:
        raise ValueError(
            f"{place}: init_lora_weights {init!r} is not supported, because it also changes the base weights: "
            "convert the adapter to plain LoRA with PEFT"
        )
    refuse_unknown(place, raw, LoraKeys.__annotations__.keys() | WITHOUT_EFFECT)
    check_patterns(place, raw, "rank_pattern", "alpha_pattern")
    return {
        "rank": raw.get("r", 8),
        "alpha": float(raw.get("lora_alpha", 8)),
        "dropout": float(raw.get("lora_dropout", 0)),
        "init": INITIALISATIONS[init],
        "rslora": raw.get("use_rslora", False),
        "rank_pattern": raw.get("rank_pattern", {}),
        "alpha_pattern": {name: float(alpha) for name, alpha in raw.get("alpha_pattern", {}).items()},
        **read_placement(place, raw, config),
    }
