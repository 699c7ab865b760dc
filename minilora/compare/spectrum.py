"""The rank of the change that full fine-tuning makes: its singular values, beside those of LoRA's change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minilora.adapters.change import effective_rank, share_of_largest
from minilora.backend import HostArray, to_host
from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import load_adapter
from minilora.formats.checkpoint import read_config, read_weights
from minilora.formats.hub import find_model
from minilora.formats.load import load_model
from minilora.lora import delta
from minilora.methods.lora import LoRALinear
from minilora.methods.targets import projections
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.runs.evaluation import answers, can_be_matched, exact_match
from minilora.runs.run import default_max_length
from minilora.runs.settings import Settings, read_settings
from minilora.runs.task import load_task
from minilora.training.step import mean_loss

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
MOST = max(RANKS)

Changes = dict[str, HostArray]  # module → ΔW of its linear map


class Factors(NamedTuple):
    """ΔW = U diag(σ) Vᵀ, of whose vectors the first MOST are kept."""

    U: HostArray  # (out, MOST)
    sigma: HostArray  # all singular values, falling
    Vt: HostArray  # (MOST, in)


def spectra(full: Path, lora: Path) -> dict[str, Any]:
    """The spectra of two trials on the same data: full fine-tuning's ΔW, LoRA's, and ΔW cut to lower ranks."""
    settings = read_settings(full)
    source = find_model(settings.model, settings.revision).folder
    of_full, of_lora = changes_of_full(source, full), changes_of_lora(source, lora)
    with tqdm(total=len(of_full), desc="singular values", unit="map", dynamic_ncols=True, leave=False) as bar:
        factors = {}
        for module, change in of_full.items():
            factors[module] = factored(change)
            bar.update()
    return {
        "full": {module: spectrum_of(sigma) for module, (_, sigma, _) in factors.items()},
        "lora": {module: spectrum_of(singular_values(change)) for module, change in of_lora.items()},
        "noise": spectrum_of(singular_values(noise_like(of_full))),
        "cut": list(cut(source, settings, of_full, factors)),
    }


def changes_of_full(source: Path, folder: Path) -> Changes:
    """ΔW = W' − W of every linear map in the layers, in float32."""
    config, _ = read_config(source)
    before, after = read_weights(source, config), read_weights(folder, config)
    names = {module: f"{module}.weight" for module in projections(config)}
    return {module: after[name].astype(np.float32) - before[name].astype(np.float32) for module, name in names.items()}


def changes_of_lora(source: Path, folder: Path) -> Changes:
    """ΔW = s B A of every adapted map."""
    adapted = load_adapter(load_model(source)[0], folder)
    return {
        module: to_host(delta(site.A, site.B, site.scale))
        for module, site in adapted.sites.items()
        if isinstance(site, LoRALinear)
    }


def noise_like(changes: Mapping[str, HostArray]) -> HostArray:
    """Standard normal numbers in the shape of the first change: a matrix without any structure."""
    rows, columns = next(iter(changes.values())).shape
    return np.random.default_rng(0).standard_normal((rows, columns))


def singular_values(change: HostArray) -> HostArray:
    return np.asarray(np.linalg.svd(change.astype(np.float64), compute_uv=False))


def factored(change: HostArray) -> Factors:
    """The singular value decomposition, once for all ranks."""
    U, sigma, Vt = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    return Factors(U[:, :MOST].astype(change.dtype), sigma, Vt[:MOST].astype(change.dtype))


def spectrum_of(sigma: HostArray) -> dict[str, Any]:
    """The singular values divided by the largest, the share of ‖ΔW‖² in the largest r, and the effective rank."""
    return {
        "sigma": (sigma / sigma[0]).round(8).tolist(),
        "shares": {str(r): share_of_largest(sigma, r) for r in RANKS if r <= len(sigma)},
        "effective_rank": effective_rank(sigma),
        "norm": float(np.sqrt((sigma**2).sum())),
    }


def truncated(factors: Factors, r: int) -> HostArray:
    """The nearest matrix of at most rank r, r ≤ MOST."""
    U, sigma, Vt = factors
    return np.asarray((U[:, :r] * sigma[:r].astype(U.dtype)) @ Vt[:r])


def cut(source: Path, settings: Settings, changes: Changes, factors: Mapping[str, Factors]) -> Iterator[dict[str, Any]]:
    """The quality of the base plus ΔW cut to each rank. Only the linear maps change.

    Rank 0 is the base, and None is all of ΔW.
    """
    config, _ = read_config(source)
    weights, tokenizer = read_weights(source, config), Tokenizer.load(source)
    most = max(min(change.shape) for change in changes.values())
    ranks = (0, *(r for r in RANKS if r < most), None)
    for r in tqdm(ranks, desc="ΔW cut to ranks", unit="rank", dynamic_ncols=True, leave=False):
        changed = {
            f"{module}.weight": weights[f"{module}.weight"].astype(np.float32)
            + (change if r is None else truncated(factors[module], r))
            for module, change in changes.items()
        }
        yield {"rank": r, **worth(config, {**weights, **changed}, tokenizer, settings)}


def gain_kept(cuts: Sequence[dict[str, Any]], part: dict[str, Any]) -> float:
    """The share of the fall in held-out loss, from the base to all of ΔW, that a part of ΔW achieves."""
    base, whole = cuts[0]["loss"], cuts[-1]["loss"]
    return float((base - part["loss"]) / (base - whole))


def worth(
    config: Config, weights: Mapping[str, HostArray], tokenizer: Tokenizer, settings: Settings
) -> dict[str, float | None]:
    """The loss and the exact match on the held-out rows of the trials."""
    model = base_model(config, weights)
    task = load_task(settings, tokenizer, settings.max_length or default_max_length(model))
    rows: Sequence[Any] = task.held_out_rows[: settings.eval_rows]
    matched = exact_match(answers(model, tokenizer, rows), rows) if can_be_matched(rows) else None
    return {"loss": mean_loss(model, task.held_out), "exact_match": matched}
