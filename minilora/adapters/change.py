"""The change ΔW that training has made to each weight: its size, its singular values, and models with less of it.

The change of LoRA is found in its thin factors, without ΔW. For any other method ΔW is formed and decomposed, one
weight at a time; where that would be too much arithmetic, only its size is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np

from minilora.adapters.combination import truncate
from minilora.adapters.merging import Mergeable
from minilora.backend import Array, HostArray, to_device, to_host
from minilora.methods.full import FullLinear
from minilora.methods.lora import LoRA, LoRALinear
from minilora.methods.lora_embedding import LoRAEmbedding, adapter_names
from minilora.methods.method import HostArrays, Method
from minilora.model.model import Model
from minilora.model.names import HEAD
from minilora.model.sites import FrozenEmbedding, FrozenLinear, Site

MOST_WORK = 4e9  # Σ m · n · min(m, n) over the changes that are decomposed: about two seconds on two cores
ROUNDING = 1e-6  # singular values below this share of the largest are rounding errors of float32


class Change(NamedTuple):
    """ΔW = B A. The first k columns of B and rows of A are the nearest matrix of rank k.

    The change of an embedding E (V, D) is ΔEᵀ = B A. Where a change was not decomposed, r is 0.
    """

    A: HostArray  # (r, in)
    B: HostArray  # (out, r)
    singular_values: HostArray  # (r,), falling
    norm: float  # ‖ΔW‖, in the Frobenius norm
    weight_norm: float  # ‖W‖

    @property
    def ratio(self) -> float:
        """‖ΔW‖ / ‖W‖"""
        return self.norm / self.weight_norm if self.weight_norm else math.inf


def changes(base: Model, adapted: Model, method: Method, tensors: HostArrays) -> dict[str, Change]:
    """The change of every weight matrix, by module, in the model's order; none of a method that changes no weight."""
    found = dict(_thin_changes(base, adapted, cast(LoRA, method), tensors)) if method.thin_change else {}
    others = [module for module in adapted.sites if module not in found and _changed_weight(base, adapted, module)]
    decomposed = sum(_work(_weight(base.sites[module]).shape) for module in others) <= MOST_WORK
    for module in others:
        found[module] = _dense_change(base.sites[module], adapted.sites[module], decomposed)
    return {module: found[module] for module in adapted.sites if module in found}


def _thin_changes(base: Model, adapted: Model, method: LoRA, tensors: HostArrays) -> Iterator[tuple[str, Change]]:
    saved_method, saved = method.saved_form(adapted, tensors)  # PiSSA's too, as a change of W itself
    for module, place in cast(LoRA, saved_method).places(adapted.config).items():
        A, B = (saved[name] for name in adapter_names(module))
        factors, truncation = truncate(A, B * np.asarray(place.scale, B.dtype), len(A))
        norm = float(np.sqrt(truncation.whole))
        yield module, Change(*factors[:2], truncation.singular_values, norm, _norm(_weight(base.sites[module])))


def _dense_change(before: Site, after: Site, decomposed: bool) -> Change:
    W = _weight(before)
    dW = to_host(cast(Mergeable, after).merged()["weight"] - W).astype(np.float64)
    if isinstance(before, FrozenEmbedding):
        dW = dW.T
    norm, dtype = float(np.linalg.norm(dW)), to_host(W[:1]).dtype
    U, sigma, Vt = np.linalg.svd(dW, full_matrices=False) if decomposed else _nothing(dW)
    kept = int((sigma > ROUNDING * sigma[:1]).sum())
    half = np.sqrt(sigma[:kept])
    A, B = (half[:, None] * Vt[:kept]).astype(dtype), (U[:, :kept] * half).astype(dtype)
    return Change(A, B, sigma[:kept], norm, _norm(W))


def _nothing(dW: HostArray) -> tuple[HostArray, HostArray, HostArray]:
    return dW[:, :0], np.zeros(0), dW[:0]


def _changed_weight(base: Model, adapted: Model, module: str) -> bool:
    """Whether this site has another weight matrix than before. A tied head is the embedding, which counts once."""
    before, after = base.sites[module], adapted.sites[module]
    if before is after or (module == HEAD and adapted.config.tie_word_embeddings):
        return False
    matrix = isinstance(before, FrozenLinear | FrozenEmbedding) and isinstance(after, Mergeable)
    return matrix and "weight" in cast(Mergeable, after).merged()


def _weight(site: Site) -> Array:
    """W of a frozen site, dense."""
    return cast(FrozenLinear | FrozenEmbedding, site).weight.dense()


def _norm(W: Array) -> float:
    return float(np.linalg.norm(to_host(W).astype(np.float64)))


def _work(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * min(shape)


def changed_model(
    base: Model, adapted: Model, by_module: Mapping[str, Change], rank: int | None = None, scale: float = 1.0
) -> Model:
    """The adapted model with W + c ΔWₖ for each W + ΔW; all that is no weight matrix stays as it was trained.

    ΔWₖ is the matrix of rank k that is nearest to ΔW. With scale 0, or rank 0, every such weight is the base's.
    """
    sites: dict[str, Any] = dict(adapted.sites)
    for module, change in by_module.items():
        A, B = to_device(change.A[:rank]), to_device(change.B[:, :rank])
        site = base.sites[module]
        if isinstance(site, FrozenEmbedding):
            sites[module] = LoRAEmbedding(site, A, B, scale)
            if adapted.config.tie_word_embeddings:
                sites[HEAD] = LoRALinear(cast(FrozenLinear, base.sites[HEAD]), B.T, A.T, scale)
        else:
            sites[module] = LoRALinear(_with_bias_of(adapted.sites[module], cast(FrozenLinear, site)), A, B, scale)
    return replace(adapted, sites=sites)


def _with_bias_of(adapted: Site, base: FrozenLinear) -> FrozenLinear:
    return FrozenLinear(base.weight, adapted.b) if isinstance(adapted, FullLinear) else base


def effective_rank(sigma: HostArray) -> float:
    """exp(−Σ p_i log p_i) with p_i = σ_i / Σ σ (Roy & Vetterli, 2007): k for k equal singular values and no others.

    0 if there are none but zeros.
    """
    p = sigma[sigma > 0] / sigma.sum() if sigma.any() else sigma[:0]
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def share_of_largest(sigma: HostArray, r: int) -> float:
    """Σ_{i ≤ r} σ_i² / Σ σ_i²: how much of ‖ΔW‖² the best matrix of rank r keeps (Eckart & Young, 1936)."""
    return float((sigma[:r] ** 2).sum() / (sigma**2).sum())
