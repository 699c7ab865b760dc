"""Parts of a batch that go through the model side by side are the batch: same loss, same gradients, no row lost."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import batches, configs, seeds
from support.threads_as_ranks import on_threads

from minilora.data.batches import Batch, collate, count_examples, divide
from minilora.data.examples import Example
from minilora.formats.checkpoint import random_weights
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.sites import Gradients, add_gradients, part_seed
from minilora.training.message import Sum
from minilora.training.parts import on_all_cores
from minilora.training.ranks import Ranks
from minilora.training.step import loss_and_gradients, mean_loss

NUMBER_OF_PARTS = "minilora.training.parts.number_of_parts"


def adapted(config: Config, seed: int, dropout: float = 0.0) -> Model:
    rng = np.random.default_rng(seed)
    base = base_model(config, random_weights(config, seed), np.float64)
    method = LoRA(2, dropout=dropout, target_modules=("all-linear",))
    return method.attach(base, {name: rng.normal(size=p.shape) for name, p in method.start(base, rng).items()})


def assert_same(one: tuple[float, Gradients], other: tuple[float, Gradients]) -> None:
    """Up to the order of summation."""
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        np.testing.assert_allclose(gradient, other[1][name], rtol=1e-9, atol=1e-12 * max(1, abs(gradient).max()))


@given(st.integers(0, 2**62), st.integers(0, 2**62), st.integers(0, 64), st.integers(0, 64))
def test_no_two_parts_draw_by_the_same_seed(seed: int, other_seed: int, part: int, other_part: int) -> None:
    assert part_seed(seed, 0) == seed and part_seed(None, part) is None
    for other in (other_seed, seed + 1):  # the next micro-batch's seed is the next number
        assert part_seed(seed, 1 + part) != part_seed(other, 1 + other_part) or (seed, part) == (other, other_part)


@given(
    config=configs(max_layers=2), drawn=st.lists(batches(), min_size=1, max_size=2), most=st.integers(1, 3), seed=seeds
)
def test_parts_side_by_side_are_the_whole_batch(config: Config, drawn: list[Batch], most: int, seed: int) -> None:
    """Gradients are sums over examples, whoever computes the summands."""
    model = adapted(config, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NUMBER_OF_PARTS, lambda examples: min(most, examples))
        on_cores, mean = loss_and_gradients(model, drawn, run=on_all_cores), mean_loss(model, drawn)
        patch.setattr(NUMBER_OF_PARTS, lambda examples: 1)
        assert_same(on_cores, loss_and_gradients(model, drawn))
        assert mean == pytest.approx(mean_loss(model, drawn), rel=1e-12)


@given(config=configs(max_layers=2), batch=batches(), seed=seeds)
def test_each_part_draws_its_own_dropout_and_the_first_that_of_the_batch(
    config: Config, batch: Batch, seed: int
) -> None:
    """Otherwise all parts would drop the same features."""
    model, parts = adapted(config, seed, dropout=0.5), divide(batch, count_examples(batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NUMBER_OF_PARTS, lambda examples: examples)
        on_cores = loss_and_gradients(model, [batch], [seed], run=on_all_cores)
    own = [part_seed(seed, j) for j in range(len(parts))]
    assert own[0] == seed and len(set(own)) == len(own) and part_seed(None, 3) is None
    assert_same(on_cores, loss_and_gradients(model, parts, own))


def examples_of(batch: Batch) -> list[tuple[list[int], ...]]:
    """Tokens, labels and positions of each example, in any order."""
    found = []
    for row in zip(*batch, strict=True):
        *arrays, segments = row
        found += [tuple(array[segments == s].tolist() for array in arrays) for s in np.unique(segments[segments > 0])]
    return sorted(found)


@given(batch=batches(), data=st.data())
def test_a_divided_batch_has_the_same_examples_and_no_padding(batch: Batch, data: st.DataObject) -> None:
    """No core computes padding."""
    count = len(examples_of(batch))
    assert count_examples(batch) == count
    parts = divide(batch, data.draw(st.integers(1, count)))
    assert sorted(example for part in parts for example in examples_of(part)) == examples_of(batch)
    assert all((part.segments > 0).all() for part in parts)
    for part in parts:
        assert len(part.tokens) == 1 or all(len(np.unique(row)) == 1 for row in part.segments)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), data=st.data())
def test_the_parts_of_a_batch_differ_by_no_more_than_its_longest_example(
    lengths: list[int], data: st.DataObject
) -> None:
    batch = collate([[Example([1] * length, [True] * length)] for length in lengths], 0)
    sizes = [part.tokens.size for part in divide(batch, data.draw(st.integers(1, len(lengths))))]
    assert sum(sizes) == sum(lengths) and max(sizes) - min(sizes) <= max(lengths)


# --- Shared out among ranks ---


def summed(ranks: Ranks, parts_of_each: list[int]) -> tuple[float, Gradients]:
    """A step of so many micro-batches, each of so many parts, whose gradients are random numbers."""

    def part(number: int, seed: int | None) -> tuple[float, Gradients]:
        rng = np.random.default_rng(number)
        weight = rng.standard_normal((3, 4)).astype(np.float32).T  # in another order of memory, as a product can be
        return float(rng.standard_normal()), {"weight": weight, "bias": rng.standard_normal(3)}

    def side_by_side(work, batches, seeds):  # type: ignore[no-untyped-def]
        for (first, count), seed in zip(batches, seeds, strict=True):
            yield from (work(first + i, seed) for i in range(count))

    firsts = [sum(parts_of_each[:j]) for j in range(len(parts_of_each))]
    micro_batches = list(zip(firsts, parts_of_each, strict=True))
    total = Sum()
    for loss, new in ranks.relay(total, side_by_side, part, micro_batches, [None] * len(micro_batches)):
        total.loss += loss
        add_gradients(total.gradients, new)
    return total.loss, total.gradients


@given(parts_of_each=st.lists(st.integers(1, 3), min_size=1, max_size=7), size=st.integers(2, 4))
def test_the_sum_of_a_step_is_the_same_to_the_last_bit_on_any_number_of_ranks(
    parts_of_each: list[int], size: int
) -> None:
    """The sum so far travels from rank to rank, and each adds its parts when their turn has come."""
    loss, gradients = summed(Ranks(), parts_of_each)
    for shared_loss, shared in on_threads(size, lambda ranks: summed(ranks, parts_of_each)):
        assert shared_loss == loss
        assert list(shared) == list(gradients), "in the same order, by which their norm rounds"
        for name, gradient in gradients.items():
            assert shared[name].tobytes() == gradient.tobytes()
            assert shared[name].strides == gradient.strides, "in the same order of memory, by which its sum rounds"


@settings(max_examples=30)
@given(
    config=configs(max_layers=2),
    drawn=st.lists(batches(), min_size=1, max_size=4),
    size=st.integers(2, 3),
    seed=seeds,
)
def test_loss_and_gradients_of_the_model_are_the_same_bytes_on_any_number_of_ranks(
    config: Config, drawn: list[Batch], size: int, seed: int
) -> None:
    """Dropout included: a micro-batch draws by its own seed, whoever computes it."""
    model, drawing = adapted(config, seed, dropout=0.3), range(seed, seed + len(drawn))
    of_thread = threading.local()

    def step(ranks: Ranks) -> tuple[float, dict[str, bytes], float]:
        of_thread.ranks = ranks
        loss, gradients = loss_and_gradients(model, drawn, drawing)
        return loss, {name: gradient.tobytes() for name, gradient in gradients.items()}, mean_loss(model, drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NUMBER_OF_PARTS, lambda examples: 1)
        patch.setattr("minilora.training.step.world", lambda: of_thread.ranks)
        assert on_threads(size, step) == [step(Ranks())] * size


@given(count=st.integers(0, 9), size=st.integers(1, 4))
def test_what_is_shared_out_comes_back_whole_and_in_order_and_each_item_is_computed_once(count: int, size: int) -> None:
    computed: list[int] = []

    def squared(item: int) -> int:
        computed.append(item)
        return item * item

    assert (
        on_threads(size, lambda ranks: list(ranks.share(squared, range(count))))
        == [[item * item for item in range(count)]] * size
    )
    assert sorted(computed) == list(range(count))
