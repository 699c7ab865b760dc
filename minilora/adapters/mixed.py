"""One batch whose rows use different adapters. Each row gets the result of its own model; the base is shared.

An adapter is a few thin matrices beside a frozen weight, so the costly product x Wᵀ is computed once for all rows, and
only the thin products adapter by adapter (Sheng et al., 2023, S-LoRA, arXiv:2311.03285; Chen et al., 2023, Punica,
arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora.backend import Array, to_device, xp
from minilora.methods.lora import LoRALinear
from minilora.model.model import Model
from minilora.model.names import HEAD
from minilora.model.sites import FrozenLinear, Gradients, LowRank, Site


def mixed(models: Sequence[Model]) -> Model:
    """The model of a batch in which row b is to be computed by models[b], all of them on one base.

    It has no backward. ValueError if the models cannot share a batch (`shares_batches`).
    """
    first = models[0]
    if all(model is first for model in models):
        return first
    if not all(shares_batches(model, first) for model in models):
        raise ValueError(
            "these models cannot share a batch: they are on different bases, or one changes the head or puts "
            "virtual tokens first. Give each a batch of its own"
        )
    return _side_by_side(models)


def continuing(models: Sequence[Model]) -> Model:
    """The model of a batch in which each row b has its past already, and gets its next token by models[b].

    A model's virtual tokens are in the past of its row by then, and the head is given one token of each row. So models
    that cannot begin in one batch (`shares_batches`) go on in one.
    """
    return _side_by_side(models)


def _side_by_side(models: Sequence[Model]) -> Model:
    first = models[0]
    return Model(first.config, {name: _site([model.sites[name] for model in models]) for name in first.sites})


def shares_batches(model: Model, other: Model) -> bool:
    """Whether rows of both models may be in one batch.

    Virtual tokens would shift some rows and not others. The head gets only the last tokens or those with a label, which
    no longer show the row they come from, so both models must have the same head.
    """
    return not model.virtual_tokens and not other.virtual_tokens and model.sites[HEAD] is other.sites[HEAD]


def _site(sites: Sequence[Site]) -> Site:
    """One site for the batch, made from the site of each row."""
    first = sites[0]
    if all(site is first for site in sites):
        return first
    bases = [site.base if isinstance(site, LoRALinear) else site for site in sites]
    base = bases[0]
    if isinstance(base, FrozenLinear) and all(other is base for other in bases):
        return MixedLoRA(base, sites)
    return MixedSite(sites)


class MixedLoRA:
    """A frozen linear map with a LoRA of its own for each row of the batch, or none. There is no dropout.

    For the tokens x of a row with A, B, s: y = x Wᵀ + s (x Aᵀ) Bᵀ. One first product serves all rows. (docs: S4)
    """

    trains = False

    def __init__(self, base: FrozenLinear, sites: Sequence[Site]) -> None:
        self.base = base
        self.batch = len(sites)
        self.loras = [(site, rows) for site, rows in _rows_of(sites) if isinstance(site, LoRALinear)]

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, None]:
        y, _ = self.base.forward(x)
        self.add(x.reshape(self.batch, -1, x.shape[-1]), y.reshape(self.batch, -1, y.shape[-1]))
        return y, None

    def add(self, x: Array, y: Array) -> None:
        """y[b] += s (x[b] Aᵀ) Bᵀ for each row b, in place; x (B, …, in), y (B, …, out)."""
        for lora, rows in self.loras:
            y[rows] += lora.scale * (x[rows] @ lora.A.T) @ lora.B.T

    def low_rank(self) -> LowRank:
        """The adapters' numbers are not copied, since rows come and go."""
        return LowRank(self.base.weight, self.base.bias, add=self.add)

    def backward(self, dy: Array, cache: None) -> tuple[Array, Gradients]:
        raise AssertionError("a mixed batch only computes: nothing in it trains")


class MixedSite:
    """Sites of any kind. The rows of each site pass through it together."""

    trains = False

    def __init__(self, sites: Sequence[Site]) -> None:
        self.batch = len(sites)
        self.groups = _rows_of(sites)

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, None]:
        x = x.reshape(self.batch, -1, *x.shape[1:])  # tokens (B·T,) or activations (B·T, D), row by row
        parts = [site.forward(x[rows].reshape(-1, *x.shape[2:]), seed)[0] for site, rows in self.groups]
        y = xp.empty((*x.shape[:2], parts[0].shape[-1]), parts[0].dtype)
        for part, (_, rows) in zip(parts, self.groups, strict=True):
            y[rows] = part.reshape(len(rows), -1, part.shape[-1])
        return y.reshape(-1, y.shape[-1]), None

    def backward(self, dy: Array, cache: None) -> tuple[Array, Gradients]:
        raise AssertionError("a mixed batch only computes: nothing in it trains")


def _rows_of(sites: Sequence[Site]) -> list[tuple[Site, Array]]:
    """Each different site, and the rows of the batch that are its own."""
    rows: dict[int, list[int]] = {}
    for row, site in enumerate(sites):
        rows.setdefault(id(site), []).append(row)
    return [(sites[indices[0]], to_device(np.asarray(indices))) for indices in rows.values()]
