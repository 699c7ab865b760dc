"""What stands in the model's places while its step is counted: sites and weights that say what is going on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

from minilora.counting.outline import Outline
from minilora.counting.tally import Tally
from minilora.frozen.weight import FrozenWeight
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD, NORM, parameter_shapes
from minilora.model.sites import FrozenEmbedding, FrozenLinear, Site

LOSS, UPDATE, EMBEDDING = "the loss", "the update", "the embedding's gradient"
FROZEN_FORWARD, FORWARD, BACKWARD = "a frozen layer's forward", "a layer's forward", "a layer's backward"
MOMENTS = (FROZEN_FORWARD, FORWARD, LOSS, BACKWARD, EMBEDDING, UPDATE)


class HeadEntry(NamedTuple):
    """When the head gets its first rows."""

    live: int  # bytes, with those rows
    rows: int  # bytes of those rows


class WatchedSite:
    """A site of the model that tells the tally the moment of the step and what its products are for.

    Of a linear map's products, x Wᵀ and dy W are the model's own: "weights" in the layers, "head". All others of a site
    are there because something trains. Between the sites there is attention alone.
    """

    def __init__(self, name: str, site: Any, tally: Tally, shape: tuple[int, ...], frozen_layer: bool) -> None:
        self.site, self.tally, self.name = site, tally, name
        self.trains = site.trains
        self.per_row = 2 * math.prod(shape) if len(shape) == 2 and name != EMBED else 0
        self.own = "head" if name == HEAD else "weights"
        self.moment = FROZEN_FORWARD if frozen_layer else FORWARD
        self.entered: HeadEntry | None = None

    def forward(self, x: Outline, seed: int | None = None) -> tuple[Outline, Any]:
        tally = self.tally
        if self.name == EMBED:
            tally.way = "forward"
        if self.name == HEAD:
            tally.enter(LOSS)
            self.entered = self.entered or HeadEntry(tally.live, x.nbytes)
        elif tally.way == "forward" and self.name != NORM:
            tally.enter(self.moment)
        tally.purpose = "trained"
        y, kept = self.site.forward(x, seed)
        self._leave(tally.way, len(x))
        return y, kept

    def backward(self, dy: Outline, cache: Any) -> tuple[Outline, dict[str, Outline]]:
        tally = self.tally
        if self.name != HEAD:
            tally.enter(EMBEDDING if self.name == EMBED else BACKWARD)
            tally.way = "backward"
        way, tally.way = tally.way, "backward"
        tally.purpose = "trained"
        dx, gradients = self.site.backward(dy, cache)
        self._leave("backward", len(dy))
        tally.way = way
        return dx, gradients

    def _leave(self, way: str, rows: int) -> None:
        flops = self.tally.flops
        flops[way, self.own] += rows * self.per_row
        flops[way, "trained"] -= rows * self.per_row
        self.tally.purpose = "attention"


class Cost(NamedTuple):
    """Of one use of a frozen weight."""

    above: int  # bytes, over those that live before
    calls: int
    flops: int
    dtype: Any  # of the result


class WatchedWeight:
    """A frozen weight that is used once for each of its shapes, and from then on repeats what that took.

    A product in slices is thousands of calls for a large model, and all layers make the same ones.
    """

    def __init__(self, weight: FrozenWeight, tally: Tally, role: str, known: dict[Any, Cost]) -> None:
        self.weight, self.tally, self.role, self.known = weight, tally, role, known
        self.shape = weight.shape

    def forward(self, x: Outline) -> Outline:
        return self._use("forward", x, self.shape[0])

    def backward(self, dy: Outline) -> Outline:
        return self._use("backward", dy, self.shape[1])

    def rows(self, index: Outline) -> Any:
        return self.weight.rows(index)  # type: ignore[arg-type]

    def dense(self) -> Any:
        return self.weight.dense()

    def _use(self, way: str, x: Outline, width: int) -> Outline:
        tally, key = self.tally, (self.role, way, x.shape, x.dtype)
        if key not in self.known:
            live, calls, flops, moment = tally.live, tally.calls, tally.flops, tally.moment
            tally.flops = Counter()
            tally.enter("a use of a weight")
            result = getattr(self.weight, way)(x)
            above = tally.most.pop(tally.moment) - live
            self.known[key] = Cost(above, tally.calls - calls, tally.flops.total(), result.dtype)
            tally.flops, tally.calls, tally.moment = flops, calls, moment
            del result
        cost = self.known[key]
        tally.allocate(cost.above)
        tally.live -= cost.above
        tally.calls += cost.calls
        tally.flops[tally.way, tally.purpose] += cost.flops
        return Outline(tally, (len(x), width), cost.dtype)


def watched_base(model: Model, tally: Tally) -> Model:
    """The base model with all its frozen weights watched."""
    known: dict[Any, Cost] = {}

    def site(name: str, site: Site) -> Site:
        if isinstance(site, FrozenLinear | FrozenEmbedding):
            weight: Any = WatchedWeight(site.weight, tally, name.rpartition(".")[2], known)
            return FrozenEmbedding(weight) if isinstance(site, FrozenEmbedding) else FrozenLinear(weight, site.bias)
        return site

    return replace(model, sites={name: site(name, old) for name, old in model.sites.items()})


def watched_model(model: Model, tally: Tally) -> Model:
    """The model with all its sites watched."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in parameter_shapes(model.config).items()}
    shapes.setdefault(HEAD, shapes[EMBED])
    below = tuple(f"model.layers.{layer}." for layer in range(model.lowest_trained_layer))

    def site(name: str, site: Site) -> Any:
        frozen_layer = bool(below) and (name == EMBED or name.startswith(below))
        return WatchedSite(name, site, tally, shapes[name], frozen_layer)

    return replace(model, sites={name: site(name, old) for name, old in model.sites.items()})
