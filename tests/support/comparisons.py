"""The figures of compared methods without a run: every number is another one, so that none can stand for another."""

from __future__ import annotations

from typing import Any


def method_figures(name: str, **others: Any) -> dict[str, Any]:
    """A method's figures for two seeds, in the form of `minilora.compare.figures.result`."""
    return {
        "method": name, "what": f"what {name} is", "folder": f"trials/{name}", "failed": {}, "seeds": [5, 7],
        "best_rate": 0.03, "at_edge": False, "rates": [0.01, 0.03, 0.1], "valid_losses": [0.91, 0.81, None],
        "rank": 4, "trainable_parameters": 3_000, "total_parameters": 1_000_000, "update_bytes": 36_000,
        "peak_memory_bytes": 412_600_000, "file_bytes": 12_340, "seconds_per_step": 0.217,
        "base_loss": 2.5, "base_exact_match": 0.015, "loss": [0.5, 0.75], "exact_match": [0.4, 0.46],
        "drift_kl": [0.125, 0.375], "latency": {"base": 1.25, "adapted": 1.75, "merged": 1.26},
    } | others  # fmt: skip


def failed_figures(name: str) -> dict[str, Any]:
    """A method whose only trial broke off."""
    return {"method": name, "what": "", "folder": "", "failed": {f"{name}-1-5": "the loss is nan"}, "seeds": []}


def few_shot_figures(**others: Any) -> dict[str, Any]:
    """Rows with answers before the prompt: nothing trains."""
    return {
        "method": "few-shot", "what": "nothing", "folder": "", "failed": {}, "seeds": [5, 7], "trainable_parameters": 0,
        "loss": [1.5, 1.75], "exact_match": [0.2, 0.22], "shots": [6, 6], "latency": {"base": 1.25, "adapted": 2.75},
    } | others  # fmt: skip


def spectrum_figures() -> dict[str, Any]:
    """Two maps each of full fine-tuning and LoRA; the lists are those of `minilora.compare.spectrum.spectra`."""

    def of_map(*shares: float, effective: float, most: int = 16) -> dict[str, Any]:
        of_rank = dict(zip(("1", "2", "4", "8", "16", "128"), (*shares, 1.0, 1.0), strict=True))
        return {
            "sigma": [1 / (i + 1) for i in range(most)], "shares": of_rank, "effective_rank": effective, "norm": 3.0
        }  # fmt: skip

    return {
        "full": {
            "a": of_map(0.11, 0.21, 0.31, 0.51, effective=5.5),
            "b": of_map(0.13, 0.25, 0.37, 0.55, effective=6.7),
        },
        "lora": {
            "a": of_map(0.41, 0.61, 0.81, 0.91, effective=2.2),
            "b": of_map(0.45, 0.67, 0.83, 0.95, effective=2.6),
        },
        "noise": of_map(0.02, 0.03, 0.05, 0.09, effective=14.25),
        "cut": [
            {"rank": 0, "loss": 2.5, "exact_match": 0.015},
            {"rank": 1, "loss": 1.5, "exact_match": 0.11},
            {"rank": 2, "loss": 0.625, "exact_match": 0.345},
            {"rank": 4, "loss": 0.575, "exact_match": 0.35},
            {"rank": 8, "loss": 0.55, "exact_match": 0.36},
            {"rank": None, "loss": 0.5, "exact_match": 0.43},
        ],
    }


def comparison_of(*methods: dict[str, Any], ranks: Any = (), cipher: Any = (), spectrum: Any = ()) -> dict[str, Any]:
    """All that a comparison has found."""
    return {"methods": list(methods), "ranks": list(ranks), "cipher": list(cipher), "spectrum": dict(spectrum)}
