"""Training weights chosen at random: the baseline that every cleverer choice should beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, from_host, matmul_transposed, xp
from minilora.frozen.weight import FrozenWeight
from minilora.methods.method import Method, Variant
from minilora.methods.placement import frozen_site
from minilora.methods.setting import setting
from minilora.methods.targets import projections
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import Shape, weight_shapes
from minilora.model.sites import FrozenLinear, Gradients


class Chosen(NamedTuple):
    """The places of the trained weights in W (out, in): entry k is in row o_k and column i_k."""

    o: Array  # (K,)
    i: Array  # (K,)


def with_values(W: FrozenWeight, chosen: Chosen, values: Array) -> Array:
    """W' = W + S, where S is zero but for S[o_k, i_k] = values_k. (docs: N4)"""
    W_changed = W.dense().astype(values.dtype)  # a copy: W is frozen
    W_changed[chosen.o, chosen.i] += values  # no entry is chosen twice
    return W_changed


def values_backward(x: Array, dy: Array, chosen: Chosen) -> Array:
    """dvalues (K,): the chosen entries of dyᵀ x, and no others. x (N, in), dy (N, out). (docs: N5)

    Forward was y = x W'ᵀ, in which values_k multiplies x[:, i_k] and adds to y[:, o_k]. To gather those columns, a
    pair for each entry, takes longer than the whole product does, and more memory.
    """
    dvalues: Array = (dy.T @ x)[chosen.o, chosen.i]
    return dvalues


class RandomSubsetLinear:
    """y = x (W + S)ᵀ + b: a frozen linear site with a few of its weights trained."""

    trains = True

    def __init__(self, base: FrozenLinear, chosen: Chosen, values: Array) -> None:
        self.base = base
        self.chosen = chosen
        self.values = values

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, Array]:
        y = matmul_transposed(x, with_values(self.base.weight, self.chosen, self.values))
        if self.base.bias is not None:
            y += self.base.bias
        return y, x

    def backward(self, dy: Array, cache: Array) -> tuple[Array, Gradients]:
        dx = dy @ with_values(self.base.weight, self.chosen, self.values)
        return dx, {"values": values_backward(cache, dy, self.chosen)}

    def merged(self) -> dict[str, Array]:
        return {"weight": with_values(self.base.weight, self.chosen, self.values)}


@dataclass(frozen=True)
class RandomSubset(Method):
    """A share of the weights of all seven projections, drawn from `seed`: the values added to them train."""

    names = {"random": {}}
    peft_type = "MINILORA_RANDOM_SUBSET"
    multiplies_frozen = False  # it multiplies by W + S
    rivals = (
        Variant(
            "random",
            "weights drawn at random, as many as LoRA's",
            {"method": "random", "random_share": 0.053},
            (3e-3, 1e-2, 3e-2),
        ),
    )

    random_share: float = setting(
        0.04, "for random: the share of weights that trains", above=0, at_most=1, capacity=True, saved_as="share"
    )
    seed: int = setting(0, "the seed of everything random", group="machine", at_least=0)

    def shapes(self, config: Config) -> dict[str, Shape]:
        weights = weight_shapes(config)
        return {f"{name}.values": (self._count(weights[f"{name}.weight"]),) for name in projections(config)}

    def _count(self, shape: Shape) -> int:
        """How many weights of a matrix train."""
        return max(1, round(self.random_share * shape[0] * shape[1]))

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """Zeros: the values are added to the weights that are there."""
        return {f"{module}.values": xp.zeros(len(chosen.o), dtype) for module, chosen in self._chosen(model).items()}

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        sites = dict(model.sites)
        for module, chosen in self._chosen(model).items():
            site = frozen_site(model, module)
            assert isinstance(site, FrozenLinear)
            sites[module] = RandomSubsetLinear(site, chosen, trainable[f"{module}.values"])
        return Model(model.config, sites)

    def _chosen(self, model: Model) -> dict[str, Chosen]:
        """The same places for the same seed, for ever: NumPy promises that of RandomState alone."""
        rng, places = np.random.RandomState(self.seed), {}
        for module in projections(model.config):
            rows, columns = frozen_site(model, module).weight.shape
            count = self._count((rows, columns))
            flat = from_host(partial(_drawn, rng, rows * columns, count), (count,), np.int64)
            places[module] = Chosen(flat // columns, flat % columns)
        return places


def _drawn(rng: np.random.RandomState, size: int, count: int) -> np.ndarray[Any, Any]:
    """So many of the numbers below `size`, in their order."""
    return np.sort(rng.permutation(size)[:count])
