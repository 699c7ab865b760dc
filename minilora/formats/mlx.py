"""mlx-lm's LoRA and DoRA adapters in and out: a folder with `adapter_config.json` and `adapters.safetensors`.

The same matrices, transposed: `lora_a` (in, r) is Aᵀ, `lora_b` (r, out) is Bᵀ, and `m` is DoRA's magnitude. One rank
and one `scale`, which is s itself, hold for all modules. These are given by `keys`: names within a layer, meant of the
last `num_layers` layers (of all, if that is 0 or less), or full names. As in mlx-lm 0.32, mlx_lm/tuner/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast, get_type_hints

import numpy as np

from minilora.backend import HostArray
from minilora.formats.files import check_shapes, open_safetensors, read_json, write_json, write_safetensors
from minilora.formats.finite import finite
from minilora.formats.peft import CONFIG, Adapter, stored_shapes
from minilora.keys import Between, Count, Share, shown, stated
from minilora.methods.fields import AdapterKeys, whole
from minilora.methods.lora import LoRA
from minilora.methods.method import Method, known_methods
from minilora.methods.targets import projections
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LAYER, LINEAR, layer_module

MLX_TENSORS = "adapters.safetensors"
ENDS = {  # of names: ours → theirs
    **{"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"},
    **{"lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"},
}


class Parameters(TypedDict):
    """`lora_parameters`."""

    rank: Count
    scale: Annotated[float, Between(-1e9, 1e9)]


class MoreParameters(Parameters, total=False):
    keys: list[str]
    dropout: Share
    alpha: float  # mlx-lm itself once wrote it, and never read it


class MlxKeys(AdapterKeys):
    """mlx-lm's `adapter_config.json`."""

    lora_parameters: MoreParameters
    num_layers: Annotated[int, Between(-1, 2**12)]


TIED = (
    "of a tied model, mlx-lm adapts embedding and head as one, and PEFT and minilora each alone: "
    f"an adapter on {EMBED} or {HEAD} cannot be exchanged"
)


def check_sayable(method: Method, config: Config) -> LoRA:
    """The method, if mlx-lm's format has words for it on such a model. ValueError, naming the setting, if not."""
    if not method.mlx_type:
        raise ValueError(f"format mlx is for LoRA and DoRA: mlx-lm does not know {method.name} adapters")
    settings = cast(LoRA, method)
    places = settings.places(config)
    if settings.modules_to_save:
        raise ValueError(
            f"mlx-lm's format has no modules_to_save, here {', '.join(settings.modules_to_save)}: use PEFT's"
        )
    if len({place.rank for place in places.values()}) > 1:
        raise ValueError("mlx-lm's format has one rank for all modules and no rank_pattern: use PEFT's")
    if len({place.scale for place in places.values()}) > 1:
        raise ValueError("mlx-lm's format has one scale for all modules and no alpha_pattern: use PEFT's")
    if config.tie_word_embeddings and {EMBED, HEAD} & places.keys():
        raise ValueError(TIED)
    return settings


def write_mlx_adapter(
    folder: Path, method: Method, tensors: Mapping[str, HostArray], config: Config, base_model: str
) -> None:
    """Write an adapter that mlx-lm loads. `tensors` are named as in the model. ValueError as for check_sayable."""
    settings = check_sayable(method, config)
    places = settings.places(config)
    place = next(iter(places.values()))
    keys, num_layers = _keys(config, places)
    raw = {
        "model": base_model,
        "fine_tune_type": settings.mlx_type,
        "num_layers": num_layers,
        "lora_parameters": {
            "keys": keys,
            "rank": place.rank,
            "scale": whole(place.scale),
            "dropout": settings.dropout,
        },
    }
    named = {_their_name(name): finite("to be written", name, tensor).T for name, tensor in tensors.items()}
    write_safetensors(folder / MLX_TENSORS, named)
    write_json(folder / CONFIG, raw)


def read_mlx_adapter(folder: Path, config: Config) -> Adapter:
    """Read an adapter for a model of this configuration. ValueError or OSError, naming file and field or tensor."""
    path, tensors_path = folder / CONFIG, folder / MLX_TENSORS
    raw = read_json(path, MlxKeys)
    with open_safetensors(tensors_path) as file:
        stored_shape_of = stored_shapes(tensors_path, file)
        try:
            settings = _settings(path, raw, config, {name.rpartition(".")[0] for name in stored_shape_of})
            expected = settings.shapes(config)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        transposed = {_their_name(name): shape[::-1] for name, shape in expected.items()}
        hint = f"The adapter does not fit its {CONFIG} and this base model."
        check_shapes(tensors_path, transposed, stored_shape_of, hint)
        stored = {
            name: finite(tensors_path, _their_name(name), file.get_tensor(_their_name(name)).astype(np.float32))
            for name in expected
        }
    tensors = {name: np.ascontiguousarray(tensor.T) for name, tensor in stored.items()}
    return Adapter(settings, tensors, raw.get("model") or "", {})


def _settings(path: Path, raw: Mapping[str, Any], config: Config, adapted: Iterable[str]) -> LoRA:
    kind = raw.get("fine_tune_type", "lora")
    known = {method.mlx_type: method for method in known_methods().values() if issubclass(method, LoRA)}
    if kind not in known:
        raise ValueError(f"{path}: fine_tune_type {kind!r} is not supported, only {' and '.join(map(repr, known))}")
    parameters, num_layers = stated(raw["lora_parameters"]), raw["num_layers"]
    for field in parameters.keys() - get_type_hints(MoreParameters).keys():
        raise ValueError(f"{path}: {field} {shown(parameters[field])} in lora_parameters is not supported")
    # Without keys, old versions of mlx-lm adapt q and v, new ones every linear map of a layer: the tensors say which.
    keys = parameters.get("keys") or tuple(dict.fromkeys(_within_layer(module) for module in adapted))
    if config.tie_word_embeddings and {EMBED, HEAD} & set(keys):
        raise ValueError(f"{path}: {TIED}")
    within = tuple(LAYER[role] for role in LINEAR if LAYER[role] in keys)
    in_full = tuple(module for module in (EMBED, *projections(config), HEAD) if module in keys)
    if not within + in_full:
        raise ValueError(f"{path}: keys {list(keys)} name no linear map of the base model")
    first = _first(config, num_layers)
    rank = parameters["rank"]
    return known[kind](
        rank=rank,
        alpha=float(parameters["scale"] * rank),
        dropout=float(parameters.get("dropout", 0)),
        target_modules=within + in_full,
        layers_to_transform=tuple(range(first, config.num_hidden_layers)) if first else None,
    )


def _keys(config: Config, modules: Collection[str]) -> tuple[list[str], int]:
    """`keys` and `num_layers` for these modules: names within the last layers where those say it, else full names."""
    keys = list(dict.fromkeys(_within_layer(module) for module in modules))
    for num_layers in range(config.num_hidden_layers, 0, -1):
        last = range(_first(config, num_layers), config.num_hidden_layers)
        meant = {layer_module(layer, role) for layer in last for role in LINEAR if LAYER[role] in keys}
        if meant | ({EMBED, HEAD} & set(keys)) == set(modules):
            return keys, num_layers
    return list(modules), config.num_hidden_layers


def _first(config: Config, num_layers: int) -> int:
    """The first of the last `num_layers` layers."""
    return max(0, config.num_hidden_layers - num_layers) if num_layers > 0 else 0


def _within_layer(module: str) -> str:
    """`self_attn.q_proj` of `model.layers.0.self_attn.q_proj`; what is in no layer keeps its name."""
    return re.sub(r"^model\.layers\.\d+\.", "", module)


def _their_name(name: str) -> str:
    (end,) = (end for end in ENDS if name.endswith(f".{end}"))
    return name.removesuffix(end) + ENDS[end]
