"""Training a few modules whole and freezing the rest: the head alone, the embedding alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.methods.full import trained_copy, trained_site
from minilora.methods.targets import saved_module_names
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD


@dataclass(frozen=True)
class Modules:
    """Copies of the named modules train, as PEFT's `modules_to_save` does beside an adapter; here there is none.

    Embedding and head of a tied model are one matrix no longer once one of them trains.
    """

    modules_to_save: tuple[str, ...] = (HEAD,)

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        modules = saved_module_names(model.config, self.modules_to_save)
        return {name: p for module in modules for name, p in trained_copy(model, module, dtype).items()}

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        config, modules = model.config, saved_module_names(model.config, self.modules_to_save)
        if {EMBED, HEAD} & {*modules}:
            config = replace(config, tie_word_embeddings=False)
        return Model(config, {**model.sites, **{module: trained_site(model, module, trainable) for module in modules}})
