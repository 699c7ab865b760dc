"""What every method must satisfy, whichever it is: an honest start, exact gradients, nothing trained but what it names.

And beside that, what distinguishes the small ones: bottleneck adapters, BitFit, modules alone, a random subset.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.method_laws import (
    METHODS,
    adapted,
    has_exact_gradients,
    merges_exactly,
    starts_as_the_base,
    trains_what_it_names_and_nothing_else,
)
from support.strategies import TINY, batches, configs, random_weights, seeds

from minilora.adapters.merging import merged_parameters
from minilora.data.batches import Batch
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck, bottleneck
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.miss import MiSS
from minilora.methods.placement import Placed
from minilora.methods.random_subset import RandomSubset
from minilora.methods.targets import projections
from minilora.model.base import base_model
from minilora.model.config import Config

MERGEABLE = [name for name in METHODS if name != "bottleneck"]
some = settings(max_examples=25)
each = pytest.mark.parametrize("name", METHODS)


@each
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_every_method_starts_as_the_base_to_the_last_bit(name: str, config: Config, batch: Batch, seed: int) -> None:
    """Training starts from the pretrained model itself, whatever trains."""
    starts_as_the_base(METHODS[name], config, batch, seed)


@each
@some
@given(config=configs(), batch=batches(), seed=seeds, checkpointing=st.booleans())
def test_every_gradient_of_every_method_is_exact(
    name: str, config: Config, batch: Batch, seed: int, checkpointing: bool
) -> None:
    has_exact_gradients(METHODS[name], config, batch, seed, checkpointing)


@each
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_every_method_trains_what_it_names_and_touches_nothing_else(
    name: str, config: Config, batch: Batch, seed: int
) -> None:
    """The gradients have the very names of what trains, and the base keeps its bytes."""
    trains_what_it_names_and_nothing_else(METHODS[name], config, batch, seed)


@pytest.mark.parametrize("name", MERGEABLE)
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_the_merged_weights_compute_what_the_method_computes(
    name: str, config: Config, batch: Batch, seed: int
) -> None:
    """Whatever is linear can be folded into W."""
    merges_exactly(METHODS[name], config, batch, seed)


def test_a_bottleneck_is_not_linear_and_so_not_merged() -> None:
    base, model, _ = adapted(TINY, Bottleneck(2), 0)
    with pytest.raises(ValueError, match="o_proj: a BottleneckSite is not linear"):
        list(merged_parameters(base, model))


# --- Each of the small ones ---


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_a_bottleneck_adds_two_maps_with_a_silu_between(seed: int, N: int, width: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    x, D, d = rng.normal(size=(N, width)), rng.normal(size=(size, width)), rng.normal(size=size)
    U, u = rng.normal(size=(width, size)), rng.normal(size=width)
    y, _ = bottleneck(x, D, d, U, u)
    for n in range(N):
        z = D @ x[n] + d
        np.testing.assert_allclose(y[n], x[n] + U @ (z / (1 + np.exp(-z))) + u)


def test_a_bottleneck_stands_after_attention_and_after_the_mlp() -> None:
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    trainable = Bottleneck(3).start(base, np.random.default_rng(0))
    assert {name.rsplit(".", 2)[0] for name in trainable} == {
        f"model.layers.{layer}.{module}" for layer in range(2) for module in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert sum(p.size for p in trainable.values()) == 2 * 2 * (2 * 3 * TINY.hidden_size + 3 + TINY.hidden_size)


@given(configs(), seeds)
def test_bitfit_gives_every_projection_a_bias_and_keeps_those_there_are(config: Config, seed: int) -> None:
    weights = random_weights(config, seed)
    trainable = BitFit().start(base_model(config, weights, np.float64), np.random.default_rng(0), np.float64)
    assert trainable.keys() == {f"{module}.bias" for module in projections(config)}
    for name, b in trainable.items():
        assert np.array_equal(b, weights[name]) if name in weights else not b.any()


@given(st.floats(0.001, 1), seeds)
def test_a_random_subset_is_that_share_of_the_weights_and_the_same_each_time(share: float, seed: int) -> None:
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    method = RandomSubset(share, seed)
    trainable = method.start(base, np.random.default_rng(0), np.float64)
    for values in trainable.values():
        values += 1.0
    for _ in range(2):
        for name, merged in merged_parameters(base, method.attach(base, trainable)):
            W = random_weights(TINY, 0)[name]
            changed = merged != W
            assert changed.sum() == max(1, round(share * W.size))
            np.testing.assert_allclose(merged[changed], W[changed] + 1)


def test_a_random_subset_stays_where_it_is_from_version_to_version() -> None:
    """An adapter written today must mean the same weights tomorrow: these places are part of its format."""
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    method = RandomSubset(0.05, 7)
    trainable = {
        name: values + 1.0 for name, values in method.start(base, np.random.default_rng(0), np.float64).items()
    }
    name, merged = next(iter(merged_parameters(base, method.attach(base, trainable))))
    assert name == "model.layers.0.self_attn.q_proj.weight"
    assert np.flatnonzero(merged != random_weights(TINY, 0)[name]).tolist() == PLACES


PLACES = [2, 18, 40]


@pytest.mark.parametrize("make", [lambda: Bottleneck(0), lambda: RandomSubset(0.0), lambda: RandomSubset(1.5)])
def test_settings_that_make_no_sense_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"^--[a-z-]+ .* is (less than|not above|more than)"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("kind", [LoRA, DoRA, MiSS])
def test_a_number_of_layers_is_counted_from_the_models_end(kind: type[Placed]) -> None:
    """As mlx-lm counts it; 0 is all of them."""
    config = replace(TINY, num_hidden_layers=3, rope_layers=(True,) * 3)
    for count, layers in ((0, {0, 1, 2}), (1, {2}), (2, {1, 2}), (3, {0, 1, 2})):
        method = kind(target_modules=("q_proj",), num_layers=count).for_model(config, lambda text: [])
        modules = method.adapted_modules(config)
        assert modules == [f"model.layers.{layer}.self_attn.q_proj" for layer in sorted(layers)]
    with pytest.raises(ValueError, match="--num-layers 4: the model has 3"):
        kind(num_layers=4).for_model(config, lambda text: [])
