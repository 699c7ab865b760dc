"""PEFT's LoRA adapters in and out: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Reading is strict where PEFT is silent: every tensor is used, every setting that changes the result is understood,
or the load fails, saying which.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.formats.checkpoint import STORED
from minilora.formats.fields import Number, by_pattern, names, names_or_pattern, number, rank, whole
from minilora.formats.files import HostArray, check_shapes, open_safetensors, read_json, write_json, write_safetensors
from minilora.methods.dora import magnitude_name
from minilora.methods.lora import LoRA, adapter_names
from minilora.methods.targets import ALL_LINEAR, Names, is_named, pattern_value
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LAYER, LINEAR, parameter_shapes

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("init_lora_weights", "base_model_name_or_path", "revision"),
}
WITHOUT_EFFECT = {  # on what a finished adapter computes
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size"),  # each only with another field
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # each only with an init_lora_weights
}
# Others (pissa, olora, corda, loftq, …) change the base weights too, so that A and B alone do not say what is computed.
INITIALISATIONS = {None: "kaiming", True: "kaiming", False: "kaiming"} | {
    "gaussian": "gaussian",
    "orthogonal": "kaiming",
    "eva": "kaiming",
}


class Adapter(NamedTuple):
    """An adapter as its folder holds it."""

    settings: LoRA
    tensors: dict[str, HostArray]  # float32, named as in the model: `model.….q_proj.lora_A.weight`
    base_model: str  # the name or folder of the model it was trained on
    copies: dict[str, HostArray]  # base weights that PEFT saved beside it, by name, as stored; see check_copies


def write_adapter(
    folder: Path, settings: LoRA, tensors: Mapping[str, HostArray], base_model: str, revision: str | None = None
) -> None:
    """Write an adapter that PEFT loads. `tensors` are named as in the model: `model.….q_proj.lora_A.weight`."""
    folder = Path(folder)
    if settings.init == "pissa":
        raise ValueError("A and B of PiSSA say nothing without its residual weights: write their LoRA.saved_form")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "auto_mapping": None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": whole(settings.alpha),
        "lora_dropout": settings.dropout,
        "target_modules": _written_targets(settings.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if settings.init == "gaussian" else True,
        "modules_to_save": list(settings.modules_to_save) or None,
        "layers_to_transform": None if settings.layers_to_transform is None else list(settings.layers_to_transform),
        "layers_pattern": None,
    }
    exclude = settings.exclude_modules
    modules = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    younger = {  # old versions of PEFT raise on fields they do not know, so these only where they are needed
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "rank_pattern": _used(settings.rank_pattern, modules),
        "alpha_pattern": {name: whole(alpha) for name, alpha in _used(settings.alpha_pattern, modules).items()},
        "exclude_modules": exclude if isinstance(exclude, str) else list(exclude),
    }
    config |= {field: value for field, value in younger.items() if value}
    write_safetensors(folder / TENSORS, {PREFIX + name: tensor for name, tensor in tensors.items()}, {"format": "pt"})
    write_json(folder / CONFIG, config)


def _used(patterns: Mapping[str, Number], modules: Collection[str]) -> dict[str, Number]:
    """Those that name an adapted module: PEFT warns of others."""
    return {key: n for key, n in patterns.items() if any(pattern_value({key: True}, name, False) for name in modules)}


def _written_targets(targets: Names) -> str | list[str]:
    if isinstance(targets, str) and targets != ALL_LINEAR:
        return targets
    written: list[str] = []
    for target in (targets,) if isinstance(targets, str) else targets:
        # The seven names say the same as "all-linear", and to more versions of PEFT.
        written += [LAYER[role].rpartition(".")[2] for role in LINEAR] if target == ALL_LINEAR else [target]
    return list(dict.fromkeys(written))


def read_adapter(folder: Path, config: Config) -> Adapter:
    """Read an adapter for a model of this configuration. ValueError or OSError, naming file and field or tensor."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / CONFIG
    raw = read_json(path)
    _refuse_unsupported(path, raw)
    try:
        settings = _settings(path, raw, config)
        expected = adapter_shapes(config, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    tensors, copies = _read_tensors(folder, expected, config)
    return Adapter(settings, tensors, str(raw.get("base_model_name_or_path") or ""), copies)


def adapter_shapes(config: Config, settings: LoRA) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an adapter."""
    shapes = parameter_shapes(config)
    shapes.setdefault(f"{HEAD}.weight", shapes[f"{EMBED}.weight"])
    expected: dict[str, tuple[int, ...]] = {}
    for module, place in settings.places(config).items():
        rows, columns = shapes[f"{module}.weight"]
        if module == EMBED:
            rows, columns = columns, rows
        expected |= zip(adapter_names(module), ((place.rank, columns), (rows, place.rank)), strict=True)
        if settings.dora:
            expected[magnitude_name(module)] = (rows,)
    for module in settings.saved(config):
        expected |= {name: shapes[name] for name in (f"{module}.weight", f"{module}.bias") if name in shapes}
    return expected


def check_copies(folder: Path, copies: Mapping[str, HostArray], weights: Mapping[str, HostArray]) -> None:
    """ValueError where a base weight that PEFT saved beside an adapter is not the base model's.

    PEFT saves embedding and head along when they are adapted. Had they been changed, passing over them would be wrong.
    Rounded alike they must be equal: the adapter may have been trained on a base in bfloat16.
    """
    for name, copy in copies.items():
        own = weights[name if name in weights else f"{EMBED}.weight"]
        if not np.array_equal(copy, own.astype(copy.dtype)):
            raise ValueError(
                f"{folder / TENSORS}: holds a {name} of its own that differs from the base model's: "
                "the adapter belongs to another base, or one whose vocabulary was changed"
            )


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
    if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise ValueError(f"{path}: layers_pattern {raw['layers_pattern']!r} matches no layer of a Llama-style model")
    for field, value in raw.items():
        if value and field not in READ | WITHOUT_EFFECT:
            raise ValueError(f"{path}: {field} {value!r} is not supported")


def _settings(path: Path, raw: Mapping[str, Any], config: Config) -> LoRA:
    layers = raw.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if layers and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise ValueError(f"{path}: layers_to_transform is {layers!r}, expected layer numbers")
    return LoRA(
        rank=rank(path, raw, "r", 8),
        alpha=number(path, raw, "lora_alpha", 8),
        dropout=number(path, raw, "lora_dropout", 0),
        target_modules=_targets(path, raw, config),
        init=INITIALISATIONS[raw.get("init_lora_weights", True)],
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        exclude_modules=names_or_pattern(path, raw, "exclude_modules"),
        layers_to_transform=tuple(layers) if layers else None,
        rank_pattern=by_pattern(path, raw, "rank_pattern", rank),
        alpha_pattern=by_pattern(path, raw, "alpha_pattern", number),
        modules_to_save=names(path, raw, "modules_to_save"),
    )


def _targets(path: Path, raw: Mapping[str, Any], config: Config) -> Names:
    if raw.get("target_modules") is None:
        return ("q_proj", "v_proj")  # PEFT's choice for Llama
    targets = names_or_pattern(path, raw, "target_modules")
    if isinstance(targets, str):
        return (ALL_LINEAR,) if targets.lower() == ALL_LINEAR else targets
    known = [name.removesuffix(".weight") for name in parameter_shapes(config)] + [HEAD]
    # PEFT passes over names that match nothing, as long as one does.
    matching = tuple(entry for entry in targets if any(is_named(name, (entry,)) for name in known))
    if not matching:
        raise ValueError(f"{path}: target_modules {list(targets)} matches no projection of the base model")
    return matching


def _read_tensors(
    folder: Path, expected: Mapping[str, tuple[int, ...]], config: Config
) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
    """The adapter's tensors, and the base weights beside them."""
    path = folder / TENSORS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(f"{path}: no such file; convert adapter_model.bin to safetensors with PEFT")
    vocabulary = parameter_shapes(config)[f"{EMBED}.weight"]
    with open_safetensors(path) as file:
        found = stored_shapes(path, file)
        fitting = {PREFIX + name: shape for name, shape in expected.items()}
        copies: dict[str, str] = {}
        for module, rest in product((EMBED, HEAD), ("base_layer.weight", "weight")):
            key = f"{PREFIX}{module}.{rest}"
            if key in found and key not in fitting:
                copies.setdefault(f"{module}.weight", key)
        hint = f"The adapter does not fit its {CONFIG} and this base model."
        check_shapes(path, fitting | dict.fromkeys(copies.values(), vocabulary), found, hint)
        tensors = {name: file.get_tensor(PREFIX + name).astype(np.float32, copy=False) for name in expected}
        return tensors, {name: file.get_tensor(key) for name, key in copies.items()}


def stored_shapes(path: Path, file: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an open file. ValueError for one that holds no floating-point numbers."""
    headers = {name: file.get_slice(name) for name in file.keys()}
    for name, header in headers.items():
        if header.get_dtype() not in STORED:
            raise ValueError(f"{path}: {name} is stored as {header.get_dtype()}, not as {', '.join(STORED)}")
    return {name: tuple(header.get_shape()) for name, header in headers.items()}
