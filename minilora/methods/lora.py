"""LoRA at chosen linear sites of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.backend import Array, random_generator
from minilora.frozen import FrozenWeight
from minilora.lora import LoRACache, dropout_mask, init_gaussian, init_kaiming, lora, lora_backward
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import HEAD, LINEAR, layer_module
from minilora.model.sites import FrozenLinear, Gradients

INITIALISATIONS = {"kaiming": init_kaiming, "gaussian": init_gaussian}


@dataclass(frozen=True)
class LoRASettings:
    """Rank r, α, dropout on the branch's input, and which linear maps are adapted.

    A target is a module name or its ending ("q_proj", "mlp.up_proj"), as in PEFT; "all-linear" is all seven
    projections of every layer. The scale is α/r, or α/√r with `rslora` (Kalajdzievski, 2023, arXiv:2312.03732).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    init: str = "kaiming"
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or self.init not in INITIALISATIONS:
            raise ValueError(
                f"rank {self.rank} must be at least 1, dropout {self.dropout} in [0, 1), "
                f"init {self.init!r} one of {', '.join(INITIALISATIONS)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear:
    """A frozen linear site with the adapter A, B beside it. `key` sets its dropout apart from other sites'."""

    trains = True

    def __init__(
        self, base: FrozenLinear, A: Array, B: Array, scale: float, dropout: float = 0.0, key: int = 0
    ) -> None:
        self.base = base
        self.A = A
        self.B = B
        self.scale = scale
        self.dropout = dropout
        self.key = key

    @property
    def weight(self) -> FrozenWeight:
        return self.base.weight

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, LoRACache]:
        mask = None
        if self.dropout > 0 and seed is not None:
            mask = dropout_mask(x.shape, self.dropout, random_generator(seed, self.key), x.real.dtype)
        y, cache = lora(x, self.weight, self.A, self.B, self.scale, mask)
        if self.base.bias is not None:
            y += self.base.bias
        return y, cache

    def backward(self, dy: Array, cache: LoRACache) -> tuple[Array, Gradients]:
        dx, dA, dB = lora_backward(dy, self.weight, self.A, self.B, self.scale, cache)
        return dx, {"lora_A.weight": dA, "lora_B.weight": dB}


def target_module_names(config: Config, targets: Iterable[str]) -> list[str]:
    """Full names of the modules that `targets` choose, in the model's order. A target that matches none is an error."""
    projections = [layer_module(layer, role) for layer in range(config.num_hidden_layers) for role in LINEAR]
    chosen: set[str] = set()
    for target in targets:
        if target == "all-linear":
            matches = projections
        else:
            matches = [name for name in [*projections, HEAD] if name == target or name.endswith(f".{target}")]
        if not matches:
            known = ", ".join(sorted({name.rsplit(".", 1)[1] for name in projections}))
            raise ValueError(
                f"target module {target!r} matches no linear map of the model: choose from {known}, all-linear"
            )
        if HEAD in matches:
            raise ValueError("adapting lm_head is not supported yet: leave it out of the target modules")
        chosen.update(matches)
    return [name for name in projections if name in chosen]


def init_adapter(
    model: Model, settings: LoRASettings, rng: np.random.Generator, dtype: Any = np.float32
) -> dict[str, Array]:
    """Fresh A and B for every target, under PEFT's names: `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    init = INITIALISATIONS[settings.init]
    trainable = {}
    for module in target_module_names(model.config, settings.target_modules):
        shape = frozen_linear(model, module).weight.shape
        A, B = init(settings.rank, shape, rng, dtype)
        trainable[f"{module}.lora_A.weight"], trainable[f"{module}.lora_B.weight"] = A, B
    return trainable


def attach(model: Model, settings: LoRASettings, trainable: Mapping[str, Array]) -> Model:
    """The model with the adapter at its targets. The sites share the arrays of `trainable`: update those in place."""
    sites = dict(model.sites)
    for key, module in enumerate(target_module_names(model.config, settings.target_modules)):
        A, B = trainable[f"{module}.lora_A.weight"], trainable[f"{module}.lora_B.weight"]
        sites[module] = LoRALinear(frozen_linear(model, module), A, B, settings.scale, settings.dropout, key)
    return Model(model.config, sites)


def frozen_linear(model: Model, module: str) -> FrozenLinear:
    """The site at `module`, which has to be a plain frozen one: adapters are not stacked silently."""
    site = model.sites[module]
    if not isinstance(site, FrozenLinear):
        raise ValueError(f"{module} is already adapted: start from the base model")
    return site
