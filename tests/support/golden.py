"""Where the values that others wrote down lie, how they were made, and what it is to agree with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS, LAWS = GOLDEN / "models", GOLDEN / "laws"
CASES = ("llama", "llama_untied_with_biases", "llama3_scaling", "linear_scaling", "smollm3", "qwen2", "qwen3_yarn")
STEPS, RATE, WEIGHT_DECAY = 5, 0.01, 0.1  # of the trajectories of AdamW
ALSO_AS_JSON = (LAWS, MODELS / "llama")  # every file of tensors in these folders has a twin in JSON

Arrays = Mapping[str, np.ndarray]


def tensor_files() -> list[Path]:
    return sorted(GOLDEN.rglob("*.safetensors"))


def has_twin(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in ALSO_AS_JSON)


def assert_agree(ours: Arrays, theirs: Arrays, relative: float) -> None:
    """Within `relative` of each array's largest entry. Gradients that are zero but for rounding count as equal."""
    assert ours.keys() == theirs.keys()
    largest = max(float(np.abs(a).max()) for a in theirs.values())
    for name, a in theirs.items():
        tolerance = relative * max(float(np.abs(a).max()), 1e-3 * largest)
        np.testing.assert_allclose(ours[name], a, rtol=0, atol=tolerance, err_msg=name)
