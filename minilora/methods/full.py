"""Full fine-tuning (and pretraining): every parameter trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.methods.method import Method, Variant
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD, LINEAR, NORM, Shape, layer_module, norms, parameter_shapes
from minilora.model.sites import FrozenEmbedding, FrozenLinear, FrozenNorm, Gradients, Site
from minilora.ops.embedding import EmbeddingCache, embedding, embedding_backward
from minilora.ops.linear import LinearCache, linear, linear_backward
from minilora.ops.rmsnorm import RMSNormCache, rmsnorm, rmsnorm_backward


class FullLinear:
    """y = x Wᵀ + b, with gradients for W and b."""

    trains = True

    def __init__(self, W: Array, b: Array | None = None) -> None:
        self.W = W
        self.b = b

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, LinearCache]:
        return linear(x, self.W, self.b)

    def backward(self, dy: Array, cache: LinearCache) -> tuple[Array, Gradients]:
        dx, dW, db = linear_backward(dy, cache)
        return dx, {"weight": dW} if self.b is None else {"weight": dW, "bias": db}

    def merged(self) -> dict[str, Array]:
        return {"weight": self.W} if self.b is None else {"weight": self.W, "bias": self.b}


class FullNorm:
    """RMSNorm, with a gradient for its gain."""

    trains = True

    def __init__(self, gain: Array, eps: float) -> None:
        self.gain = gain
        self.eps = eps

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, RMSNormCache]:
        return rmsnorm(x, self.gain, self.eps)

    def backward(self, dy: Array, cache: RMSNormCache) -> tuple[Array, Gradients]:
        dx, dgain = rmsnorm_backward(dy, cache)
        return dx, {"weight": dgain}

    def merged(self) -> dict[str, Array]:
        return {"weight": self.gain}


class FullEmbedding:
    """x = E[tokens], with a gradient for E. Tied to the head, E gets the sum of both gradients."""

    trains = True

    def __init__(self, E: Array) -> None:
        self.E = E

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, EmbeddingCache]:
        return embedding(x, self.E)

    def backward(self, dy: Array, cache: EmbeddingCache) -> tuple[Array, Gradients]:
        return dy, {"weight": embedding_backward(dy, cache)}

    def merged(self) -> dict[str, Array]:
        return {"weight": self.E}


def trained_copy(model: Model, module: str, dtype: Any) -> dict[str, Array]:
    """Copies of the parameters of a frozen site, under their full names: what is to train instead of them."""
    site = model.sites[module]
    if isinstance(site, FrozenNorm):
        return {f"{module}.weight": site.gain.astype(dtype)}
    if not isinstance(site, FrozenLinear | FrozenEmbedding):
        raise ValueError(f"{module} is already adapted: start from the base model")
    parameters = {f"{module}.weight": site.weight.dense().astype(dtype)}
    if isinstance(site, FrozenLinear) and site.bias is not None:
        parameters[f"{module}.bias"] = site.bias.astype(dtype)
    return parameters


def trained_site(model: Model, module: str, trainable: Mapping[str, Array]) -> Site:
    """The site that trains in the place of a frozen one, sharing the arrays of `trainable`."""
    site, weight = model.sites[module], trainable[f"{module}.weight"]
    if isinstance(site, FrozenNorm):
        return FullNorm(weight, site.eps)
    if isinstance(site, FrozenEmbedding):
        return FullEmbedding(weight)
    bias = f"{module}.bias"
    return FullLinear(weight, trainable[bias] if bias in trainable else None)


@dataclass(frozen=True)
class Full(Method):
    """Every parameter trains: the baseline of all other methods, and how a model is pretrained."""

    names = {"full": {}}
    freezes_base = False
    multiplies_frozen = False
    rivals = (Variant("full", "every parameter", {"method": "full"}, (3e-4, 1e-3, 3e-3)),)

    def shapes(self, config: Config) -> dict[str, Shape]:
        return parameter_shapes(config)

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """Copies of all parameters, one for every tensor of the checkpoint."""
        modules = [module for module in model.sites if not (module == HEAD and model.config.tie_word_embeddings)]
        return {name: p for module in modules for name, p in trained_copy(model, module, dtype).items()}

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model whose sites share the arrays of `trainable`. Nothing of the given model but its config is used."""
        return full_model(model.config, trainable)


def full_model(config: Config, trainable: Mapping[str, Array]) -> Model:
    """The model whose sites share the arrays of `trainable`, one for every tensor of the checkpoint."""

    def linear_site(module: str) -> Site:
        bias = f"{module}.bias"
        return FullLinear(trainable[f"{module}.weight"], trainable[bias] if bias in trainable else None)

    def norm_site(module: str) -> Site:
        return FullNorm(trainable[f"{module}.weight"], config.rms_norm_eps)

    E = trainable[f"{EMBED}.weight"]
    sites: dict[str, Site] = {EMBED: FullEmbedding(E), NORM: norm_site(NORM)}
    for layer in range(config.num_hidden_layers):
        for role in LINEAR:
            sites[layer_module(layer, role)] = linear_site(layer_module(layer, role))
        for role in norms(config):
            sites[layer_module(layer, role)] = norm_site(layer_module(layer, role))
    sites[HEAD] = FullLinear(E) if config.tie_word_embeddings else linear_site(HEAD)
    return Model(config, sites)
