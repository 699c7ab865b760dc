"""A site: a named place in the model where a parameter is used.

    y, cache  = site.forward(x, seed)
    dx, grads = site.backward(dy, cache)

A method enters the model by replacing sites. `Site` says what each of these is, and what must hold of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from minilora.backend import Array
from minilora.frozen.weight import FrozenWeight
from minilora.model.config import Config
from minilora.model.names import EMBED, layer_module, roles
from minilora.ops.rmsnorm import rmsnorm, rmsnorm_dx

Gradients = dict[str, Array]


class Site(Protocol):
    """What stands at a name such as `model.layers.0.mlp.up_proj`: it holds parameters, and never activations.

    A small example, a site that learns a shift of its input, y = x + b with b (D,):

        class Shift:
            trains = True

            def __init__(self, b):
                self.b = b

            def forward(self, x, seed=None):
                return x + self.b, None

            def backward(self, dy, cache):
                return dy, {"bias": dy.sum(axis=0)}

    What must hold:

    - Nothing that a site is given is written to, x and dy included.
    - Calling forward twice with the same x and seed gives the same y, to the last bit: a layer may be run again instead
      of being kept.
    - A site in which nothing trains saves nothing that grows with its weight, and a frozen linear map nothing at all.
    - In complex128 a site computes with complex numbers, so that the complex step can check its gradients.
    """

    trains: bool  # whether a parameter of this site trains, so that backward returns a gradient

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, Any]:
        """y, and a cache that holds exactly what backward needs.

        x is (N, in) and y (N, out), a row for each of the N = B·T tokens; a norm has in = out = D, one of heads a row
        for each head of each token and in = out = d. The embedding's x is the token ids, (N,) integers. y has the dtype
        of the computation.

        seed is an integer while training and None otherwise. A site with randomness of its own (dropout) draws from it
        and from a number of its own, so that no two sites draw the same; without a seed it draws nothing.
        """

    def backward(self, dy: Array, cache: Any) -> tuple[Array, Gradients]:
        """dx and grads, from dy and the cache that forward returned with y.

        dy (N, out) is the gradient of the loss with respect to y; dx (N, in) that with respect to x. The caller may add
        to dx in place.

        grads has one gradient for each parameter of this site that trains and no other, each in the shape of its
        parameter. Its keys are the parameters' names within the module, as they stand in files ("weight", "bias",
        "lora_A.weight"). The caller puts the module's name before them, and adds up gradients of the same name.
        """


class LowRank(NamedTuple):
    """A linear site written as y = x Wᵀ + b + (x Aᵀ) Bᵀ, every scale in B; in a mixed batch with `add` for A and B."""

    weight: FrozenWeight
    bias: Array | None = None  # (out,)
    A: Array | None = None  # (r, in)
    B: Array | None = None  # (out, r)
    add: Callable[[Array, Array], None] | None = None  # (x, y): adds to each row of y what is that row's own


@runtime_checkable
class WithLowRank(Protocol):
    """A site that can be written so. Generation then joins it to others that read the same x (`decoding`)."""

    def low_rank(self) -> LowRank:
        """The site as it is now, without dropout."""


class Prefix(Protocol):
    """Keys and values that a method puts before every example, in every layer (prefix tuning)."""

    length: int

    def forward(self, rows: int) -> list[tuple[Array, Array]]:
        """k and v (rows, length, K, d) for each layer."""

    def backward(self, dkeys_values: list[tuple[Array, Array]]) -> Gradients:
        """The gradients, under their full names, from those of the keys and values, layer by layer."""


class Prompt(Protocol):
    """Embeddings that a method puts before every example (prompt tuning)."""

    length: int

    def forward(self, rows: int) -> Array:
        """x (rows, length, D)."""

    def backward(self, dx: Array) -> Gradients:
        """The gradients, under their full names, from dx (rows, length, D)."""


Sites = Mapping[str, Site]  # module name → site


@dataclass(frozen=True)
class Model:
    """A configuration, and the site that stands at each module name. Methods make a new Model with other sites.

    Two methods put virtual tokens before every example instead: a prefix or a prompt.
    """

    config: Config
    sites: Sites
    prefix: Prefix | None = None
    prompt: Prompt | None = None

    @property
    def virtual_tokens(self) -> int:
        """How many positions come before the first token."""
        return sum(before.length for before in (self.prefix, self.prompt) if before)

    @property
    def lowest_trained_layer(self) -> int:
        """The lowest layer that a gradient has to reach; those below need no backward and save nothing. (docs: M5)"""
        if self.sites[EMBED].trains or self.virtual_tokens:
            return 0
        for layer in range(self.config.num_hidden_layers):
            if any(self.sites[layer_module(layer, role)].trains for role in roles(self.config)):
                return layer
        return self.config.num_hidden_layers


class FrozenLinear:
    """y = x Wᵀ + b, both frozen: nothing is saved."""

    trains = False

    def __init__(self, weight: FrozenWeight, bias: Array | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, None]:
        y = self.weight.forward(x)
        if self.bias is not None:
            y += self.bias
        return y, None

    def backward(self, dy: Array, cache: None) -> tuple[Array, Gradients]:
        return self.weight.backward(dy), {}

    def low_rank(self) -> LowRank:
        return LowRank(self.weight, self.bias)


class FrozenNorm:
    """RMSNorm with a frozen gain."""

    trains = False

    def __init__(self, gain: Array, eps: float) -> None:
        self.gain = gain
        self.eps = eps

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, Any]:
        return rmsnorm(x, self.gain, self.eps)

    def backward(self, dy: Array, cache: Any) -> tuple[Array, Gradients]:
        return rmsnorm_dx(dy, cache), {}


class FrozenEmbedding:
    """x = E[tokens]. Tokens have no gradient."""

    trains = False

    def __init__(self, weight: FrozenWeight) -> None:
        self.weight = weight

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, None]:
        return self.weight.rows(x), None

    def backward(self, dy: Array, cache: None) -> tuple[Array, Gradients]:
        raise AssertionError("the backward stops above a frozen embedding")


class LayerSites(NamedTuple):
    """The sites of one layer, by role."""

    attention_norm: Site
    q: Site
    k: Site
    v: Site
    o: Site
    mlp_norm: Site
    gate: Site
    up: Site
    down: Site
    q_norm: Site | None = None
    k_norm: Site | None = None


def layer_sites(model: Model, layer: int) -> LayerSites:
    """The sites of a layer, found by their names."""
    return LayerSites(**{role: model.sites[layer_module(layer, role)] for role in roles(model.config)})


def part_seed(seed: int | None, part: int) -> int | None:
    """The seed of a part of a batch; the first keeps the batch's. By one seed all parts would drop the same."""
    return seed if seed is None or part == 0 else seed << 32 | part


def add_gradients(total: Gradients, new: Gradients, prefix: str = "") -> None:
    """total[prefix + name] += new[name]. A parameter used in two places (a tied embedding) gets the sum. (docs: M6)

    The first array for a name is taken as it is, and what follows is added to it in place.
    """
    for name, gradient in new.items():
        name = prefix + name
        if name in total:
            total[name] += gradient
        else:
            total[name] = gradient
