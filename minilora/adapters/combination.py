"""Several LoRA adapters as one: their weighted sum, exactly, or the nearest adapter of a lower rank.

Everything happens in the thin factors. ΔW itself, (out, in), is never formed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minilora.backend import HostArray
from minilora.methods.lora import LoRA
from minilora.methods.lora_embedding import adapter_names
from minilora.methods.targets import every_module, target_module_names
from minilora.model.config import Config


class Factors(NamedTuple):
    """The factors of c B A, the change that an adapter makes at one module."""

    A: HostArray  # (r, in)
    B: HostArray  # (out, r)
    c: float = 1.0


class Truncation(NamedTuple):
    """The cost of a lower rank: the singular values of ΔW, largest first, and the number that was kept."""

    singular_values: HostArray
    kept: int

    @property
    def lost(self) -> float:
        """‖ΔW − ΔWᵣ‖², the sum of the squared singular values that were not kept."""
        return float((self.singular_values[self.kept :] ** 2).sum())

    @property
    def whole(self) -> float:
        """‖ΔW‖²"""
        return float((self.singular_values**2).sum())

    @property
    def error(self) -> float:
        """‖ΔW − ΔWᵣ‖ / ‖ΔW‖"""
        return relative_error([self])


def relative_error(truncations: Sequence[Truncation]) -> float:
    """‖ΔW − ΔWᵣ‖ / ‖ΔW‖ of several modules taken together, in the Frobenius norm. (docs: S3)"""
    whole = sum(t.whole for t in truncations)
    return math.sqrt(sum(t.lost for t in truncations) / whole) if whole else 0.0


def concatenate(parts: Sequence[Factors]) -> Factors:
    """Σᵢ cᵢ Bᵢ Aᵢ = B A with the Aᵢ (rᵢ, in) on top of each other and the cᵢ Bᵢ (out, rᵢ) side by side. (docs: S1)"""
    A = np.concatenate([part.A for part in parts])
    B = np.concatenate([part.B * np.asarray(part.c, part.B.dtype) for part in parts], axis=1)
    return Factors(A, B)


def truncate(A: HostArray, B: HostArray, rank: int) -> tuple[Factors, Truncation]:
    """The matrix of at most this rank that is nearest to ΔW = B A (Eckart & Young, 1936, doi:10.1007/BF02288367).

    B = P R and Aᵀ = Q S with orthonormal columns in P and Q, so ΔW = P (R Sᵀ) Qᵀ has the singular values of the small
    R Sᵀ = U Σ Vᵀ. The result is (P Uᵣ √Σᵣ) (√Σᵣ Vᵣᵀ Qᵀ), each factor with the root of every singular value.
    Computed in float64, returned in the dtype of A and B. (docs: S2)
    """
    P, R = np.linalg.qr(B.astype(np.float64))
    Q, S = np.linalg.qr(A.T.astype(np.float64))
    U, sigma, Vt = np.linalg.svd(R @ S.T, full_matrices=False)
    kept = min(rank, len(sigma))
    half = np.sqrt(sigma[:kept])
    nearest = Factors((half[:, None] * (Vt[:kept] @ Q.T)).astype(A.dtype), (P @ U[:, :kept] * half).astype(B.dtype))
    return nearest, Truncation(sigma, kept)


class Summand(NamedTuple):
    name: str
    method: LoRA
    tensors: Mapping[str, HostArray]


class Combination(NamedTuple):
    """The combined adapter, whose scale is 1; the modules that several adapters change; the cost of truncation."""

    method: LoRA
    tensors: dict[str, HostArray]
    overlapping: list[str]
    truncations: dict[str, Truncation]  # module → its truncation; empty if nothing was truncated


def combine(
    config: Config, adapters: Sequence[Summand], weights: Sequence[float], rank: int | None = None
) -> Combination:
    """ΔW = Σᵢ wᵢ sᵢ Bᵢ Aᵢ at every module that any of the adapters changes, cut to `rank` if that is not None.

    Ranks, scales and modules may differ. The result has the ranks Σᵢ rᵢ, or at most `rank`. ValueError, naming the
    adapter, for DoRA and for modules that train whole: their change is no product of two thin factors.
    """
    for adapter in adapters:
        if not adapter.method.thin_change:
            raise ValueError(
                f"{adapter.name} is a {adapter.method.name} adapter: its change of a weight is no product of two thin "
                "factors, and cannot be combined"
            )
        if adapter.method.modules_to_save:
            saved = ", ".join(adapter.method.modules_to_save)
            raise ValueError(f"{adapter.name} trains modules_to_save ({saved}) whole, and cannot be combined")
    places = [adapter.method.places(config) for adapter in adapters]
    tensors: dict[str, HostArray] = {}
    overlapping: list[str] = []
    truncations: dict[str, Truncation] = {}
    ranks: dict[str, int] = {}
    for module in every_module(config):
        A_name, B_name = adapter_names(module)
        parts = [
            Factors(adapter.tensors[A_name], adapter.tensors[B_name], weight * own_places[module].scale)
            for adapter, weight, own_places in zip(adapters, weights, places, strict=True)
            if module in own_places
        ]
        if not parts:
            continue
        if len(parts) > 1:
            overlapping.append(module)
        whole = concatenate(parts)
        if rank is not None:
            whole, truncations[module] = truncate(whole.A, whole.B, rank)
        tensors |= {A_name: whole.A, B_name: whole.B}
        ranks[module] = len(whole.A)
    return Combination(settings_of_scale_one(config, ranks), tensors, overlapping, truncations)


def settings_of_scale_one(config: Config, ranks: Mapping[str, int]) -> LoRA:
    """The settings of an adapter with these ranks, module by module, and α = r: its scale is 1.

    Modules are named by their last parts ("q_proj") if those match exactly the same modules, else by their full names.
    """
    of_end: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        of_end.setdefault(_end(module), set()).add(rank)
    everywhere = target_module_names(config, tuple(of_end)) == list(ranks)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {
        _end(module) if len(of_end[_end(module)]) == 1 else module: rank
        for module, rank in ranks.items()
        if rank != usual
    }
    return LoRA(
        rank=usual,
        alpha=float(usual),
        target_modules=tuple(of_end) if everywhere else tuple(ranks),
        rank_pattern=pattern,
        alpha_pattern={name: float(rank) for name, rank in pattern.items()},
    )


def _end(module: str) -> str:
    return module.rpartition(".")[2]
