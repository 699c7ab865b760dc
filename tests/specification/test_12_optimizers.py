"""What optimisers keep between steps and do when not told otherwise, and the rules of those that keep less than AdamW.

The formulas of AdamW, SGD and the schedules are in the chapter before.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import normal, seeds

from minilora.frozen.nf4 import DYNAMIC, DYNAMIC_UNSIGNED, dequantize, quantize
from minilora.runs.state_file import load_state, save_state
from minilora.training.flat import Flat
from minilora.training.optimizers import OPTIMIZERS, SGD, Adafactor, AdamW, AdamW8bit, Lion, global_norm
from minilora.training.order import Order
from minilora.training.schedules import learning_rate
from minilora.training.state import State

RULES = {**OPTIMIZERS, "adamw_8bit of everything": partial(AdamW8bit, min_8bit_size=1)}
SHAPES = {"matrix": (30, 20), "gain": (300,), "stack": (2, 5, 3)}  # decay acts on the first and the last
few = settings(max_examples=25)
rates, decays, walks = st.floats(1e-4, 0.1), st.floats(0, 1), st.integers(1, 6)


def arrays(seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {name: normal(seed, *shape, stream=i).astype(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def walk(optimizer: Any, parameters: dict[str, np.ndarray], steps: int, seed: int, rate: float, first: int = 0) -> None:
    """The gradients of each step are different, and the same whoever walks."""
    for t in range(first, steps):
        optimizer.update(parameters, arrays(seed + 1 + t, parameters["gain"].dtype), rate)


# --- All of them ---


@pytest.mark.parametrize("name", RULES)
def test_nothing_decays_unless_asked_for(name: str) -> None:
    p = {"p": normal(0, 2, 3)}
    before = p["p"].copy()
    RULES[name](p).update(p, {"p": np.zeros((2, 3))}, 0.1)
    np.testing.assert_array_equal(p["p"], before)


@pytest.mark.parametrize("name", RULES)
def test_where_there_is_no_gradient_matrices_alone_shrink_by_rate_times_decay(name: str) -> None:
    p, before = arrays(0), arrays(0)
    RULES[name](p, 0.5).update(p, {key: np.zeros_like(array) for key, array in p.items()}, 0.1)
    np.testing.assert_array_equal(p["gain"], before["gain"])
    for key in ("matrix", "stack"):
        np.testing.assert_allclose(p[key], before[key] * (1 - 0.1 * 0.5), rtol=1e-15)


@pytest.mark.parametrize("name", RULES)
def test_a_rates_factor_is_for_the_step_and_for_the_decay_of_its_parameter_alone(name: str) -> None:
    alone, together = arrays(0), arrays(0)
    walk(RULES[name](alone, 0.1), alone, 3, 0, 0.25)
    walk(RULES[name](together, 0.1, {"matrix": 4.0}), together, 3, 0, 0.25)
    assert not np.array_equal(together["matrix"], alone["matrix"])
    np.testing.assert_array_equal(together["gain"], alone["gain"])
    alone = arrays(0)
    walk(RULES[name](alone, 0.1), alone, 3, 0, 1.0)
    np.testing.assert_array_equal(together["matrix"], alone["matrix"])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_are_changed_in_place_and_keep_their_dtype_and_so_does_the_state(name: str, dtype: Any) -> None:
    p = arrays(0, dtype)
    shared = dict(p)
    optimizer = RULES[name](p, 0.1)
    before = optimizer.state()
    walk(optimizer, p, 2, 0, 0.1)
    assert all(p[key] is shared[key] and shared[key].dtype == dtype for key in shared)
    state = optimizer.state()
    assert state.keys() == before.keys() and all(state[key] is before[key] for key in state)
    coded = {"uint8", "float32"} if name == "adamw_8bit of everything" else {np.dtype(dtype).name}
    assert {array.dtype.name for array in state.values()} <= {"int64", *coded}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_state_from_a_file_leads_to_the_same_bytes_as_one_that_was_never_saved(
    name: str, dtype: Any, tmp_path: Path
) -> None:
    def new() -> State:
        p = arrays(0, dtype)
        return State(Flat(p, {}), RULES[name](p, 0.1), Order(3), np.random.default_rng(0))

    whole, cut, resumed = new(), new(), new()
    walk(whole.optimizer, whole.trainable, 6, 0, 0.01)
    walk(cut.optimizer, cut.trainable, 3, 0, 0.01)
    save_state(cut, tmp_path)
    load_state(resumed, tmp_path)
    walk(resumed.optimizer, resumed.trainable, 6, 0, 0.01, first=3)
    for key, array in {**whole.trainable, **whole.optimizer.state()}.items():
        assert array.tobytes() == {**resumed.trainable, **resumed.optimizer.state()}[key].tobytes(), key


@pytest.mark.parametrize(
    ("name", "bytes_of_the_matrix"),
    [
        ("adamw", 8 * 6000),
        ("adamw_8bit", 2 * 6000 + 2 * 4 * 24),
        ("adafactor", 4 * 160),
        ("lion", 4 * 6000),
        ("sgd", 0),
    ],
)
def test_a_matrix_of_100_by_60_has_a_state_of_so_many_bytes(name: str, bytes_of_the_matrix: int) -> None:
    """24 is the number of blocks of 256 in 6000; 160 = 100 + 60."""
    state = OPTIMIZERS[name]({"p": np.zeros((100, 60), np.float32)}).state()
    assert sum(array.nbytes for key, array in state.items() if key != "steps") == bytes_of_the_matrix


def test_adamws_state_is_its_step_count_and_both_moments_of_every_parameter_under_these_names() -> None:
    """Files of saved runs hold them under these names."""
    p = {"a": normal(0, 2), "b": normal(0, 2, 3)}
    optimizer = AdamW(p)
    optimizer.update(p, {name: np.ones_like(array) for name, array in p.items()}, 0.1)
    state = optimizer.state()
    assert state.keys() == {"steps", "m.a", "m.b", "v.a", "v.b"}
    assert int(state["steps"]) == 1
    np.testing.assert_allclose(state["m.a"], 0.1)
    np.testing.assert_allclose(state["v.b"], 0.001)
    assert SGD(p).state() == {}
    assert Lion(p).state().keys() == {"m.a", "m.b"}
    assert Adafactor(p).state().keys() == {"steps", "v.a", "rows.b", "columns.b"}
    parts = {"m.a.codes", "m.a.absmax", "v.a.codes", "v.a.absmax"}
    assert AdamW8bit(p, min_8bit_size=2).state().keys() >= parts
    assert AdamW8bit(p, min_8bit_size=3).state().keys() == {
        "steps",
        "m.a",
        "v.a",
        *(x.replace("a.", "b.", 1) for x in parts),
    }


def test_the_norm_of_single_precision_gradients_is_summed_in_double_precision() -> None:
    """In float32, 1 is lost beside 2²⁶, however often it is added."""
    gradient = np.ones(1001, np.float32)
    gradient[0] = 2**13
    assert global_norm({"g": gradient}) == math.sqrt(2**26 + 1000)


def test_the_schedule_is_a_cosine_without_warm_up_unless_another_is_asked_for() -> None:
    for step in range(5):
        assert learning_rate(step, 5, 2.0) == learning_rate(step, 5, 2.0, "cosine", 0)
    defaults = inspect.signature(learning_rate).parameters
    assert (defaults["schedule"].default, defaults["warmup"].default) == ("cosine", 0)


# --- AdamW in 8 bits ---


@few
@given(seed=seeds, rate=rates, decay=decays, steps=walks)
def test_adamw_8bit_is_adamw_whose_moments_are_quantised_between_steps(
    seed: int, rate: float, decay: float, steps: int
) -> None:
    p, expected = arrays(seed), arrays(seed)
    for i, (name, x) in enumerate(expected.items()):
        weight_decay = decay if x.ndim >= 2 else 0
        m = v = quantize(np.zeros_like(x), DYNAMIC, 256)
        for t in range(1, steps + 1):
            g = normal(seed + t, *x.shape, stream=i)
            M = 0.9 * dequantize(*m, DYNAMIC, 256).reshape(x.shape) + (1 - 0.9) * g
            V = 0.999 * dequantize(*v, DYNAMIC_UNSIGNED, 256).reshape(x.shape) + (1 - 0.999) * g**2
            m_hat, v_hat = M / (1 - 0.9**t), V / (1 - 0.999**t)
            x = x - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + weight_decay * x)
            m, v = (
                (codes, a.astype(np.float32))
                for codes, a in (quantize(M, DYNAMIC, 256), quantize(V, DYNAMIC_UNSIGNED, 256))
            )
        expected[name] = x
    walk(AdamW8bit(p, decay, min_8bit_size=1), p, steps, seed, rate)
    for name in p:
        np.testing.assert_allclose(p[name], expected[name], rtol=1e-5, atol=1e-7)


@few
@given(seed=seeds, rate=rates, scale=st.sampled_from([1e-12, 1.0, 1e6]))
def test_the_first_step_of_adamw_8bit_is_adamws_to_the_last_bit(seed: int, rate: float, scale: float) -> None:
    ours, plain = arrays(seed), arrays(seed)
    gradients = {name: scale * g for name, g in arrays(seed + 1).items()}
    AdamW8bit(ours, 0.1, min_8bit_size=1).update(ours, gradients, rate)
    AdamW(plain, 0.1).update(plain, gradients, rate)
    for name in ours:
        np.testing.assert_array_equal(ours[name], plain[name])


@few
@given(seed=seeds, decades=st.integers(0, 4))
def test_what_is_kept_of_m_and_v_is_off_by_at_most_half_a_gap_of_the_largest_in_the_block(
    seed: int, decades: int
) -> None:
    """Half the widest gap is 0.9 / 64 / 2 with a sign and 0.9 / 128 / 2 without."""
    p = {"p": np.zeros(1000, np.float32)}
    g = {"p": (normal(seed, 1000) * 10.0 ** (decades * normal(seed, 1000, stream=1))).astype(np.float32)}
    optimizer, plain = AdamW8bit(p, min_8bit_size=1), AdamW(p)
    optimizer.update(p, g, 0.0)
    plain.update(p, g, 0.0)
    for kept, exact, gap in (
        (optimizer.m["p"].read(), plain.m["p"], 0.9 / 64),
        (optimizer.v["p"].read(), plain.v["p"], 0.9 / 128),
    ):
        for start in range(0, 1000, 256):
            block = slice(start, start + 256)
            largest = abs(exact[block]).max()
            assert abs(kept[block] - exact[block]).max() <= largest * gap / 2 * (1 + 1e-5)
            if exact[block].max() == largest:  # there is a 1 among the values, and no −1
                assert kept[block].max() == pytest.approx(largest, rel=1e-6)
    assert optimizer.v["p"].read().min() >= 0


def test_the_values_for_v_are_twice_as_many_in_each_decade_and_none_is_negative() -> None:
    """Seven decades up to 1. The one that ends at 10^(i − 6) has the middles of 2^(i + 1) equal parts."""
    middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2 ** (i + 1)) for i in range(7) for k in range(2 ** (i + 1))]
    assert len(middles) == 254
    np.testing.assert_allclose(DYNAMIC_UNSIGNED, sorted([0, *middles, 1]), rtol=1e-6)


def test_little_arrays_and_embeddings_keep_their_moments_in_full() -> None:
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "little")
    p = {name: normal(0, 64, 64 - (name == "little")).astype(np.float32) for name in names}
    optimizer, plain, in_full = AdamW8bit(p, 0.1), AdamW(p, 0.1), {name: array.copy() for name, array in p.items()}
    assert {key for key, array in optimizer.state().items() if array.dtype == np.uint8} == {
        f"{moment}.{names[1]}.codes" for moment in "mv"
    }
    for t in range(3):
        g = {name: normal(t + 1, *array.shape).astype(np.float32) for name, array in p.items()}
        optimizer.update(p, g, 0.1)
        plain.update(in_full, g, 0.1)
    for name in (names[0], names[2]):
        np.testing.assert_array_equal(p[name], in_full[name])
    assert 0 < abs(p[names[1]] - in_full[names[1]]).max() < 0.05


# --- Adafactor ---


@few
@given(seed=seeds, rate=rates, decay=decays, steps=walks)
def test_adafactor_follows_its_textbook_recurrence(seed: int, rate: float, decay: float, steps: int) -> None:
    p, expected = arrays(seed), arrays(seed)
    for i, (name, x) in enumerate(expected.items()):  # Shazeer & Stern, algorithms 4 and 5, line by line
        R, C, v = 0.0, 0.0, 0.0
        for t in range(1, steps + 1):
            g = normal(seed + t, *x.shape, stream=i)
            beta = 1 - t**-0.8
            if x.ndim >= 2:
                R = beta * R + (1 - beta) * (g**2 + 1e-30).mean(-1, keepdims=True)
                C = beta * C + (1 - beta) * (g**2 + 1e-30).mean(-2, keepdims=True)
                v = R * C / R.mean(-2, keepdims=True)
            else:
                v = beta * v + (1 - beta) * (g**2 + 1e-30)
            u = g / np.sqrt(v)
            u = u / max(1, np.sqrt((u**2).mean()) / 1.0)
            x = x - rate * (u + (decay if x.ndim >= 2 else 0) * x)
        expected[name] = x
    walk(Adafactor(p, decay), p, steps, seed, rate)
    for name in p:
        np.testing.assert_allclose(p[name], expected[name], rtol=1e-10, atol=1e-12)


@few
@given(seed=seeds, rate=rates, scale=st.sampled_from([1e-3, 1.0, 1e6]), dtype=st.sampled_from([np.float32, np.float64]))
def test_of_squares_of_rank_one_adafactor_loses_nothing_so_its_first_step_is_the_gradients_sign(
    seed: int, rate: float, scale: float, dtype: Any
) -> None:
    a, b = 0.1 + abs(normal(seed, 5, 1)), 0.1 + abs(normal(seed, 1, 7, stream=1))
    signs = np.sign(normal(seed, 5, 7, stream=2))
    p = {"matrix": np.zeros((5, 7), dtype), "gain": np.zeros(7, dtype)}
    g = {"matrix": (scale * signs * a * b).astype(dtype), "gain": (scale * signs[0] * b[0]).astype(dtype)}
    Adafactor(p).update(p, g, rate)
    np.testing.assert_allclose(p["matrix"], -rate * signs, rtol=2e-6)
    np.testing.assert_allclose(p["gain"], -rate * signs[0], rtol=2e-6)


@few
@given(seed=seeds, steps=walks)
def test_adafactors_second_moment_has_the_row_and_column_means_of_the_whole_one(seed: int, steps: int) -> None:
    p = arrays(seed)
    optimizer, whole = Adafactor(p), 0.0
    walk(optimizer, p, steps, seed, 0.0)
    for t in range(1, steps + 1):
        whole = (1 - t**-0.8) * whole + t**-0.8 * arrays(seed + t)["matrix"] ** 2
    R, C = optimizer.rows["matrix"], optimizer.columns["matrix"]
    factored = np.outer(R, C) / R.mean()
    np.testing.assert_allclose(factored.mean(axis=1), whole.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(factored.mean(axis=0), whole.mean(axis=0), rtol=1e-12)


@few
@given(seed=seeds, rate=rates, jump=st.sampled_from([1e-6, 1.0, 100.0, 1e8]))
def test_however_much_the_gradient_grows_adafactors_step_has_a_root_mean_square_of_at_most_the_rate(
    seed: int, rate: float, jump: float
) -> None:
    p = arrays(seed)
    optimizer = Adafactor(p)
    walk(optimizer, p, 3, seed, rate)
    before = {name: array.copy() for name, array in p.items()}
    optimizer.update(p, {name: jump * g for name, g in arrays(seed + 9).items()}, rate)
    for name in p:
        length = np.sqrt(((p[name] - before[name]) ** 2).mean())
        assert length <= rate * (1 + 1e-9)
        if jump >= 100:
            assert math.isclose(length, rate, rel_tol=1e-6)


def test_adafactor_stays_where_the_gradient_is_exactly_zero_as_that_of_A_is_at_first() -> None:
    p = {"A": normal(0, 2, 3).astype(np.float32)}
    before = p["A"].copy()
    optimizer = Adafactor(p)
    optimizer.update(p, {"A": np.zeros((2, 3), np.float32)}, 0.1)
    np.testing.assert_array_equal(p["A"], before)
    optimizer.update(p, {"A": np.full((2, 3), 1e-4, np.float32)}, 0.1)
    np.testing.assert_allclose(p["A"], before - 0.1, rtol=1e-6)


# --- Lion ---


@few
@given(seed=seeds, rate=rates, decay=decays, steps=walks)
def test_lion_follows_its_textbook_recurrence(seed: int, rate: float, decay: float, steps: int) -> None:
    p, expected = arrays(seed), arrays(seed)
    for i, (name, x) in enumerate(expected.items()):  # Chen et al., algorithm 2, line by line
        m = 0.0
        for t in range(1, steps + 1):
            g = normal(seed + t, *x.shape, stream=i)
            c = 0.9 * m + (1 - 0.9) * g
            x = x - rate * (np.sign(c) + (decay if x.ndim >= 2 else 0) * x)
            m = 0.99 * m + (1 - 0.99) * g
        expected[name] = x
    walk(Lion(p, decay), p, steps, seed, rate)
    for name in p:
        np.testing.assert_allclose(p[name], expected[name], rtol=1e-10, atol=1e-12)


@few
@given(seed=seeds, rate=rates, steps=walks)
def test_lion_moves_every_number_by_the_rate_up_or_down_whatever_the_gradients_scale(
    seed: int, rate: float, steps: int
) -> None:
    p, scaled = arrays(seed), arrays(seed)
    optimizer, same = Lion(p), Lion(scaled)
    for t in range(steps):
        before, g = {name: array.copy() for name, array in p.items()}, arrays(seed + 1 + t)
        optimizer.update(p, g, rate)
        same.update(scaled, {name: 2.0**20 * array for name, array in g.items()}, rate)
        for name in p:
            np.testing.assert_allclose(abs(p[name] - before[name]), rate, rtol=1e-9)
            np.testing.assert_array_equal(scaled[name], p[name])


def test_lion_stays_where_memory_and_gradient_are_zero() -> None:
    p = {"A": normal(0, 2, 3)}
    before = p["A"].copy()
    Lion(p).update(p, {"A": np.zeros((2, 3))}, 0.1)
    np.testing.assert_array_equal(p["A"], before)
