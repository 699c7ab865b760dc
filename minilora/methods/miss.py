"""MiSS: one small matrix, added to every shard of a weight (Kang and Yin, 2024, arXiv:2409.15371).

Cut the columns of W (out, in) into shards of r columns each. LoRA gives the shards changes that differ, s B A₁, s B A₂,
…; MiSS adds the same r columns to all of them, and these are all that trains:

    W' = W + ΔW,    ΔW = [ Mᵀ | Mᵀ | … | Mᵀ ],    that is ΔW_oi = M_ko with k = i mod r

    M (r, out)   zero at the start, hence ΔW = 0

If r does not divide in, the last shard is narrower and takes the first rows of M. As column i of W meets the input x_i,
all inputs with the same i mod r meet the same row of M: they can be added up first. This is the forward:

         x ────────────── Wᵀ ─────────────(+)── y         y = x Wᵀ + h M
         └─ dropout ─ fold ── h ── M ──────┘              h = fold(x̃),  h_k = x̃_k + x̃_k+r + x̃_k+2r + …

MiSS is therefore LoRA with s = 1, B = Mᵀ and a fixed A, r × r identity matrices side by side. ΔW has at most rank r,
r·out numbers train, and the first step moves all of them, for h is not zero. The backward needs h, (N, r), but not x.
Numbers like R3 are those of docs/miss.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minilora.backend import Array, random_generator, xp
from minilora.frozen.weight import FrozenWeight
from minilora.keys import Count, Share, checked, stated
from minilora.lora import Merged, dropout_mask
from minilora.methods.fields import refuse_unknown
from minilora.methods.method import Variant
from minilora.methods.placement import Placed, PlacementKeys, frozen_site, read_placement, write_placement
from minilora.methods.setting import setting
from minilora.methods.whole_modules import attach_whole, whole_shapes, whole_start, with_sites
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, Shape, weight_shapes
from minilora.model.sites import FrozenLinear, Gradients, Site

if TYPE_CHECKING:  # from Python 3.11 on
    from typing import Self


class MissKeys(PlacementKeys, total=False):
    """PEFT's fields that are read."""

    r: Count
    miss_dropout: Share
    init_weights: bool | str


SHARD = "miss_block"  # M within its module, under PEFT's name for it


def fold(x: Array, r: int) -> Array:
    """h_k = x_k + x_k+r + x_k+2r + …, over all inputs i with i mod r = k: (N, in) → (N, r), r ≤ in. (docs: R2)"""
    shards, rest = divmod(x.shape[1], r)
    full = shards * r
    # x[:, :full].reshape(-1, shards, r).sum(axis=1), as a product with ones, which a BLAS does several times as fast
    h = (xp.ones((1, shards), x.dtype) @ x[:, :full].reshape(len(x), shards, r))[:, 0]
    h[:, :rest] += x[:, full:]
    return h


def spread(h: Array, in_features: int) -> Array:
    """x_i = h_k with k = i mod r, copies of h side by side: (N, r) → (N, in). The transpose of `fold`. (docs: R3)"""
    copies = -(-in_features // h.shape[1])
    return xp.concatenate([h] * copies, axis=1)[:, :in_features]


class MissCache(NamedTuple):
    h: Array  # (N, r)
    mask: Array | None  # (N, in)


def miss(x: Array, W: FrozenWeight, M: Array, mask: Array | None = None) -> tuple[Array, MissCache]:
    """y = x Wᵀ + h M with h = fold(mask ⊙ x): (N, in) → (N, out). (docs: R2)

    The mask is dropout's, on the branch only. Neither W nor x is saved.
    """
    h = fold(x if mask is None else x * mask, len(M))
    y = h @ M
    y += W.forward(x)
    return y, MissCache(h, mask)


def miss_backward(dy: Array, W: FrozenWeight, M: Array, cache: MissCache) -> tuple[Array, Array]:
    """dx (N, in), dM (r, out). There is no dW: W is frozen. (docs: R3)

    Forward was y = x Wᵀ + h M and h_k the sum of x̃_i over all i with i mod r = k. Going back from y to M and h, and
    from h to x, each x̃_i was added to one h_k with the factor 1:
        dM = hᵀ dy        dh = dy Mᵀ        dx̃_i = dh_k        dx = dy W + mask ⊙ spread(dh).
    """
    h, mask = cache
    dM = h.T @ dy
    dh = dy @ M.T
    dx = spread(dh, W.shape[1])
    if mask is not None:
        dx *= mask
    dx += W.backward(dy)
    return dx, dM


def miss_merge(W: Array, M: Array) -> Merged:
    """W' = W + [ Mᵀ | Mᵀ | … ], (out, in), after which a forward costs what W's did. (docs: R1)"""
    return Merged(W + spread(M.T, W.shape[1]), W)


class MissLinear:
    """A frozen linear site with M beside it. `key` sets its dropout apart from other sites'."""

    trains = True

    def __init__(self, base: FrozenLinear, M: Array, dropout: float = 0.0, key: int = 0) -> None:
        self.base = base
        self.M = M
        self.dropout = dropout
        self.key = key

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, MissCache]:
        mask = None
        if self.dropout > 0 and seed is not None:
            mask = dropout_mask(x.shape, self.dropout, random_generator(seed, self.key), x.real.dtype)
        y, cache = miss(x, self.base.weight, self.M, mask)
        if self.base.bias is not None:
            y += self.base.bias
        return y, cache

    def backward(self, dy: Array, cache: MissCache) -> tuple[Array, Gradients]:
        dx, dM = miss_backward(dy, self.base.weight, self.M, cache)
        return dx, {SHARD: dM}

    def merged(self) -> dict[str, Array]:
        return {"weight": miss_merge(self.base.weight.dense(), self.M).W}


@dataclass(frozen=True)
class MiSS(Placed):
    """Rank r, dropout on the branch's input, and where: what LoRA has of these means the same here.

    Of PEFT's variants this is the plain one. Its "bat" lets the change depend on W, its "mini" shares M along the
    outputs too; both are refused by name when they are read.
    """

    names = {"miss": {}}
    peft_type = "MISS"
    key_prefix = "base_model.model."
    rivals = (
        Variant("miss", "one matrix for all shards of each W", {"method": "miss", "rank": 16}, (1e-3, 3e-3, 1e-2)),
    )

    rank: int = setting(8, "rank r: the rows of M", at_least=1, aliases=("lora_r", "r"), capacity=True)
    dropout: float = setting(
        0.0,
        "the probability of zeroing an input of the adapter, while training",
        at_least=0,
        below=1,
        aliases=("lora_dropout",),
    )

    def shapes(self, config: Config) -> dict[str, Shape]:
        """M of every target, and the modules that train whole. ValueError for a target that cannot have an M."""
        weights, shapes = weight_shapes(config), {}
        for module in self.adapted_modules(config):
            out_features, in_features = weights[f"{module}.weight"]
            if module == EMBED:
                raise ValueError(f"MiSS is for linear maps, not for {EMBED}: leave it out of the target modules")
            if self.rank > in_features:
                raise ValueError(f"rank {self.rank} is more than the {in_features} inputs of {module}")
            shapes[f"{module}.{SHARD}"] = self.rank, out_features
        return shapes | whole_shapes(config, self.modules_to_save)

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """M = 0 everywhere, and copies of the modules that train whole."""
        whole = whole_start(model, self.modules_to_save, dtype)
        shapes = self.shapes(model.config)
        return {name: whole[name] if name in whole else xp.zeros(shape, dtype) for name, shape in shapes.items()}

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        sites: dict[str, Site] = {}
        for key, module in enumerate(self.adapted_modules(model.config)):
            base = frozen_site(model, module)
            assert isinstance(base, FrozenLinear)
            sites[module] = MissLinear(base, trainable[f"{module}.{SHARD}"], self.dropout, key)
        return attach_whole(with_sites(model, sites), self.modules_to_save, trainable)

    def fields(self, config: Config) -> dict[str, Any]:
        return {"r": self.rank, "miss_dropout": self.dropout, "init_weights": True, **write_placement(self)}

    @classmethod
    def from_fields(cls, place: object, raw: Mapping[str, Any], config: Config) -> Self:
        raw = stated(checked(place, raw, MissKeys))
        # Whether M started at zero (True) or at random (False) does not matter to a finished adapter.
        if (init := raw.get("init_weights", True)) not in (True, False):
            raise ValueError(f"{place}: init_weights {init!r} is another function of x than plain MiSS: not supported")
        refuse_unknown(place, raw, {*MissKeys.__annotations__, "mini_r"})
        return cls(
            rank=raw.get("r", 64),
            dropout=float(raw.get("miss_dropout", 0)),
            **read_placement(place, raw, config),
        )
