"""Where the values that others wrote down lie, and how they were made."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("llama", "llama_untied_with_biases", "llama3_scaling", "linear_scaling", "smollm3", "qwen2", "qwen3_yarn")
STEPS, RATE, WEIGHT_DECAY = 5, 0.01, 0.1  # of the trajectories of AdamW
