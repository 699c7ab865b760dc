"""Shares of a batch that go through the model side by side are the batch: same loss, same gradients, same order."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, seeds

from minilora import side_by_side as module
from minilora.backend import use_module
from minilora.formats.checkpoint import random_weights
from minilora.measured_step import random_batch, random_batches
from minilora.methods.base import base_model
from minilora.methods.lora import LoRA
from minilora.model.config import Config
from minilora.side_by_side import at_once, cores, side_by_side
from minilora.training.activations import Work
from minilora.training.step import loss_and_gradients, mean_loss


@given(config=configs(max_layers=2), rows=st.integers(2, 5), at_once=st.integers(1, 4), seed=seeds)
def test_shares_side_by_side_are_one_large_batch(config: Config, rows: int, at_once: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = base_model(config, random_weights(config, seed), np.float64)
    method = LoRA(2, dropout=0.5, target_modules=("all-linear",))
    trainable = {name: rng.normal(size=p.shape) for name, p in method.start(base, rng, np.float64).items()}
    model = method.attach(base, trainable)
    batches = [random_batch(config, Work(1, 5, 3), rng) for _ in range(rows)]
    loss, gradients = loss_and_gradients(model, batches, range(rows))
    same_loss, same_gradients = loss_and_gradients(model, batches, range(rows), at_once=at_once)
    assert same_loss == loss
    assert same_gradients.keys() == gradients.keys()
    assert all(np.array_equal(same_gradients[name], gradients[name]) for name in gradients)


@given(items=st.lists(st.integers()), most=st.integers(1, 4))
def test_results_come_in_the_order_of_the_items_and_never_more_than_allowed_are_at_work(
    items: list[int], most: int
) -> None:
    lock, at_work, seen = threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal at_work, seen
        with lock:
            at_work += 1
            seen = max(seen, at_work)
        with lock:
            at_work -= 1
        return -item

    assert list(side_by_side(work, items, most)) == [-item for item in items]
    assert seen <= most


def test_items_are_worked_on_at_the_same_time_with_products_on_one_core_each() -> None:
    barrier = threading.Barrier(2, timeout=20)  # nobody passes it alone

    def work(item: int) -> tuple[int, int]:
        barrier.wait()
        return item, cores()

    before = cores()
    assert list(side_by_side(work, [1, 2], 2)) == [(1, 1), (2, 1)]
    assert cores() == before


def test_what_goes_wrong_side_by_side_is_raised_and_the_cores_are_given_back() -> None:
    def work(item: int) -> None:
        raise ArithmeticError(str(item))

    before = cores()
    with pytest.raises(ArithmeticError, match="1"):
        list(side_by_side(work, [1, 2], 2))
    assert cores() == before


def test_nothing_goes_side_by_side_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_libraries", lambda: pytest.fail("asked"))
    previous = use_module(object())
    try:
        assert at_once(8) == 1
    finally:
        use_module(previous)


def test_a_batch_has_no_more_shares_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 4)
    assert [at_once(rows) for rows in (1, 3, 8)] == [1, 3, 4]


def test_a_thread_of_its_own_for_each_share_computes_the_same_mean_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_dict({"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
                               "num_attention_heads": 2})  # fmt: skip
    model = base_model(config, random_weights(config, 0))
    batches = random_batches(config, Work(5, 6, 20), 3, np.random.default_rng(0))
    assert [len(batch.tokens) for batch in batches] == [2, 2, 1]
    alone = mean_loss(model, batches)
    used: list[int] = []
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda most: used.append(most) or ThreadPoolExecutor(most))
    monkeypatch.setattr("minilora.training.step.cores", lambda: 2)
    assert mean_loss(model, batches) == alone
    assert used == [2]
