"""The base model: every site frozen. Every method starts from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minilora.backend import narrow, read_only, to_device, widen
from minilora.frozen.hold import hold
from minilora.frozen.mapped import put_in_order
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD, LINEAR, NORM, layer_module, norms
from minilora.model.sites import FrozenEmbedding, FrozenLinear, FrozenNorm, Site


def base_model(
    config: Config,
    weights: Mapping[str, np.ndarray[Any, Any]],
    dtype: Any = np.float32,
    frozen: str = "widened",
    mixed_precision: str = "no",
) -> Model:
    """A model that computes in `dtype`, from the host arrays of a checkpoint by their names.

    `frozen` and `mixed_precision` say how its matrices are held (`frozen/hold.py`). In "nf4" only the linear maps of
    the layers are in 4 bits, as in QLoRA; the embedding and the head are "stored". Arrays that are held as they are
    become read-only.
    """
    outside = "stored" if frozen == "nf4" else frozen

    def norm(module: str) -> FrozenNorm:
        return FrozenNorm(vector(f"{module}.weight"), config.rms_norm_eps)

    def linear(module: str, frozen: str) -> FrozenLinear:
        bias = vector(f"{module}.bias") if f"{module}.bias" in weights else None
        return FrozenLinear(hold(weights[f"{module}.weight"], dtype, frozen, mixed_precision), bias)

    def vector(name: str) -> Any:
        return read_only(widen(to_device(narrow(weights[name])), dtype))

    embed = hold(weights[f"{EMBED}.weight"], dtype, outside, mixed_precision)
    sites: dict[str, Site] = {EMBED: FrozenEmbedding(embed)}
    for layer in range(config.num_hidden_layers):
        for role in LINEAR:
            sites[layer_module(layer, role)] = linear(layer_module(layer, role), frozen)
        for role in norms(config):
            sites[layer_module(layer, role)] = norm(layer_module(layer, role))
    sites[NORM] = norm(NORM)
    sites[HEAD] = FrozenLinear(embed) if config.tie_word_embeddings else linear(HEAD, outside)
    if frozen == "mapped":
        layers: list[Any] = [
            [sites[layer_module(layer, role)] for role in LINEAR] for layer in range(config.num_hidden_layers)
        ]
        put_in_order([[site.weight for site in layer] for layer in [*layers, [sites[HEAD]]]])
    return Model(config, sites)
