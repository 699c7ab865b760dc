"""LoRA at chosen sites of a model: linear maps, the embedding, the head; and whole modules trained beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, random_generator
from minilora.frozen.weight import FrozenWeight
from minilora.lora import (
    LoRACache,
    dropout_mask,
    init_gaussian,
    init_kaiming,
    init_orthogonal,
    lora,
    lora_backward,
    merge,
)
from minilora.methods.dora import DoRALinear, first_magnitudes, magnitude_name
from minilora.methods.full import trained_copy, trained_site
from minilora.methods.lora_embedding import LoRAEmbedding, init_lora_embedding
from minilora.methods.pissa import Residual, as_change_of_W, residual
from minilora.methods.targets import Names, pattern_value, saved_module_names, target_module_names
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD
from minilora.model.sites import FrozenEmbedding, FrozenLinear, Gradients

RANDOM = {"kaiming": init_kaiming, "gaussian": init_gaussian, "orthogonal": init_orthogonal}
INITIALISATIONS = (*RANDOM, "pissa")


HostArray = np.ndarray[Any, Any]


class Place(NamedTuple):
    rank: int
    scale: float


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

    def merged(self) -> dict[str, Array]:
        return {"weight": merge(self.weight.dense(), self.A, self.B, self.scale).W}


def adapter_names(module: str) -> tuple[str, str]:
    """The names of A and B at a module, as PEFT writes them: `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    if module == EMBED:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def frozen_site(model: Model, module: str) -> FrozenLinear | FrozenEmbedding:
    """The site at `module`, which has to be a plain frozen one: adapters are not stacked silently."""
    site = model.sites[module]
    if not isinstance(site, FrozenLinear | FrozenEmbedding):
        raise ValueError(f"{module} is already adapted: start from the base model")
    return site


@dataclass(frozen=True)
class LoRA:
    """Rank r, α, dropout on the branch's input, and what is adapted; the fields mean what PEFT's mean.

    The scale is α/r, or α/√r with `rslora` (Kalajdzievski, 2023, arXiv:2312.03732). `rank_pattern` and `alpha_pattern`
    give modules whose name ends in a key (a regular expression) a rank or α of their own. A module of `modules_to_save`
    is not adapted: a copy of it trains whole. How names choose modules: methods/targets.py. With `dora` each row of an
    adapted weight has a length that trains; with init "pissa" A and B start as the principal part of the weight.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Names = ("q_proj", "v_proj")
    init: str = "kaiming"
    rslora: bool = False
    exclude_modules: Names = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    dora: bool = False

    def __post_init__(self) -> None:
        ranks = (self.rank, *self.rank_pattern.values())
        if min(ranks) < 1 or not 0 <= self.dropout < 1 or self.init not in INITIALISATIONS:
            raise ValueError(
                f"rank {min(ranks)} must be at least 1, dropout {self.dropout} in [0, 1), "
                f"init {self.init!r} one of {', '.join(INITIALISATIONS)}"
            )
        if self.init == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError(f"init orthogonal halves the rank, so every rank must be even, not {ranks}")
        if self.init == "pissa" and self.dropout > 0:
            raise ValueError(
                f"init pissa does not go with dropout {self.dropout}: it would drop the weight's principal part itself"
            )

    @property
    def scale(self) -> float:
        """s for the modules that no pattern names."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def places(self, config: Config) -> dict[str, Place]:
        """The adapted modules, in the model's order, each with its rank and scale."""
        saved = self.saved(config)
        places = {}
        for module in target_module_names(config, self.target_modules, self.exclude_modules, self.layers_to_transform):
            if module not in saved:
                rank = pattern_value(self.rank_pattern, module, self.rank)
                places[module] = Place(rank, self._scale(rank, pattern_value(self.alpha_pattern, module, self.alpha)))
        if EMBED in places and (self.dora or self.init == "pissa"):
            name = "DoRA" if self.dora else "init pissa"
            raise ValueError(f"{name} is for linear maps, not for {EMBED}: leave it out of the target modules")
        return places

    def saved(self, config: Config) -> list[str]:
        """The modules that train whole."""
        return saved_module_names(config, self.modules_to_save)

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """Fresh A and B for every target, and copies of the modules that train whole: the model computes as before."""
        trainable: dict[str, Array] = {}
        for module, place in self.places(model.config).items():
            base = self._base(model, module, place)
            weight = base.weight
            if isinstance(base, FrozenEmbedding):
                A, B = init_lora_embedding(place.rank, weight.shape, rng, dtype)
            elif isinstance(weight, Residual):
                A, B = weight.A.astype(dtype), weight.B.astype(dtype)
            else:
                A, B = RANDOM[self.init](place.rank, weight.shape, rng, dtype)
            trainable |= zip(adapter_names(module), (A, B), strict=True)
            if self.dora:
                m = first_magnitudes(module, weight, A, B, place.scale)
                trainable[magnitude_name(module)] = m.real.astype(dtype)
        for module in self.saved(model.config):
            trainable |= trained_copy(model, module, dtype)
        return trainable

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model with the adapter at its targets. The sites share the arrays of `trainable`: update those in place.

        If the embedding or the head of a tied model changes, they are one matrix no longer: the model's config says so.
        """
        config, sites = model.config, dict(model.sites)
        places, saved = self.places(config), self.saved(config)
        for key, (module, place) in enumerate(places.items()):
            base, (A, B) = self._base(model, module, place), (trainable[name] for name in adapter_names(module))
            if isinstance(base, FrozenEmbedding):
                sites[module] = LoRAEmbedding(base, A, B, place.scale)
            elif self.dora:
                m = trainable[magnitude_name(module)]
                sites[module] = DoRALinear(base, A, B, m, place.scale, self.dropout, key)
            else:
                sites[module] = LoRALinear(base, A, B, place.scale, self.dropout, key)
        for module in saved:
            sites[module] = trained_site(model, module, trainable)
        if {EMBED, HEAD} & {*places, *saved}:
            config = replace(config, tie_word_embeddings=False)
        return Model(config, sites)

    def _base(self, model: Model, module: str, place: Place) -> FrozenLinear | FrozenEmbedding:
        """The frozen site beside which A and B stand. With PiSSA its weight is without what A and B start as."""
        site = frozen_site(model, module)
        if self.init == "pissa" and isinstance(site, FrozenLinear):
            return FrozenLinear(residual(site.weight, place.rank, place.scale), site.bias)
        return site

    def saved_form(self, adapted: Model, tensors: Mapping[str, HostArray]) -> tuple[LoRA, dict[str, HostArray]]:
        """The adapter as it is written: one that computes the same on W itself, for every reader. (docs: L21)

        PiSSA's A and B belong to W_res, which no file holds. As a change of W they have twice the rank, and therefore
        an α that keeps the scale. Everything else is written as it is.
        """
        saved = dict(tensors)
        if self.init != "pissa":
            return self, saved
        for module in self.places(adapted.config):
            site, (A, B) = adapted.sites[module], adapter_names(module)
            assert isinstance(site, LoRALinear | DoRALinear) and isinstance(site.weight, Residual)
            saved[A], saved[B] = as_change_of_W(tensors[A], tensors[B], site.weight)
        growth = math.sqrt(2) if self.rslora else 2
        return replace(
            self,
            init="kaiming",
            rank=2 * self.rank,
            alpha=growth * self.alpha,
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: growth * alpha for name, alpha in self.alpha_pattern.items()},
        ), saved
