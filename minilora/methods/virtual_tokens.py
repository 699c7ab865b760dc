"""What prefix and prompt tuning share: virtual tokens stand before every example, and start as real words do."""

from __future__ import annotations

import numpy as np

from minilora.backend import Array, to_device
from minilora.model.config import Config

EMBEDDINGS = "prompt_embeddings"  # the one array that trains, under PEFT's name for it


def check_room(config: Config, count: int) -> None:
    """ValueError unless `count` virtual tokens leave the model two positions: it takes two tokens to predict one."""
    most = config.max_position_embeddings - 2
    if not 1 <= count <= most:
        raise ValueError(
            f"num_virtual_tokens {count} must be from 1 to {most}: they come before every example, and the model was "
            f"made for {config.max_position_embeddings} tokens in all"
        )


def starting_words(config: Config, count: int, text: tuple[int, ...], rng: np.random.Generator) -> Array:
    """The `count` tokens (count,) as which virtual tokens start: those of a text, repeated or cut to fit as PEFT does;
    without one, drawn evenly from the vocabulary. ValueError where the model has no room for them."""
    check_room(config, count)
    return to_device(np.resize(text, count) if text else rng.integers(config.vocab_size, size=count))
