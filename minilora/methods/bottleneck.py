"""Bottleneck adapters: a small network after attention and after the MLP (Houlsby et al., 2019, arXiv:1902.00751)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, to_device, xp
from minilora.methods.method import Method, Variant
from minilora.methods.placement import frozen_site
from minilora.methods.setting import setting
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import Shape, layer_module
from minilora.model.sites import Gradients, Site
from minilora.ops.linear import linear, linear_backward
from minilora.ops.swiglu import sigmoid

NAMES = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")


class BottleneckCache(NamedTuple):
    x: Array  # (N, D)
    z: Array  # (N, m)
    a: Array  # (N, m)


def bottleneck(x: Array, D: Array, d: Array, U: Array, u: Array) -> tuple[Array, BottleneckCache]:
    """y = x + a Uᵀ + u with a = silu(z), z = x Dᵀ + d: (N, D) → (N, D), through m numbers. (docs: N1)

    D (m, D) and U (D, m) are the projections down and up, d and u their biases. Where U = 0 and u = 0, y = x.
    """
    z, _ = linear(x, D, d)
    a = z * sigmoid(z)
    y, _ = linear(a, U, u)
    y += x
    return y, BottleneckCache(x, z, a)


def bottleneck_backward(
    dy: Array, D: Array, d: Array, U: Array, u: Array, cache: BottleneckCache
) -> tuple[Array, Array, Array, Array, Array]:
    """dx, dD, dd, dU, du. (docs: N2)

    Forward was y = x + a Uᵀ + u, a = z σ(z), z = x Dᵀ + d. With silu' = σ (1 + z (1 − σ)):
        da = dy U,    dz = da ⊙ silu'(z),    dx = dy + dz D.
    """
    x, z, a = cache
    da, dU, du = linear_backward(dy, linear(a, U, u)[1])
    s = sigmoid(z)
    dz = da * s * (1 + z * (1 - s))
    dx, dD, dd = linear_backward(dz, linear(x, D, d)[1])
    dx += dy
    return dx, dD, dd, dU, du


class BottleneckSite:
    """A frozen linear site, and a bottleneck on what comes out of it."""

    trains = True

    def __init__(self, base: Site, parameters: tuple[Array, Array, Array, Array]) -> None:
        self.base = base
        self.parameters = parameters

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, tuple[Any, BottleneckCache]]:
        y, c_base = self.base.forward(x, seed)
        y, cache = bottleneck(y, *self.parameters)
        return y, (c_base, cache)

    def backward(self, dy: Array, cache: tuple[Any, BottleneckCache]) -> tuple[Array, Gradients]:
        c_base, c_bottleneck = cache
        dy, *grads = bottleneck_backward(dy, *self.parameters, c_bottleneck)
        dx, _ = self.base.backward(dy, c_base)
        return dx, dict(zip(NAMES, grads, strict=True))


@dataclass(frozen=True)
class Bottleneck(Method):
    """A bottleneck of some numbers after attention's and after the MLP's last projection, before they are added."""

    names = {"bottleneck": {}}
    peft_type = "MINILORA_BOTTLENECK"
    rivals = (
        Variant(
            "bottleneck",
            "a small network behind attention and MLP",
            {"method": "bottleneck", "bottleneck_size": 32},
            (3e-3, 1e-2, 3e-2),
        ),
    )

    bottleneck_size: int = setting(16, "for bottleneck: the inner width", at_least=1, capacity=True, saved_as="size")

    def shapes(self, config: Config) -> dict[str, Shape]:
        D, m = config.hidden_size, self.bottleneck_size
        shapes = dict(zip(NAMES, ((m, D), (m,), (D, m), (D,)), strict=True))
        return {f"{module}.{name}": shape for module in _places(config) for name, shape in shapes.items()}

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """D normal with standard deviation 0.01 (the paper: near the identity); all else zero, so exactly so."""
        trainable: dict[str, Array] = {}
        for module in _places(model.config):
            width = frozen_site(model, module).weight.shape[0]
            D = to_device((0.01 * rng.standard_normal((self.bottleneck_size, width))).astype(dtype))
            zeros = (xp.zeros(shape, dtype) for shape in (D.shape[:1], D.shape[::-1], D.shape[1:]))
            trainable |= {f"{module}.{name}": p for name, p in zip(NAMES, (D, *zeros), strict=True)}
        return trainable

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        sites = dict(model.sites)
        for module in _places(model.config):
            D, d, U, u = (trainable[f"{module}.{name}"] for name in NAMES)
            sites[module] = BottleneckSite(frozen_site(model, module), (D, d, U, u))
        return Model(model.config, sites)


def _places(config: Config) -> list[str]:
    return [layer_module(layer, role) for layer in range(config.num_hidden_layers) for role in ("o", "down")]
