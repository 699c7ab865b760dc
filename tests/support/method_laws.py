"""What every method must satisfy, whichever it is, as functions of the method: a new one's tests call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support.complex_step import check_gradients
from support.models import logits_of
from support.strategies import QV, random_weights

from minilora.adapters.merging import merged_parameters
from minilora.data.batches import Batch, count_labels
from minilora.formats.adapters import read_method, write_method
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.methods.random_subset import RandomSubset
from minilora.methods.targets import projections
from minilora.methods.whole_modules import WholeModules
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, backward, forward, head_loss
from minilora.model.names import parameter_shapes
from minilora.training.step import loss_and_gradients


def moved(trainable: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """As after some training."""
    rng = np.random.default_rng([seed, 31])
    return {name: p + 0.3 * rng.normal(size=p.shape) for name, p in trainable.items()}


def adapted(config: Config, method: Method, seed: int, dtype: type = np.float64) -> tuple[Model, Model, dict]:
    """The base, the model in the midst of training, and what trains."""
    base = base_model(config, random_weights(config, seed), dtype)
    trainable = moved(method.start(base, np.random.default_rng(seed), dtype), seed)
    return base, method.attach(base, trainable), trainable


def starts_as_the_base(method: Method, config: Config, batch: Batch, seed: int) -> None:
    """To the last bit."""
    base = base_model(config, random_weights(config, seed), np.float64)
    fresh = method.attach(base, method.start(base, np.random.default_rng(seed), np.float64))
    assert np.array_equal(logits_of(fresh, batch), logits_of(base, batch))


def has_exact_gradients(method: Method, config: Config, batch: Batch, seed: int, checkpointing: bool) -> None:
    """By the complex step, of everything that trains, through the whole model."""
    _, model, trainable = adapted(config, method, seed)
    labels, M = batch.labels.reshape(-1), count_labels(batch)
    hidden, _, cache = forward(model, batch.tokens, batch.positions, batch.segments, checkpointing=checkpointing)
    _, dhidden, gradients = head_loss(model, hidden, labels, 1 / M)
    assert dhidden is not None
    for key, gradient in backward(model, dhidden, cache).items():
        gradients[key] = gradients[key] + gradient if key in gradients else gradient
    weights = random_weights(config, seed)

    def loss(arrays: dict[str, np.ndarray]) -> complex:
        there = method.attach(base_model(config, weights, np.complex128), arrays)
        h, _, _ = forward(there, batch.tokens, batch.positions, batch.segments, keep=False)
        return head_loss(there, h, labels, None)[0] / M

    check_gradients(loss, trainable, gradients, seed)


def trains_what_it_names_and_nothing_else(method: Method, config: Config, batch: Batch, seed: int) -> None:
    """A gradient in its shape for each parameter that is named, and base weights that keep their bytes."""
    weights = random_weights(config, seed)
    before = {key: array.copy() for key, array in weights.items()}
    base = base_model(config, weights, np.float64)
    trainable = method.start(base, np.random.default_rng(seed), np.float64)
    _, gradients = loss_and_gradients(method.attach(base, trainable), [batch])
    assert gradients.keys() == trainable.keys()
    assert {key: p.shape for key, p in trainable.items()} == method.shapes(config)
    assert all(gradients[key].shape == p.shape for key, p in trainable.items())
    for p in trainable.values():
        p += 1.0
    assert all(np.array_equal(weights[key], array) for key, array in before.items())


def merges_exactly(method: Method, config: Config, batch: Batch, seed: int) -> None:
    """The merged weights, in a plain model, compute what the method computes."""
    base, model, _ = adapted(config, method, seed)
    weights = random_weights(config, seed)
    if config.tie_word_embeddings and not model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for module in projections(config):
        if f"{module}.bias" in parameter_shapes(model.config):
            weights.setdefault(f"{module}.bias", np.zeros(weights[f"{module}.weight"].shape[0]))
    weights |= dict(merged_parameters(base, model))
    assert weights.keys() == parameter_shapes(model.config).keys()
    plain = base_model(model.config, weights, np.float64)
    np.testing.assert_allclose(logits_of(plain, batch), logits_of(model, batch), rtol=1e-9, atol=1e-9)


def is_read_back_exactly(folder: Path, method: Method, config: Config) -> Method:
    """Its tensors to the last bit; the settings are returned."""
    base, _, trainable = adapted(config, method, 5, np.float32)
    tensors: dict[str, Any] = {key: p.astype(np.float32) for key, p in trainable.items()}
    write_method(folder, method, tensors, config, "some/base")
    read, arrays = read_method(folder, base)
    assert arrays.keys() == tensors.keys() and all(np.array_equal(arrays[key], tensors[key]) for key in tensors)
    return read


EMBEDDED = LoRA(2, target_modules=("q_proj", "embed_tokens", "lm_head"), modules_to_save=("norm",))
METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": LoRA(2, target_modules=QV),
    "lora on embedding and head": EMBEDDED,
    "bottleneck": Bottleneck(3),
    "bitfit": BitFit(),
    "bitfit with norms": BitFit(train_norms=True),
    "head": WholeModules(("lm_head",)),
    "embedding": WholeModules(("embed_tokens",)),
    "random subset": RandomSubset(0.1),
}
WRITTEN = [name for name in METHODS if name != "full"]
