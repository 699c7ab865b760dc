"""LoRA and DoRA in PEFT's `adapter_config.json`: the fields of LoraConfig, written and read.

Reading is strict where PEFT is silent: every field that changes the result is understood, or refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from minilora.methods.fields import COMMON, Number, by_pattern, name_list, names_or_pattern, number, rank, whole
from minilora.methods.targets import ALL_LINEAR, ModuleNames, is_named, pattern_value
from minilora.model.config import Config
from minilora.model.names import HEAD, LAYER, LINEAR, parameter_shapes

if TYPE_CHECKING:
    from minilora.methods.lora import LoRA

READ = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("init_lora_weights",),
}
WITHOUT_EFFECT = {  # on what a finished adapter computes
    *COMMON,
    *("megatron_core", "qalora_group_size"),  # each only with another field
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # each only with an init_lora_weights
}
# Others (pissa, olora, corda, loftq, …) change the base weights too, so that A and B alone do not say what is computed.
INITIALISATIONS = {None: "kaiming", True: "kaiming", False: "kaiming"} | {
    "gaussian": "gaussian",
    "orthogonal": "kaiming",
    "eva": "kaiming",
}


def write(method: LoRA, modules: Iterable[str]) -> dict[str, Any]:
    """The fields of an adapter that changes these modules."""
    if method.init == "pissa":
        raise ValueError("A and B of PiSSA say nothing without its residual weights: write their LoRA.saved_form")
    exclude, adapted = method.exclude_modules, set(modules)
    younger = {  # old versions of PEFT raise on fields they do not know, so these only where they are needed
        "use_rslora": method.rslora,
        "rank_pattern": _used(method.rank_pattern, adapted),
        "alpha_pattern": {name: whole(alpha) for name, alpha in _used(method.alpha_pattern, adapted).items()},
        "exclude_modules": exclude if isinstance(exclude, str) else list(exclude),
    }
    return {
        "r": method.rank,
        "lora_alpha": whole(method.alpha),
        "lora_dropout": method.dropout,
        "target_modules": _written_targets(method.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
        "modules_to_save": list(method.modules_to_save) or None,
        "layers_to_transform": None if method.layers_to_transform is None else list(method.layers_to_transform),
        "layers_pattern": None,
        **{field: value for field, value in younger.items() if value},
    }


def _used(patterns: Mapping[str, Number], modules: Collection[str]) -> dict[str, Number]:
    """The patterns that name an adapted module, since PEFT warns of others."""
    return {key: n for key, n in patterns.items() if any(pattern_value({key: True}, name, False) for name in modules)}


def _written_targets(targets: ModuleNames) -> str | list[str]:
    if isinstance(targets, str) and targets != ALL_LINEAR:
        return targets
    written: list[str] = []
    for target in (targets,) if isinstance(targets, str) else targets:
        # The seven names say the same as "all-linear", and to more versions of PEFT.
        written += [LAYER[role].rpartition(".")[2] for role in LINEAR] if target == ALL_LINEAR else [target]
    return list(dict.fromkeys(written))


def read(place: object, raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The settings of LoRA or DoRA by name. ValueError, naming place and field, for what cannot be honoured."""
    _refuse_unsupported(place, raw)
    layers = raw.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if layers and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise ValueError(f"{place}: layers_to_transform is {layers!r}, expected layer numbers")
    return {
        "rank": rank(place, raw, "r", 8),
        "alpha": number(place, raw, "lora_alpha", 8),
        "dropout": number(place, raw, "lora_dropout", 0),
        "target_modules": _targets(place, raw, config),
        "init": INITIALISATIONS[raw.get("init_lora_weights", True)],
        "rslora": bool(raw.get("use_rslora")),
        "exclude_modules": names_or_pattern(place, raw, "exclude_modules"),
        "layers_to_transform": tuple(layers) if layers else None,
        "rank_pattern": by_pattern(place, raw, "rank_pattern", rank),
        "alpha_pattern": by_pattern(place, raw, "alpha_pattern", number),
        "modules_to_save": name_list(place, raw, "modules_to_save"),
    }


def _refuse_unsupported(place: object, raw: Mapping[str, Any]) -> None:
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{place}: bias {raw['bias']!r} is not supported, only 'none'")
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, str | bool | None) or init not in INITIALISATIONS:
        raise ValueError(
            f"{place}: init_lora_weights {init!r} is not supported, because it also changes the base weights: "
            "convert the adapter to plain LoRA with PEFT"
        )
    if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise ValueError(f"{place}: layers_pattern {raw['layers_pattern']!r} matches no layer of a Llama-style model")
    for field, value in raw.items():
        if value and field not in READ | WITHOUT_EFFECT:
            raise ValueError(f"{place}: {field} {value!r} is not supported")


def _targets(place: object, raw: Mapping[str, Any], config: Config) -> ModuleNames:
    if raw.get("target_modules") is None:
        return ("q_proj", "v_proj")  # PEFT's choice for Llama
    targets = names_or_pattern(place, raw, "target_modules")
    if isinstance(targets, str):
        return (ALL_LINEAR,) if targets.lower() == ALL_LINEAR else targets
    known = [name.removesuffix(".weight") for name in parameter_shapes(config)] + [HEAD]
    # PEFT passes over names that match nothing, as long as one does.
    matching = tuple(entry for entry in targets if any(is_named(name, (entry,)) for name in known))
    if not matching:
        raise ValueError(f"{place}: target_modules {list(targets)} matches no projection of the base model")
    return matching
