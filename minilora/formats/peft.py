"""PEFT's LoRA adapters in and out: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Reading is strict where PEFT is silent: every tensor is used, every setting that changes the result is understood,
or the load fails, saying which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.files import HostArray, check_shapes, open_safetensors, read_json, write_json, write_safetensors
from minilora.methods.lora import LoRASettings
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LAYER, LINEAR, layer_module, parameter_shapes

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias", "init_lora_weights"),
    "base_model_name_or_path",
}
WITHOUT_EFFECT = {  # on what a finished adapter computes
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "layers_pattern", "ensure_weight_tying"),  # each only with another field
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # each only with an init_lora_weights
}
# Others (pissa, olora, corda, loftq, …) change the base weights too, so that A and B alone do not say what is computed.
INITIALISATIONS = {None: "kaiming", True: "kaiming", False: "kaiming"} | {
    "gaussian": "gaussian",
    "orthogonal": "kaiming",
    "eva": "kaiming",
}


def write_adapter(folder: Path, settings: LoRASettings, tensors: Mapping[str, HostArray], base_model: str) -> None:
    """Write an adapter that PEFT loads. `tensors` are named as in the model: `model.….q_proj.lora_A.weight`."""
    folder = Path(folder)
    targets: list[str] = []
    for target in settings.target_modules:
        # The seven names say the same as "all-linear", and to more versions of PEFT.
        targets += [LAYER[role].rpartition(".")[2] for role in LINEAR] if target == "all-linear" else [target]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(dict.fromkeys(targets)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if settings.init == "gaussian" else True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if settings.rslora:  # old versions of PEFT raise on fields they do not know, so this one only where it is needed
        config["use_rslora"] = True
    write_safetensors(folder / TENSORS, {PREFIX + name: tensor for name, tensor in tensors.items()}, {"format": "pt"})
    write_json(folder / CONFIG, config)


def read_adapter(folder: Path, config: Config) -> tuple[LoRASettings, dict[str, HostArray], str]:
    """Settings, tensors in float32 under the model's names, and the name of the base model they were trained on."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / CONFIG
    raw = read_json(path)
    _refuse_unsupported(path, raw)
    rank = _number(path, raw, "r", 8)
    if rank < 1 or rank != int(rank):
        raise ValueError(f"{path}: r is {rank}, expected a whole number of at least 1")
    modules, targets = _targets(path, raw.get("target_modules"), config)
    settings = LoRASettings(
        rank=int(rank),
        alpha=_number(path, raw, "lora_alpha", 8),
        dropout=_number(path, raw, "lora_dropout", 0),
        target_modules=targets,
        init=INITIALISATIONS[raw.get("init_lora_weights", True)],
        rslora=bool(raw.get("use_rslora")),
    )
    tensors = _read_tensors(folder, modules, settings.rank, config)
    return settings, tensors, str(raw.get("base_model_name_or_path") or "")


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    for field, default, supported in (("peft_type", None, "LORA"), ("bias", "none", "none")):
        if raw.get(field, default) != supported:
            raise ValueError(f"{path}: {field} {raw.get(field)!r} is not supported, only {supported!r}")
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, str | bool | None) or init not in INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights {init!r} is not supported, because it also changes the base weights: "
            "convert the adapter to plain LoRA with PEFT"
        )
    for field, value in raw.items():
        if value and field not in READ | WITHOUT_EFFECT:
            raise ValueError(f"{path}: {field} {value!r} is not supported: minilora reads plain LoRA")


def _number(path: Path, raw: Mapping[str, Any], field: str, default: float) -> float:
    value = raw.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {field} is {value!r}, expected a number")
    return float(value)


def _targets(path: Path, target: Any, config: Config) -> tuple[list[str], tuple[str, ...]]:
    """The modules that `target_modules` chooses, and the target_modules of LoRASettings that choose the same."""
    linear = [layer_module(layer, role) for layer in range(config.num_hidden_layers) for role in LINEAR]
    entries: tuple[str, ...] = ()
    if target is None:
        target = ["q_proj", "v_proj"]  # PEFT's choice for Llama
    if target == "all-linear":
        modules = linear
    elif isinstance(target, str):
        try:
            modules = [name for name in [*linear, HEAD, EMBED] if re.fullmatch(target, name)]
        except re.error as error:
            raise ValueError(f"{path}: target_modules {target!r} is not a regular expression ({error})") from error
    elif isinstance(target, list) and all(isinstance(entry, str) for entry in target):
        chosen = {entry: [n for n in [*linear, HEAD, EMBED] if f".{n}".endswith(f".{entry}")] for entry in target}
        modules = [name for name in [*linear, HEAD, EMBED] if any(name in names for names in chosen.values())]
        entries = tuple(entry for entry, names in chosen.items() if names)  # PEFT, too, passes over the others
    else:
        raise ValueError(f"{path}: target_modules {target!r} is neither a list of names nor a text")
    for name in (HEAD, EMBED):
        if name in modules:
            raise ValueError(f"{path}: target_modules includes {name}, whose adapters are not supported")
    if not modules:
        raise ValueError(f"{path}: target_modules {target!r} matches no projection of the base model")
    return modules, entries or tuple(sorted(modules))


def _read_tensors(folder: Path, modules: list[str], rank: int, config: Config) -> dict[str, HostArray]:
    path = folder / TENSORS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(f"{path}: no such file; convert adapter_model.bin to safetensors with PEFT")
    shapes = parameter_shapes(config)
    expected: dict[str, tuple[int, ...]] = {}
    for module in modules:
        out_features, in_features = shapes[f"{module}.weight"]
        expected[f"{PREFIX}{module}.lora_A.weight"] = (rank, in_features)
        expected[f"{PREFIX}{module}.lora_B.weight"] = (out_features, rank)
    with open_safetensors(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        check_shapes(path, expected, found, f"The adapter does not fit its {CONFIG} and this base model.")
        return {name.removeprefix(PREFIX): file.get_tensor(name).astype(np.float32, copy=False) for name in expected}
