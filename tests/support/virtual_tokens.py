"""Models with a prefix or a prompt in the midst of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.complex_step import Arrays
from support.strategies import normal, random_weights

from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.virtual_tokens import EMBEDDINGS
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model

VirtualTokens = PrefixTuning | PromptTuning
BOTH = [PrefixTuning, PromptTuning]
methods = st.builds(lambda method, count: method(count), st.sampled_from(BOTH), st.integers(1, 3))
each_method = pytest.mark.parametrize("method", BOTH, ids=["prefix", "prompt"])


def base(config: Config, seed: int, dtype: Any = np.float64) -> Model:
    return base_model(config, random_weights(config, seed), dtype)


class Tuned:
    """A tiny model with a prefix or a prompt in the midst of training."""

    def __init__(self, config: Config, method: VirtualTokens, seed: int) -> None:
        self.config, self.method, self.seed = config, method, seed
        started = method.start(base(config, seed), np.random.default_rng(seed), np.float64)
        self.trainable = {name: normal(seed, *P.shape, stream=7) for name, P in started.items()}

    def __repr__(self) -> str:
        return f"Tuned({self.config}, {self.method}, seed {self.seed})"

    def model(self, trainable: Arrays | None = None) -> Model:
        trainable = self.trainable if trainable is None else trainable
        return self.method.attach(base(self.config, self.seed, trainable[EMBEDDINGS].dtype), trainable)
