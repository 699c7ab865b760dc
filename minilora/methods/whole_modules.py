"""Modules that train whole: beside an adapter (PEFT's `modules_to_save`), or alone, all else frozen.

Embedding and head of a tied model are one matrix no longer once one of them trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.methods.full import trained_copy, trained_site
from minilora.methods.method import Method, Variant
from minilora.methods.setting import setting
from minilora.methods.targets import saved_module_names
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD, Shape, weight_shapes


def whole_shapes(config: Config, names: Sequence[str]) -> dict[str, Shape]:
    """Name and shape of every parameter of the modules that these names choose."""
    weights = weight_shapes(config)
    modules = saved_module_names(config, names)
    return {f"{m}.{p}": weights[f"{m}.{p}"] for m in modules for p in ("weight", "bias") if f"{m}.{p}" in weights}


def whole_start(model: Model, names: Sequence[str], dtype: Any) -> dict[str, Array]:
    """Copies of these parameters: what trains instead of them."""
    modules = saved_module_names(model.config, names)
    return {name: p for module in modules for name, p in trained_copy(model, module, dtype).items()}


def attach_whole(model: Model, names: Sequence[str], trainable: Mapping[str, Array]) -> Model:
    """The model in which these modules train."""
    modules = saved_module_names(model.config, names)
    return with_sites(model, {module: trained_site(model, module, trainable) for module in modules})


def with_sites(model: Model, sites: Mapping[str, Any]) -> Model:
    """The model with other sites. Where these are embedding or head, the two are one matrix no longer."""
    config = replace(model.config, tie_word_embeddings=False) if {EMBED, HEAD} & sites.keys() else model.config
    return Model(config, {**model.sites, **sites})


@dataclass(frozen=True)
class WholeModules(Method):
    """Copies of the named modules train, without any adapter."""

    names = {"head": {"modules_to_save": (HEAD,)}, "embedding": {"modules_to_save": (EMBED,)}}
    peft_type = "MINILORA_MODULES"
    rivals = (
        Variant("head", "the head alone", {"method": "head", "untie": True}, (3e-4, 1e-3, 3e-3)),
        Variant("embedding", "the embedding alone", {"method": "embedding", "untie": True}, (1e-3, 3e-3, 1e-2)),
    )

    modules_to_save: tuple[str, ...] = setting((HEAD,), "modules to train whole", metavar="NAME")

    def shapes(self, config: Config) -> dict[str, Shape]:
        return whole_shapes(config, self.modules_to_save)

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        return whole_start(model, self.modules_to_save, dtype)

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        return attach_whole(model, self.modules_to_save, trainable)
