"""A step downhill: AdamW and SGD, clipping, the learning rate over time, and the order of the rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.small_parameters import arrays, rates
from support.strategies import seeds

from minilora.training.optimizers import OPTIMIZERS, SGD, AdamW, clip_gradients, global_norm
from minilora.training.order import Order
from minilora.training.schedules import SCHEDULES, learning_rate, warmup_steps

# --- The optimisers ---


@given(seed=seeds, rate=rates, decay=st.floats(0, 1), steps=st.integers(1, 8))
def test_adamw_follows_its_textbook_recurrence(seed: int, rate: float, decay: float, steps: int) -> None:
    """Loshchilov & Hutter (2019), algorithm 2, line by line."""
    parameters, gradients = arrays(seed), [arrays(seed + t) for t in range(1, steps + 1)]
    expected = {}
    for name, p in parameters.items():  # Loshchilov & Hutter, algorithm 2, line by line
        m, v, weight_decay = 0, 0, decay if p.ndim == 2 else 0
        for t, g in enumerate((gradient[name] for gradient in gradients), start=1):
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.999 * v + (1 - 0.999) * g**2
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            p = p - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + weight_decay * p)
        expected[name] = p
    optimizer = AdamW(parameters, decay)
    for gradient in gradients:
        optimizer.update(parameters, gradient, rate)
    for name in parameters:
        np.testing.assert_allclose(parameters[name], expected[name], rtol=1e-10, atol=1e-12)


@given(seed=seeds, rate=rates)
def test_adamws_first_step_has_the_length_of_the_rate_whatever_the_gradients_scale(seed: int, rate: float) -> None:
    """m̂/√v̂ is the gradient divided by its own size."""
    for scale in (1.0, 1e6):
        p = {"p": np.zeros(3)}
        AdamW(p).update(p, {"p": scale * np.array([1.0, -2.0, 3.0])}, rate)
        np.testing.assert_allclose(p["p"], rate * np.array([-1, 1, -1]), rtol=1e-6)


@given(seed=seeds, rate=rates, decay=st.floats(0, 1))
def test_sgd_walks_down_the_gradient(seed: int, rate: float, decay: float) -> None:
    parameters, before, gradients = arrays(seed), arrays(seed), arrays(seed + 1)
    SGD(parameters, decay).update(parameters, gradients, rate)
    for name, p in before.items():
        expected = p - rate * (gradients[name] + (decay if name == "matrix" else 0) * p)
        np.testing.assert_allclose(parameters[name], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_matrices_and_leaves_vectors_alone(name: str) -> None:
    """Gains and biases are not to be drawn to zero."""
    parameters, before = arrays(0), arrays(0)
    nothing = {key: np.zeros_like(p) for key, p in parameters.items()}
    OPTIMIZERS[name](parameters, 0.5).update(parameters, nothing, 0.1)
    np.testing.assert_allclose(parameters["matrix"], before["matrix"] * (1 - 0.1 * 0.5), rtol=1e-15)
    assert np.array_equal(parameters["gain"], before["gain"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_writes_into_the_arrays_that_the_model_shares_and_keeps_their_dtype(name: str) -> None:
    parameters = {key: p.astype(np.float32) for key, p in arrays(0).items()}
    shared = dict(parameters)
    optimizer = OPTIMIZERS[name](parameters, 0.1)
    optimizer.update(parameters, {key: p.astype(np.float32) for key, p in arrays(1).items()}, 0.1)
    assert all(parameters[key] is shared[key] and shared[key].dtype == np.float32 for key in shared)
    assert {a.dtype.name for a in optimizer.state().values()} <= {"float32", "int64"}


@example(seed=0, limit=0.5)
@given(seed=seeds, limit=st.just(0.0) | st.floats(1e-3, 10))
def test_clipping_keeps_the_direction_and_caps_the_norm(seed: int, limit: float) -> None:
    """All gradients are multiplied by one factor."""
    before, after = arrays(seed), arrays(seed)
    norm = global_norm(after)
    assert math.isclose(norm, math.sqrt(sum(float(x) ** 2 for g in before.values() for x in g.ravel())))
    clip_gradients(after, norm, limit)
    if limit == 0 or norm <= limit:
        assert all(np.array_equal(before[name], after[name]) for name in before)
    else:
        assert math.isclose(global_norm(after), limit)
        for name in before:
            np.testing.assert_allclose(after[name] * norm, before[name] * limit, rtol=1e-12)


# --- The learning rate ---


@given(
    schedule=st.sampled_from(SCHEDULES), steps=st.integers(1, 200), share=st.floats(0, 0.99), peak=st.floats(1e-6, 1)
)
@example(schedule="cosine", steps=1, share=0.0, peak=1.0)
def test_rates_climb_evenly_to_the_peak_and_then_never_rise_nor_reach_zero(
    schedule: str, steps: int, share: float, peak: float
) -> None:
    """A step with the rate zero would be wasted."""
    warmup = int(share * steps)
    found = [learning_rate(step, steps, peak, schedule, warmup) for step in range(steps)]
    np.testing.assert_allclose(found[:warmup], [peak * (k + 1) / (warmup + 1) for k in range(warmup)])
    assert found[warmup] == peak
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[warmup:]))
    assert 0 < min(found)


@pytest.mark.parametrize(
    ("schedule", "halfway", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 0.1), ("cosine", 0.5, (1 - math.cos(math.pi / 10)) / 2)],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_have_these_values_at_their_corners(schedule: str, halfway: float, last: float, warmup: int) -> None:
    def share(step: int) -> float:
        return learning_rate(step, warmup + 10, 2.0, schedule, warmup) / 2.0

    assert share(0) == (0.2 if warmup else 1.0)
    assert share(warmup) == 1.0
    assert math.isclose(share(warmup + 5), halfway)
    assert math.isclose(share(warmup + 9), last)


def test_an_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'step' is unknown: choose cosine, linear, constant"):
        learning_rate(3, 10, 1.0, "step")


def test_warmup_below_one_is_a_share_and_from_one_on_a_number_of_steps() -> None:
    assert [warmup_steps(warmup, 200) for warmup in (0, 0.03, 0.5, 1, 20, 500)] == [0, 6, 100, 1, 20, 500]


# --- The order of the rows ---


@given(count=st.integers(1, 20), size=st.integers(1, 25), seed=seeds)
def test_each_epoch_deals_every_row_once_and_its_last_part_may_be_smaller(count: int, size: int, seed: int) -> None:
    """No row is learnt twice in an epoch, and none is left out."""
    order, rng = Order(count), np.random.default_rng(seed)
    takes = math.ceil(count / size)
    for epoch in (1, 2, 3):
        dealt = [order.take(size, rng) for _ in range(takes)]
        assert sorted(itertools.chain(*dealt)) == list(range(count))
        assert [len(part) for part in dealt] == [size] * (takes - 1) + [count - size * (takes - 1)]
        assert order.epoch == epoch


@given(count=st.integers(10, 30), seed=seeds)
def test_epochs_differ_in_order_and_the_seed_decides_it(count: int, seed: int) -> None:
    def epochs(seed: int) -> list[list[int]]:
        order, rng = Order(count), np.random.default_rng(seed)
        return [order.take(count, rng) for _ in range(2)]

    assert epochs(seed) == epochs(seed) != epochs(seed + 1)
    assert epochs(seed)[0] != epochs(seed)[1]
