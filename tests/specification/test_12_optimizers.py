"""What optimisers and schedules do when not told otherwise, and what they keep (formulas: test_training.py)."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from support.strategies import normal

from minilora.training.optimizers import SGD, AdamW, global_norm
from minilora.training.schedules import learning_rate


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
def test_nothing_decays_unless_asked_for(optimizer: type[AdamW | SGD]) -> None:
    p = {"p": normal(0, 2, 3)}
    before = p["p"].copy()
    optimizer(p).update(p, {"p": np.zeros((2, 3))}, 0.1)
    np.testing.assert_array_equal(p["p"], before)


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
