"""How A and B start (`--init`), and which weight stays frozen beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from minilora.backend import Array, HostArray
from minilora.frozen.weight import FrozenWeight
from minilora.lora import init_gaussian, init_kaiming, init_orthogonal
from minilora.methods.pissa import PiSSA
from minilora.model.model import Model

if TYPE_CHECKING:
    from minilora.methods.lora import LoRA

RandomInit = Callable[[int, tuple[int, int], np.random.Generator, Any], tuple[Array, Array]]


class Start(Protocol):
    for_linear_maps_only: bool

    def check(self, ranks: Collection[int], dropout: float) -> None:
        """ValueError where such adapters cannot start so."""

    def frozen(self, W: FrozenWeight, rank: int, s: float) -> FrozenWeight:
        """The weight beside which A and B stand."""

    def A_and_B(
        self, W: FrozenWeight, rank: int, s: float, rng: np.random.Generator, dtype: Any
    ) -> tuple[Array, Array]:
        """A (r, in) and B (out, r) before the first step."""

    def saved_form(
        self, method: LoRA, adapted: Model, tensors: Mapping[str, HostArray]
    ) -> tuple[LoRA, dict[str, HostArray]]:
        """The adapter as a change of W itself."""

    def saved_settings(self, method: LoRA) -> LoRA:
        """The settings of `saved_form`."""


class RandomStart:
    """A start that looks at the shape of W only; W itself stays frozen, and the adapter is written as it is."""

    def __init__(self, init: RandomInit, even_rank: bool = False) -> None:
        self.for_linear_maps_only = False
        self.init = init
        self.even_rank = even_rank

    def check(self, ranks: Collection[int], dropout: float) -> None:
        if self.even_rank and any(rank % 2 for rank in ranks):
            raise ValueError(f"init orthogonal halves the rank, so every rank must be even, not {tuple(ranks)}")

    def frozen(self, W: FrozenWeight, rank: int, s: float) -> FrozenWeight:
        return W

    def A_and_B(
        self, W: FrozenWeight, rank: int, s: float, rng: np.random.Generator, dtype: Any
    ) -> tuple[Array, Array]:
        return self.init(rank, W.shape, rng, dtype)

    def saved_form(
        self, method: LoRA, adapted: Model, tensors: Mapping[str, HostArray]
    ) -> tuple[LoRA, dict[str, HostArray]]:
        return method, dict(tensors)

    def saved_settings(self, method: LoRA) -> LoRA:
        return method


STARTS: dict[str, Start] = {
    "kaiming": RandomStart(init_kaiming),
    "gaussian": RandomStart(init_gaussian),
    "orthogonal": RandomStart(init_orthogonal, even_rank=True),
    "pissa": PiSSA(),
}
