"""The outside world, without installing it: values that transformers, PEFT and PyTorch's AdamW wrote down.

`make_golden.py` wrote the files of `golden/models/`, with peers in float64 throughout, so that ten digits can be
compared. `tests/peers` asks the peers themselves, about many more configurations, where they are installed.
"""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.golden import CASES, MODELS, RATE, STEPS, WEIGHT_DECAY, assert_agree

from minilora.data.batches import Batch
from minilora.formats.files import read_json
from minilora.formats.peft import read_adapter
from minilora.methods.full import full_model
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import HEAD
from minilora.training.optimizers import AdamW
from minilora.training.step import loss_and_gradients

Arrays = dict[str, np.ndarray]
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize(("dtype", "relative"), [(np.float64, 1e-10), (np.float32, 1e-4)])


def batch_of(case: str) -> Batch:
    return Batch(**load_file(MODELS / case / "batch.safetensors"))


def weights_of(case: str, dtype: type) -> tuple[Config, Arrays]:
    weights = load_file(MODELS / case / "weights.safetensors")
    return Config.from_dict(read_json(MODELS / case / "config.json")), as_dtype(weights, dtype)


def as_dtype(arrays: Arrays, dtype: type) -> Arrays:
    return {name: a.astype(dtype) for name, a in arrays.items()}


def fully_trained(case: str, dtype: type = np.float64) -> tuple[Model, Arrays]:
    """The model of a case in which every weight trains, and its weights."""
    config, weights = weights_of(case, dtype)
    return full_model(config, weights), weights


def adapted(case: str, dtype: type = np.float64) -> tuple[Model, Arrays]:
    """The model of a case with the adapter that PEFT wrote, and its A and B."""
    config, weights = weights_of(case, dtype)
    settings, tensors, *_ = read_adapter(MODELS / case / "adapter", config)
    trainable = as_dtype(tensors, dtype)
    return settings.attach(base_model(config, weights, dtype), trainable), trainable


def part(values: Arrays, kind: str) -> Arrays:
    return {name.removeprefix(f"{kind}."): a for name, a in values.items() if name.startswith(f"{kind}.")}


def assert_computes(model: Model, batch: Batch, values: Arrays, relative: float) -> None:
    """Logits where there is no padding, loss, and the gradient of everything that trains."""
    hidden, _, _ = forward(model, batch.tokens, batch.positions, batch.segments)
    logits = model.sites[HEAD].forward(hidden)[0].reshape(*batch.tokens.shape, -1)
    real = batch.segments > 0
    assert_agree({"logits": logits[real]}, {"logits": values["logits"][real]}, relative)
    loss, gradients = loss_and_gradients(model, [batch])
    assert loss == pytest.approx(float(values["loss"]), rel=relative)
    assert_agree(gradients, part(values, "gradient"), relative)


@each_dtype
@each_case
def test_a_model_computes_the_logits_loss_and_gradients_that_transformers_wrote_down(
    case: str, dtype: type, relative: float
) -> None:
    """To ten digits in float64, for every kind of model that is read."""
    model, _ = fully_trained(case, dtype)
    assert_computes(model, batch_of(case), load_file(MODELS / case / "full.safetensors"), relative)


@each_dtype
@each_case
def test_an_adapter_that_peft_wrote_computes_the_logits_loss_dA_and_dB_that_peft_wrote_down(
    case: str, dtype: type, relative: float
) -> None:
    model, _ = adapted(case, dtype)
    assert_computes(model, batch_of(case), load_file(MODELS / case / "lora.safetensors"), relative)


@pytest.mark.parametrize("method", ["full", "lora"])
@each_case
def test_five_steps_of_adamw_end_where_pytorchs_ended(case: str, method: str) -> None:
    """Through the losses of the same steps. Full fine-tuning decays matrices, and neither gains nor biases."""
    model, trainable = fully_trained(case) if method == "full" else adapted(case)
    batch, values = batch_of(case), load_file(MODELS / case / f"{method}.safetensors")
    optimizer, losses = AdamW(trainable, WEIGHT_DECAY), []
    for _ in range(STEPS):
        loss, gradients = loss_and_gradients(model, [batch])
        optimizer.update(trainable, gradients, RATE)
        losses.append(loss)
    np.testing.assert_allclose(losses, values["losses"], rtol=1e-9)
    # Where a gradient is zero but for rounding, Adam divides rounding by ε = 1e-8.
    for name, trained in part(values, "trained").items():
        np.testing.assert_allclose(trainable[name], trained, rtol=1e-8, atol=1e-8, err_msg=name)
