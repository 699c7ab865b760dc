"""The models that the trials have trained, and what they have forgotten."""

from __future__ import annotations

import math
from pathlib import Path

from minilora.adapters.merging import merged_parameters
from minilora.backend import to_host
from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import load_adapter
from minilora.formats.checkpoint import read_config, read_weights
from minilora.formats.load import load_model
from minilora.model.base import base_model
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD
from minilora.runs.evaluation import python_source
from minilora.runs.settings import read_settings
from minilora.training.step import mean_loss


def trained_model(source: Path, folder: Path) -> tuple[Model, Model]:
    """The base as the run held it, and the trained model as the run left it: one and the same without an adapter."""
    settings = read_settings(folder)
    if not settings.method.freezes_base:
        model = load_model(folder)[0]
        return model, model
    base, _ = load_model(source, settings.dtype, settings.frozen, settings.mixed_precision)
    return base, load_adapter(base, folder)


def merged_model(source: Path, base: Model, adapted: Model) -> tuple[Model | None, str]:
    """The same in plain weights, or None and the reason."""
    if adapted is base:
        return base, ""
    config, _ = read_config(source)
    weights = dict(read_weights(source, config))
    if not adapted.config.tie_word_embeddings:
        weights.setdefault(f"{HEAD}.weight", weights[f"{EMBED}.weight"])
    try:
        weights |= {name: to_host(value) for name, value in merged_parameters(base, adapted)}
    except ValueError as error:
        return None, str(error)
    return base_model(adapted.config, weights), ""


def python_perplexity(model: Model, tokenizer: Tokenizer) -> float:
    """exp of the mean loss on Python's own source, which every base has seen and no task teaches."""
    return math.exp(mean_loss(model, python_source(tokenizer)))
