"""One file per way of fine-tuning: what trains at the start, and where it enters the model.

A method is a small frozen dataclass of its settings. It never edits the model, it makes a new one through one of three
seams: other sites at named places, keys and values before every example, or embeddings before every example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from minilora.backend import Array
from minilora.model.model import Model


class Method(Protocol):
    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """Everything that trains, by name, as it is before the first step: the model then computes what it did.

        With virtual tokens it cannot, and computes what it did after reading some words.
        """

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model that trains. It shares the arrays of `trainable`: updating those in place changes it."""
