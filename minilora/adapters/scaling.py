"""An adapter turned up or down: any model on the line from the base (0) through the adapted model (1) and beyond."""

from __future__ import annotations

from minilora.backend import Array
from minilora.methods.lora import LoRALinear
from minilora.model.model import Model
from minilora.model.sites import Gradients, Site


def scaled(model: Model, base: Model, factor: float) -> Model:
    """The model whose adapter changes `factor` times as much at every site: y = y_base + factor (y_adapted − y_base).

    For a site whose weight is W in the base and W' in the model, this is the weight W + factor (W' − W): with LoRA the
    scale s becomes factor · s. It computes only, and shares all numbers with both. ValueError for virtual tokens, which
    stand before every example or do not.
    """
    if factor == 1:
        return model
    if model.virtual_tokens:
        raise ValueError("virtual tokens (prefix and prompt tuning) have no scale")
    return Model(model.config, {name: _scaled(site, base.sites[name], factor) for name, site in model.sites.items()})


def _scaled(site: Site, base: Site, factor: float) -> Site:
    if factor == 0 or site is base:
        return base
    if isinstance(site, LoRALinear) and site.base is base:
        return LoRALinear(site.base, site.A, site.B, factor * site.scale)
    return ScaledSite(site, base, factor)


class ScaledSite:
    """base + factor · (site − base)."""

    trains = False

    def __init__(self, site: Site, base: Site, factor: float) -> None:
        self.site = site
        self.base = base
        self.factor = factor

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, None]:
        y, _ = self.site.forward(x)
        y_base, _ = self.base.forward(x)
        return y_base + self.factor * (y - y_base), None

    def backward(self, dy: Array, cache: None) -> tuple[Array, Gradients]:
        raise AssertionError("a scaled adapter only computes: nothing in it trains")
