"""The whole model: its gradients are exact, and neither layout nor economy changes what it computes."""

from __future__ import annotations

import inspect
import itertools
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.complex_step import Arrays, check_backward, check_gradients
from support.models import Trained, assert_same, loss_and_gradients_in_chunks, loss_only
from support.strategies import (
    TINY,
    VOCAB,
    adapters,
    batches,
    configs,
    examples,
    normal,
    random_weights,
    rows,
    seeds,
)

from minilora.data.batches import Batch, collate, count_labels, pad
from minilora.data.examples import Example
from minilora.methods.full import FullEmbedding
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, Past, backward, forward, head_loss
from minilora.model.names import EMBED, HEAD, NORM, layer_module
from minilora.model.sites import FrozenLinear, Site
from minilora.training import step
from minilora.training.step import loss_and_gradients, mean_loss

plain_adapters = adapters.map(lambda s: LoRA(s.rank, s.alpha, target_modules=s.target_modules))
fully_trained = st.builds(Trained, configs(), st.none(), seeds)
lora_trained = st.builds(Trained, configs(), adapters, seeds)
trained = fully_trained | st.builds(Trained, configs(), plain_adapters, seeds)  # without dropout


# --- Exact gradients ---


@given(lora_trained, batches(), seeds, st.sampled_from([1, 2, 1024]), st.booleans())
def test_every_gradient_of_lora_is_exact_with_dropout_packing_and_chunks(
    case: Trained, batch: Batch, seed: int, chunk: int, checkpointing: bool
) -> None:
    """dA and dB of all sites at once, through the whole model, against the complex step."""
    _, gradients = loss_and_gradients_in_chunks(case.model(), batch, seed, chunk, checkpointing)
    check_gradients(lambda moved: loss_only(case.model(moved), batch, seed), case.trainable, gradients)


@given(fully_trained, batches(), st.sampled_from([1, 2, 1024]), st.booleans())
def test_every_gradient_of_full_fine_tuning_is_exact_tied_or_not_with_or_without_biases_and_rope(
    case: Trained, batch: Batch, chunk: int, checkpointing: bool
) -> None:
    _, gradients = loss_and_gradients_in_chunks(case.model(), batch, None, chunk, checkpointing)
    check_gradients(lambda moved: loss_only(case.model(moved), batch, None), case.trainable, gradients)


@given(lora_trained, rows(), seeds)
def test_the_training_step_returns_the_mean_loss_over_labels_and_its_exact_gradient(
    case: Trained, drawn: list[list[Example]], seed: int
) -> None:
    """Over micro-batches of one row each, every one with its own dropout."""
    micro = [collate([row], 0) for row in drawn]
    dropout_seeds = [seed + i for i in range(len(micro))]
    loss, gradients = loss_and_gradients(case.model(), micro, dropout_seeds)
    labelled = sum(count_labels(batch) for batch in micro)

    def mean(moved: Arrays) -> Any:
        model = case.model(moved)
        sums = [
            loss_only(model, batch, s) * count_labels(batch)
            for batch, s in zip(micro, dropout_seeds, strict=True)
            if count_labels(batch)
        ]
        return sum(sums) / labelled

    assert loss == pytest.approx(float(mean(case.trainable)), rel=1e-12)
    check_gradients(mean, case.trainable, gradients)


@given(trained | lora_trained, batches(), seeds)
def test_there_is_a_gradient_for_each_array_that_trains_and_for_no_other(
    case: Trained, batch: Batch, seed: int
) -> None:
    """The backward does no work for what is frozen."""
    _, gradients = loss_and_gradients(case.model(), [batch], [seed])
    assert gradients.keys() == case.trainable.keys()
    assert all(gradients[name].dtype == array.dtype for name, array in case.trainable.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@given(case=trained, batch=batches())
def test_the_dtype_of_the_weights_is_that_of_everything_computed(dtype: Any, case: Trained, batch: Batch) -> None:
    model = case.model({name: array.astype(dtype) for name, array in case.trainable.items()})
    hidden, past, cache = forward(model, batch.tokens, batch.positions, batch.segments)
    loss, dhidden, gradients = head_loss(model, hidden, batch.labels.reshape(-1), 1.0)
    assert dhidden is not None
    gradients |= backward(model, dhidden, cache)
    computed = [hidden, *(array for kv in past.layers for array in kv), loss, dhidden, *gradients.values()]
    assert {array.dtype for array in computed} == {np.dtype(dtype)}


@given(trained, st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=5), st.data(), st.booleans(), seeds)
def test_every_gradient_is_exact_where_keys_and_values_of_a_past_come_first(
    case: Trained, tokens: list[int], data: st.DataObject, checkpointing: bool, seed: int
) -> None:
    """The past is a constant. Run again, a layer sees the same past."""
    here = data.draw(st.integers(1, len(tokens) - 1), label="tokens of the past")
    row, positions = np.array([tokens]), np.arange(len(tokens))[None]
    inputs = [(a[:, :here], a[:, here:]) for a in (row, positions, np.ones_like(row))]
    past = forward(case.model(), *(a for a, _ in inputs))[1]
    rest = [b for _, b in inputs]
    hidden, _, cache = forward(case.model(), *rest, past, checkpointing=checkpointing)
    dhidden = np.random.default_rng(seed).normal(size=hidden.shape)
    gradients = backward(case.model(), dhidden, cache)
    below_the_head = {name: case.trainable[name] for name in gradients}
    check_gradients(
        lambda moved: (forward(case.model({**case.trainable, **moved}), *rest, past)[0] * dhidden).sum(),
        below_the_head,
        gradients,
        seed,
    )


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_the_example_of_a_site_is_one_with_exact_gradients(seed: int, n: int, width: int) -> None:
    lines = inspect.cleandoc(Site.__doc__ or "").split("\n")
    start = lines.index("    class Shift:")
    code = itertools.takewhile(lambda line: not line or line.startswith(" "), lines[start:])
    defined: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(code)), defined)
    inputs = {"x": normal(seed, n, width), "b": normal(seed, width, stream=1)}

    def backward_of(dy: np.ndarray, cache: None) -> tuple[np.ndarray, np.ndarray]:
        dx, grads = defined["Shift"](inputs["b"]).backward(dy, cache)
        assert grads.keys() == {"bias"}
        return dx, grads["bias"]

    check_backward(lambda x, b: defined["Shift"](b).forward(x, 0), backward_of, inputs, seed)


# --- Economies that change nothing ---


@given(trained | lora_trained, batches(), seeds)
def test_activation_checkpointing_gives_the_same_bytes(case: Trained, batch: Batch, seed: int) -> None:
    """A layer run again computes exactly what it computed before, dropout included."""
    loss, gradients = loss_and_gradients(case.model(), [batch], [seed])
    loss2, gradients2 = loss_and_gradients(case.model(), [batch], [seed], checkpointing=True)
    assert loss == loss2
    assert {name: g.tobytes() for name, g in gradients.items()} == {name: g.tobytes() for name, g in gradients2.items()}


def test_activation_checkpointing_keeps_the_input_of_each_layer_and_nothing_else() -> None:
    model, tokens = Trained(TINY, None, 0).model(), np.arange(6).reshape(2, 3)
    inputs = tokens, tokens, np.ones_like(tokens)
    cache = forward(model, *inputs)[2]
    assert (list(cache.layers.blocks), cache.layers.inputs) == ([0, 1], {})
    cache = forward(model, *inputs, checkpointing=True)[2]
    assert cache.layers.blocks == {}
    assert [x.shape for x in cache.layers.inputs.values()] == [(6, TINY.hidden_size)] * 2
    cache = forward(model, *inputs, keep=False)[2]
    assert cache.layers.blocks == cache.layers.inputs == {}


@given(trained, batches(), st.integers(1, 5))
def test_the_loss_in_chunks_is_the_loss_at_once(case: Trained, batch: Batch, chunk: int) -> None:
    """The logits of all tokens are never in memory together."""
    assert_same(
        loss_and_gradients_in_chunks(case.model(), batch, None, chunk),
        loss_and_gradients_in_chunks(case.model(), batch, None, 10**6),
    )


@given(trained, batches(), st.integers(1, 3))
def test_only_labelled_rows_reach_the_head_a_chunk_at_a_time(case: Trained, batch: Batch, chunk: int) -> None:
    seen = []

    class CountingHead(FrozenLinear):
        def forward(self, x: np.ndarray, seed: int | None = None) -> tuple[np.ndarray, None]:
            seen.append(len(x))
            return super().forward(x, seed)

    base = base_model(case.config, case.weights, np.float64)
    head = base.sites[HEAD]
    assert isinstance(head, FrozenLinear)
    model = Model(case.config, {**base.sites, HEAD: CountingHead(head.weight, head.bias)})
    loss_only(model, batch, None, chunk)
    assert sum(seen) == count_labels(batch)
    assert max(seen) <= chunk


@given(lora_trained, st.lists(batches(), min_size=1, max_size=3))
def test_the_loss_of_an_evaluation_is_that_of_training_without_dropout(case: Trained, drawn: list[Batch]) -> None:
    assert mean_loss(case.model(), drawn) == pytest.approx(loss_and_gradients(case.model(), drawn)[0], rel=1e-12)


@given(trained, batches())
def test_no_gradient_is_computed_unless_it_is_asked_for(case: Trained, batch: Batch) -> None:
    hidden, _, _ = forward(case.model(), batch.tokens, batch.positions, batch.segments)
    assert head_loss(case.model(), hidden, batch.labels.reshape(-1), None)[1:] == (None, {})


def test_an_evaluation_saves_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        caches.append(forward(*args, **kwargs)[2])
        return forward(*args, **kwargs)

    monkeypatch.setattr(step, "forward", noted)
    mean_loss(Trained(TINY, None, 0).model(), [pad([Example([1, 2, 3], [True] * 3)], 0)])
    assert [(cache.layers.blocks, cache.layers.inputs) for cache in caches] == [({}, {})]


def test_one_label_is_enough_for_a_loss_and_a_batch_without_labels_is_refused() -> None:
    model = Trained(TINY, None, 0).model()
    one, none = (pad([Example([1, 2], [False, trained])], 0) for trained in (True, False))
    assert mean_loss(model, [one, none]) == mean_loss(model, [one]) > 0
    with pytest.raises(ValueError, match=r"^no token of these batches has a label: there is no loss to speak of$"):
        mean_loss(model, [none])


# --- Dropout's seed ---


class Listening:
    """A site that notes each seed it hears."""

    def __init__(self, site: Any) -> None:
        self.site, self.trains, self.backward = site, site.trains, site.backward
        self.heard: list[int | None] = []

    def forward(self, x: np.ndarray, seed: int | None = None) -> Any:
        self.heard.append(seed)
        return self.site.forward(x, seed)


@given(lora_trained, st.lists(batches(), min_size=1, max_size=3), st.sampled_from([None, False, True]))
def test_every_site_is_given_the_seed_of_its_micro_batch_also_when_its_layer_is_run_again(
    case: Trained, drawn: list[Batch], checkpointing: bool | None
) -> None:
    """None: the default, which is to keep the caches."""
    sites = {name: Listening(site) for name, site in case.model().sites.items()}
    model, given_seeds = Model(case.config, sites), [7 * i for i in range(len(drawn))]
    options = {} if checkpointing is None else {"checkpointing": checkpointing}
    loss_and_gradients(model, drawn, given_seeds, **options)
    twice = range(model.lowest_trained_layer, case.config.num_hidden_layers) if checkpointing else []
    for name, site in sites.items():
        times = 2 if any(f".layers.{layer}." in name for layer in twice) else 1
        assert site.heard == [seed for seed in given_seeds for _ in range(times)], name


@given(lora_trained, batches())
def test_no_site_is_given_a_seed_if_the_step_has_none(case: Trained, batch: Batch) -> None:
    sites = {name: Listening(site) for name, site in case.model().sites.items()}
    loss_and_gradients(Model(case.config, sites), [batch])
    mean_loss(Model(case.config, sites), [batch])
    assert all(set(site.heard) == {None} for site in sites.values())


# --- The backward stops at the lowest layer that trains ---


class NoBackward:
    """A site whose backward must not be called."""

    trains = False

    def __init__(self, site: Any) -> None:
        self.forward = site.forward

    def backward(self, dy: Any, cache: Any) -> Any:
        raise AssertionError("the backward went below the lowest layer that trains")


@given(configs(max_layers=3), st.data(), st.booleans())
def test_nothing_below_the_lowest_trained_layer_is_saved_or_goes_backwards(
    config: Config, data: st.DataObject, checkpointing: bool
) -> None:
    """No gradient from there is wanted."""
    lowest = data.draw(st.integers(0, config.num_hidden_layers - 1), label="lowest trained layer")
    case = Trained(config, LoRA(2, target_modules=(layer_module(lowest, "v"),)), 0)
    sites = {
        name: NoBackward(site) if name == EMBED or any(f"layers.{i}." in name for i in range(lowest)) else site
        for name, site in case.model().sites.items()
    }
    model = Model(config, sites)
    tokens = np.array([[1, 2, 3]])
    hidden, _, cache = forward(model, tokens, tokens, np.ones_like(tokens), checkpointing=checkpointing)
    kept, other = (
        (cache.layers.inputs, cache.layers.blocks) if checkpointing else (cache.layers.blocks, cache.layers.inputs)
    )
    assert list(kept) == list(range(lowest, config.num_hidden_layers))
    assert other == {}
    assert backward(model, np.ones_like(hidden), cache).keys() == case.trainable.keys()


def test_a_model_in_which_nothing_trains_has_no_gradients_and_saves_no_layer() -> None:
    model = base_model(TINY, random_weights(TINY, 0), np.float64)
    model = Model(TINY, {name: NoBackward(site) if name == NORM else site for name, site in model.sites.items()})
    tokens = np.array([[1, 2, 3]])
    hidden, _, cache = forward(model, tokens, tokens, np.ones_like(tokens))
    assert cache.layers.blocks == cache.layers.inputs == {}
    assert backward(model, hidden, cache) == {}


@given(configs(), batches(), seeds)
def test_where_the_embedding_alone_trains_the_backward_reaches_it_through_every_layer(
    config: Config, batch: Batch, seed: int
) -> None:
    weights, name = random_weights(config, seed), f"{EMBED}.weight"
    E = {name: weights[name].copy()}

    def model(moved: Arrays) -> Model:
        base = base_model(config, weights, moved[name].dtype)
        return Model(config, {**base.sites, EMBED: FullEmbedding(moved[name])})

    check_gradients(lambda moved: loss_only(model(moved), batch, None), E, loss_and_gradients(model(E), [batch])[1])


# --- Layouts that change nothing ---


@given(trained, batches(), st.integers(1, 4), st.integers(0, VOCAB - 1))
def test_padding_changes_nothing(case: Trained, batch: Batch, extra: int, pad_id: int) -> None:
    """Padding is a segment that nobody sees and that has no labels."""
    fillers = Batch(tokens=pad_id, labels=-100, positions=0, segments=0)  # type: ignore[arg-type]
    padded = Batch(
        *(np.pad(a, ((0, 0), (0, extra)), constant_values=fill) for a, fill in zip(batch, fillers, strict=True))
    )
    assert_same(loss_and_gradients(case.model(), [padded]), loss_and_gradients(case.model(), [batch]))


@given(trained, rows(), st.booleans())
def test_padding_on_the_left_is_padding_on_the_right(case: Trained, drawn: list[list[Example]], left: bool) -> None:
    assert_same(
        loss_and_gradients(case.model(), [collate(drawn, 0, left=True)]),
        loss_and_gradients(case.model(), [collate(drawn, 0, left=False)]),
    )


@given(trained, st.lists(examples(), min_size=1, max_size=4))
def test_packed_end_to_end_the_examples_are_what_they_are_one_by_one(case: Trained, drawn: list[Example]) -> None:
    """Positions start anew with each example, and attention stays within it."""
    drawn = [*drawn, Example([1, 2, 3], [False, True, True])]
    assert_same(
        loss_and_gradients(case.model(), [collate([drawn], 0)]),
        loss_and_gradients(case.model(), [pad([example], 0) for example in drawn]),
    )


@given(trained, rows(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(case: Trained, drawn: list[list[Example]], random: Any) -> None:
    shuffled = random.sample(drawn, len(drawn))
    assert_same(
        loss_and_gradients(case.model(), [collate(drawn, 0)]), loss_and_gradients(case.model(), [collate(shuffled, 0)])
    )


@given(trained, rows(), st.data())
def test_k_micro_batches_are_one_batch(case: Trained, drawn: list[list[Example]], data: st.DataObject) -> None:
    """However unevenly the labels are spread over them."""
    cuts = data.draw(st.sets(st.integers(1, max(1, len(drawn) - 1))), label="cuts")
    edges = [0, *sorted(cut for cut in cuts if cut < len(drawn)), len(drawn)]
    micro = [collate(drawn[a:b], 0) for a, b in pairwise(edges)]
    assert_same(loss_and_gradients(case.model(), micro), loss_and_gradients(case.model(), [collate(drawn, 0)]))


# --- Time ---


@given(trained, st.integers(1, 60))
def test_a_layer_turns_its_keys_by_their_position_where_the_configuration_says_so(case: Trained, position: int) -> None:
    """A lone token attends to itself wherever it stands, so its position is seen in the keys and nowhere else."""
    token, here, segment = np.array([[1]]), np.array([[position]]), np.array([[1]])
    x, past, _ = forward(case.model(), token, np.zeros_like(here), segment)
    x_moved, past_moved, _ = forward(case.model(), token, here, segment)
    assert x.tobytes() == x_moved.tobytes()
    for uses_rope, (k, v), (k_moved, v_moved) in zip(
        case.config.rope_layers, past.layers, past_moved.layers, strict=True
    ):
        assert v.tobytes() == v_moved.tobytes()
        assert (k.tobytes() != k_moved.tobytes()) == uses_rope


@given(trained, batches(), st.integers(1, 50))
def test_a_model_sees_only_the_differences_of_positions(case: Trained, batch: Batch, shift: int) -> None:
    """So padding on the left and a past of any length do no harm."""
    shifted = batch._replace(positions=batch.positions + shift)
    assert_same(loss_and_gradients(case.model(), [shifted]), loss_and_gradients(case.model(), [batch]))


@given(trained, st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=6), st.data())
def test_changing_future_tokens_changes_no_byte_of_what_came_before(
    case: Trained, tokens: list[int], data: st.DataObject
) -> None:
    """Causality, of the whole model."""
    now = data.draw(st.integers(1, len(tokens) - 1), label="the first token of the future")
    row, model = np.array([tokens]), case.model()
    other = row.copy()
    other[:, now:] = (other[:, now:] + 1) % VOCAB
    positions, segments = np.arange(len(tokens))[None], np.ones_like(row)
    before, after = (forward(model, t, positions, segments)[0][:now] for t in (row, other))
    assert before.tobytes() == after.tobytes()


@given(trained, batches(), st.data())
def test_going_on_from_past_keys_and_values_is_the_full_forward(
    case: Trained, batch: Batch, data: st.DataObject
) -> None:
    """Token by token or in larger steps: packed rows and padding included."""
    model, (B, T) = case.model(), batch.tokens.shape
    whole, past_of_whole, _ = forward(model, batch.tokens, batch.positions, batch.segments)
    past: Past | None = None
    parts = []
    for start, stop in steps(T, data):
        part = np.s_[:, start:stop]
        inputs = batch.tokens[part], batch.positions[part], batch.segments[part]
        hidden, past, _ = forward(model, *inputs, past, keep=False)
        parts.append(hidden.reshape(B, stop - start, -1))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole.reshape(B, T, -1), rtol=1e-10, atol=1e-11)
    assert past is not None
    for one, other in zip(past.layers, past_of_whole.layers, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-11)


def steps(length: int, data: st.DataObject) -> Iterator[tuple[int, int]]:
    start = 0
    while start < length:
        stop = start + data.draw(st.integers(1, length - start), label="tokens at once")
        yield start, stop
        start = stop
