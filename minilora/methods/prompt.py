"""Prompt tuning: embeddings that train, before every example (Lester, Al-Rfou & Constant, 2021, arXiv:2104.08691).

    x₀ = [P, E[tokens]]    P (n, D) trains, all weights are frozen

Virtual tokens pass through all layers as words do, at positions 0 … n − 1, and only then are left out. They start as
real words, as the paper advises (section 3.2): the model then computes what the base does after reading those words.
It cannot start as the base itself: with anything before it, a text is another text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.backend import Array, xp
from minilora.methods.method import Variant
from minilora.methods.virtual_tokens import EMBEDDINGS, VirtualTokens, starting_words
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, Shape
from minilora.model.sites import Gradients


class LearnedPrompt:
    """n embeddings P (n, D)."""

    def __init__(self, P: Array) -> None:
        self.P = P
        self.length = len(P)

    def forward(self, rows: int) -> Array:
        """x (rows, n, D), the same for every row. (docs: P4)"""
        return xp.broadcast_to(self.P, (rows, *self.P.shape))

    def backward(self, dx: Array) -> Gradients:
        """dP. Forward gave every row the same embeddings, so the gradients of the rows add up. (docs: P5)"""
        return {EMBEDDINGS: dx.sum(axis=0)}


@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """How many virtual tokens; `text`: the token ids as whose embeddings they start, () for words drawn at random."""

    names = {"prompt": {}}
    peft_type = "PROMPT_TUNING"
    rivals = (Variant("prompt", "20 embeddings before the text", {"method": "prompt"}, (3e-2, 1e-1, 3e-1)),)

    def fields(self, config: Config) -> dict[str, Any]:
        """Where a text was given, PEFT would ask for its tokenizer before it overwrites the start by the tensor."""
        start = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
        return {**super().fields(config), **start}

    def shapes(self, config: Config) -> dict[str, Shape]:
        return {EMBEDDINGS: (self.num_virtual_tokens, config.hidden_size)}

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """P as the embeddings of the words: the model computes as if it had read them. (docs: P6)"""
        words = starting_words(model.config, self.num_virtual_tokens, self.text, rng)
        return {EMBEDDINGS: model.sites[EMBED].forward(words)[0].astype(dtype)}

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model that reads P before every example, sharing the array of `trainable`."""
        return replace(model, prompt=LearnedPrompt(trainable[EMBEDDINGS]))
