"""LoRA at chosen sites of a model: which linear maps get an A and a B, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from minilora.backend import Array, random_generator
from minilora.frozen.weight import FrozenWeight
from minilora.lora import LoRACache, dropout_mask, lora, lora_backward, merge
from minilora.methods import lora_fields
from minilora.methods.lora_embedding import LoRAEmbedding, init_lora_embedding, lora_embedding_shapes
from minilora.methods.method import HostArrays, Method, Variant
from minilora.methods.placement import Placed, frozen_site
from minilora.methods.setting import setting
from minilora.methods.starts import STARTS
from minilora.methods.targets import pattern_value
from minilora.methods.whole_modules import attach_whole, whole_shapes, whole_start, with_sites
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, Shape, weight_shapes
from minilora.model.sites import FrozenEmbedding, FrozenLinear, Gradients, LowRank, Site

if TYPE_CHECKING:  # from Python 3.11 on
    from typing import Self


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

    def low_rank(self) -> LowRank:
        return LowRank(self.weight, self.base.bias, self.A, self.scale * self.B)

    def merged(self) -> dict[str, Array]:
        return {"weight": merge(self.weight.dense(), self.A, self.B, self.scale).W}


class RankAndScale(NamedTuple):
    """The r and the s of an adapted module."""

    rank: int
    scale: float


@dataclass(frozen=True)
class LoRA(Placed):
    """Rank r, α, dropout on the branch's input, and what is adapted; the fields mean what PEFT's mean.

    The scale is α/r, or α/√r with `rslora` (Kalajdzievski, 2023, arXiv:2312.03732). `rank_pattern` and `alpha_pattern`
    give modules whose name ends in a key (a regular expression) a rank or α of their own. A module of `modules_to_save`
    is not adapted: a copy of it trains whole. How names choose modules: methods/targets.py; how A and B start:
    methods/starts.py; on the embedding: methods/lora_embedding.py.
    """

    names = {"lora": {}, "qlora": {"frozen": "nf4"}}
    peft_type = "LORA"
    key_prefix = "base_model.model."
    mlx_type = "lora"
    thin_change = True
    rivals: ClassVar[tuple[Variant, ...]] = (
        Variant("lora", "A and B beside every linear map, rank 8, α 16", {}, (3e-3, 1e-2, 3e-2)),
        Variant("rslora", "LoRA scaled by α/√r", {"rslora": True}, (1e-3, 3e-3, 1e-2)),
        Variant("loraplus", "LoRA, B 16 times as fast as A", {"loraplus_lr_ratio": 16}, (3e-4, 1e-3, 3e-3)),
        Variant("pissa", "LoRA from W's principal part", {"init": "pissa"}, (1e-3, 3e-3, 1e-2)),
        Variant("orthogonal", "LoRA from orthogonal A and B", {"init": "orthogonal"}, (3e-3, 1e-2, 3e-2)),
        Variant("lora-qv", "LoRA on q and v alone", {"target_modules": ("q_proj", "v_proj")}, (3e-3, 1e-2, 3e-2)),
        Variant("lora-stored", "LoRA on W in the file's own type", {"frozen": "stored"}, (3e-3, 1e-2, 3e-2)),
        Variant("qlora", "LoRA on W in 4 bits", {"method": "qlora"}, (3e-3, 1e-2, 3e-2)),
    )

    rank: int = setting(8, "rank r: the rows of A and columns of B", at_least=1, aliases=("lora_r", "r"), capacity=True)
    alpha: float = setting(
        16.0, "the adapter's output is scaled by alpha / rank", aliases=("lora_alpha", "lora_scale", "scale")
    )
    dropout: float = setting(
        0.0,
        "the probability of zeroing an input of the adapter, while training",
        at_least=0,
        below=1,
        aliases=("lora_dropout",),
    )
    init: str = setting(
        "kaiming",
        "how A starts (B starts at zero, except with orthogonal and pissa)",
        choices=STARTS,
        aliases=("init_lora_weights",),
        metavar="NAME",
    )
    rslora: bool = setting(False, "scale by alpha / the root of rank instead", aliases=("use_rslora",))
    loraplus_lr_ratio: float = setting(
        1.0, "LoRA+: the learning rate of B over that of A", at_least=1, of_training=True
    )
    rank_pattern: Mapping[str, int] = setting(
        {}, "other ranks for some modules: q_proj=16", at_least=1, metavar="NAME=N"
    )
    alpha_pattern: Mapping[str, float] = setting({}, "other alphas for some modules: q_proj=32", metavar="NAME=X")

    def __post_init__(self) -> None:
        super().__post_init__()
        STARTS[self.init].check((self.rank, *self.rank_pattern.values()), self.dropout)

    @property
    def scale(self) -> float:
        """s for the modules that no pattern names."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def places(self, config: Config) -> dict[str, RankAndScale]:
        """The adapted modules, in the model's order, each with its rank and scale."""
        places = {}
        for module in self.adapted_modules(config):
            rank = pattern_value(self.rank_pattern, module, self.rank)
            places[module] = RankAndScale(
                rank, self._scale(rank, pattern_value(self.alpha_pattern, module, self.alpha))
            )
        if EMBED in places and self.linear_only_because:
            raise ValueError(
                f"{self.linear_only_because} is for linear maps, not for {EMBED}: leave it out of the target modules"
            )
        return places

    @property
    def linear_only_because(self) -> str:
        """The setting that excludes the embedding; empty if none does."""
        return f"init {self.init}" if STARTS[self.init].for_linear_maps_only else ""

    def frozen_at(self, W: FrozenWeight, place: RankAndScale) -> FrozenWeight:
        """The weight beside which A and B stand: W itself, or what a start such as PiSSA's leaves of it."""
        return STARTS[self.init].frozen(W, *place)

    # What stands at one linear map, by name within the module. DoRA adds to these three.

    def shapes_at(self, rank: int, shape: Shape) -> dict[str, Shape]:
        out_features, in_features = shape
        return {"lora_A.weight": (rank, in_features), "lora_B.weight": (out_features, rank)}

    def start_at(
        self, module: str, W: FrozenWeight, place: RankAndScale, rng: np.random.Generator, dtype: Any
    ) -> dict[str, Array]:
        A, B = STARTS[self.init].A_and_B(W, *place, rng, dtype)
        return {"lora_A.weight": A, "lora_B.weight": B}

    def site_at(self, base: FrozenLinear, parameters: Mapping[str, Array], place: RankAndScale, key: int) -> Site:
        A, B = parameters["lora_A.weight"], parameters["lora_B.weight"]
        return LoRALinear(base, A, B, place.scale, self.dropout, key)

    def shapes(self, config: Config) -> dict[str, Shape]:
        """A and B of every target, and the modules that train whole."""
        weights = weight_shapes(config)
        adapters: dict[str, Shape] = {}
        for module, place in self.places(config).items():
            shapes_at = lora_embedding_shapes if module == EMBED else self.shapes_at
            adapters |= _within(module, shapes_at(place.rank, weights[f"{module}.weight"]))
        return adapters | whole_shapes(config, self.modules_to_save)

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """Fresh A and B for every target, and copies of the modules that train whole: the model computes as before."""
        trainable: dict[str, Array] = {}
        for module, place in self.places(model.config).items():
            W = frozen_site(model, module).weight
            if module == EMBED:
                A, B = init_lora_embedding(place.rank, W.shape, rng, dtype)
                trainable |= _within(module, {"lora_embedding_A": A, "lora_embedding_B": B})
            else:
                trainable |= _within(module, self.start_at(module, W, place, rng, dtype))
        return trainable | whole_start(model, self.modules_to_save, dtype)

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model with the adapter at its targets. The sites share the arrays of `trainable`: update those in place.

        If the embedding or the head of a tied model changes, they are one matrix no longer: the model's config says so.
        """
        sites: dict[str, Site] = {}
        for key, (module, place) in enumerate(self.places(model.config).items()):
            base = frozen_site(model, module)
            if isinstance(base, FrozenEmbedding):
                A, B = (trainable[f"{module}.lora_embedding_{factor}"] for factor in "AB")
                sites[module] = LoRAEmbedding(base, A, B, place.scale)
                continue
            parameters = {name: trainable[f"{module}.{name}"] for name in self.shapes_at(place.rank, base.weight.shape)}
            W = self.frozen_at(base.weight, place)
            if W is not base.weight:
                base = FrozenLinear(W, base.bias)
            sites[module] = self.site_at(base, parameters, place, key)
        return attach_whole(with_sites(model, sites), self.modules_to_save, trainable)

    def rate_factors(self, names: Iterable[str]) -> dict[str, float]:
        """LoRA+: the learning rate of every B is `loraplus_lr_ratio` times that of all else. (docs: T11)

        A and B enter the output in different ways, so one rate is too low for B or too high for A, the more the wider
        the model (Hayou et al., 2024, arXiv:2402.12354, section 4). The ratio's name is PEFT's.
        """
        return {name: self.loraplus_lr_ratio for name in names if name.endswith(".lora_B.weight")}

    def saved_form(self, adapted: Model, tensors: HostArrays) -> tuple[Method, dict[str, np.ndarray[Any, Any]]]:
        return STARTS[self.init].saved_form(self, adapted, tensors)

    def saved_shapes(self, config: Config) -> dict[str, Shape]:
        return STARTS[self.init].saved_settings(self).shapes(config)

    def fields(self, config: Config) -> dict[str, Any]:
        return lora_fields.write(self, config)

    @classmethod
    def is_held_by(cls, raw: Mapping[str, Any]) -> bool:
        return raw.get("peft_type") == cls.peft_type and not raw.get("use_dora")

    @classmethod
    def from_fields(cls, place: object, raw: Mapping[str, Any], config: Config) -> Self:
        return cls(**lora_fields.read(place, raw, config))


def _within(module: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by name within a module, under their full names."""
    return {f"{module}.{name}": entry for name, entry in entries.items()}
