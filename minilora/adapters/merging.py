"""Merging: the adapted model as plain weights, which cost no more to use than the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from minilora.backend import Array
from minilora.model.model import Model
from minilora.model.names import HEAD


@runtime_checkable
class Mergeable(Protocol):
    """A site that a plain weight can replace: LoRA's W + s B A, a trained copy, …"""

    def merged(self) -> dict[str, Array]:
        """The parameters of the plain site that computes the same, by name within the module: "weight", "bias"."""


def merged_parameters(base: Model, adapted: Model) -> Iterator[tuple[str, Array]]:
    """Name and value of every parameter that merging changes, in the dtype of the computation, one at a time.

    ValueError for a method that no plain weight can replace.
    """
    if adapted.virtual_tokens:
        raise ValueError("virtual tokens come before every text and are no part of any weight: they cannot be merged")
    for module, site in adapted.sites.items():
        if site is base.sites[module] or (module == HEAD and adapted.config.tie_word_embeddings):
            continue
        if not isinstance(site, Mergeable):
            raise ValueError(f"{module}: a {type(site).__name__} is not linear, so no weight can take its place")
        for name, value in site.merged().items():
            yield f"{module}.{name}", value
