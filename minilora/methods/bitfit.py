"""BitFit: train nothing but biases (Ben Zaken et al., 2022, arXiv:2106.10199).

Llama has no biases. So each linear map of the layers gets one that is zero, which changes nothing, and it trains; a
model that has biases trains its own. The gains of the norms may train with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.backend import Array, xp
from minilora.methods.full import trained_copy, trained_site
from minilora.methods.method import Method, Variant
from minilora.methods.setting import setting
from minilora.methods.targets import projections
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import LINEAR, NORM, Shape, layer_module, norms, weight_shapes
from minilora.model.sites import FrozenLinear, Gradients


class BiasLinear:
    """y = x Wᵀ + b with W frozen. Forward added b to every row, so db = Σ dy over the rows. (docs: N3)"""

    trains = True

    def __init__(self, base: FrozenLinear, b: Array) -> None:
        self.weight = base.weight
        self.b = b

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, None]:
        y = self.weight.forward(x)
        y += self.b
        return y, None

    def backward(self, dy: Array, cache: None) -> tuple[Array, Gradients]:
        return self.weight.backward(dy), {"bias": dy.sum(axis=0)}

    def merged(self) -> dict[str, Array]:
        return {"bias": self.b}


@dataclass(frozen=True)
class BitFit(Method):
    """A bias on all seven projections of every layer; with `train_norms`, the gains of all norms too."""

    names = {"bitfit": {}}
    peft_type = "MINILORA_BITFIT"
    rivals = (
        Variant(
            "bitfit", "biases, and the norms' gains", {"method": "bitfit", "train_norms": True}, (3e-2, 1e-1, 3e-1)
        ),
    )

    train_norms: bool = setting(False, "for bitfit: train the gains of the norms too", saved_as="norms")

    def shapes(self, config: Config) -> dict[str, Shape]:
        weights = weight_shapes(config)
        biases: dict[str, Shape] = {f"{name}.bias": weights[f"{name}.weight"][:1] for name in projections(config)}
        return biases | {f"{name}.weight": weights[f"{name}.weight"] for name in self._norms(config)}

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """The biases the model has, zero where it has none; copies of the gains."""
        trainable: dict[str, Array] = {}
        for module in projections(model.config):
            site = _linear(model, module)
            bias = xp.zeros(site.weight.shape[0], dtype) if site.bias is None else site.bias.astype(dtype)
            trainable[f"{module}.bias"] = bias
        for module in self._norms(model.config):
            trainable |= trained_copy(model, module, dtype)
        return trainable

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model now has biases, and its config says so."""
        sites = dict(model.sites)
        for module in projections(model.config):
            sites[module] = BiasLinear(_linear(model, module), trainable[f"{module}.bias"])
        for module in self._norms(model.config):
            sites[module] = trained_site(model, module, trainable)
        return Model(replace(model.config, biased=LINEAR), sites)

    def _norms(self, config: Config) -> list[str]:
        if not self.train_norms:
            return []
        layers = range(config.num_hidden_layers)
        return [layer_module(layer, role) for layer in layers for role in norms(config)] + [NORM]


def _linear(model: Model, module: str) -> FrozenLinear:
    site = model.sites[module]
    if not isinstance(site, FrozenLinear):
        raise ValueError(f"{module} is already adapted: start from the base model")
    return site
