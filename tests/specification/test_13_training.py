"""Training: a run is decided by its seed, its economies change nothing, and it ends at the best it has seen."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.small_runs import (
    PLAN,
    ROWS,
    VALID,
    make_rows,
    methods,
    new_run,
    no_progress_bars,  # noqa: F401
    outcome,
    parameter_bytes,
    trained,
)
from support.strategies import TINY, random_weights, seeds

from minilora.data.batches import batches_of, pack
from minilora.data.examples import Example
from minilora.model.model import Model
from minilora.runs.folder import train_in
from minilora.runs.metrics import read_metrics
from minilora.runs.state_file import STATE_FILE
from minilora.training import loop
from minilora.training.loop import next_batches, steps_per_epoch
from minilora.training.step import loss_and_gradients, mean_loss

# --- Runs of the loop ---


@settings(max_examples=12)
@given(options=methods)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(options: dict[str, Any]) -> None:
    with TemporaryDirectory() as a, TemporaryDirectory() as b, TemporaryDirectory() as c:
        first, again = trained(Path(a), **options), trained(Path(b), **options)
        assert outcome(first, Path(a)) == outcome(again, Path(b))
        other = trained(Path(c), **(options | {"seed": 99}))
        assert parameter_bytes(first) != parameter_bytes(other)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activation_checkpointing_trains_to_the_same_bytes(tmp_path: Path, method: str) -> None:
    for name, checkpointing in (("a", False), ("b", True)):
        plan = replace(PLAN, activation_checkpointing=checkpointing)
        trained(tmp_path / name, plan, method=method, dropout=0.3)
    assert load_file(tmp_path / "a" / STATE_FILE).keys() == load_file(tmp_path / "b" / STATE_FILE).keys()
    for name, array in load_file(tmp_path / "a" / STATE_FILE).items():
        assert array.tobytes() == load_file(tmp_path / "b" / STATE_FILE)[name].tobytes()


def test_the_seconds_of_a_run_that_goes_on_are_counted_on_from_those_before(tmp_path: Path) -> None:
    """Its speed in summary.json is that of all its steps."""
    model, state = new_run()
    state.seconds = 1000.0
    train_in(tmp_path, model, state, ROWS, VALID, PLAN)
    assert 1000 < state.seconds < 2000


DESCENT = replace(PLAN, learning_rate=0.5, eval_every=0)  # by SGD: Adam would make ±rate of a rounding error


@pytest.mark.parametrize(("batch_size", "grad_accumulation"), [(1, 6), (2, 3), (3, 2)])
def test_accumulated_micro_batches_train_as_one_batch_in_every_epoch(
    tmp_path: Path, batch_size: int, grad_accumulation: int
) -> None:
    whole = trained(tmp_path / "whole", replace(DESCENT, batch_size=6, grad_accumulation=1), optimizer="sgd")
    plan = replace(DESCENT, batch_size=batch_size, grad_accumulation=grad_accumulation)
    micro = trained(tmp_path / "micro", plan, optimizer="sgd")
    assert whole.order.epoch == 4
    for name, p in whole.trainable.items():
        np.testing.assert_allclose(micro.trainable[name], p, rtol=1e-7, atol=1e-9)


@settings(max_examples=10)
@given(seed=seeds)
def test_every_micro_batch_has_a_dropout_of_its_own_which_the_seed_decides(seed: int) -> None:
    def drawn(seed: int) -> list[int]:
        found: list[int] = []

        def recording(model: Model, batches: Any, micro_seeds: list[int], *_: Any, **__: Any) -> Any:
            found.extend(micro_seeds)
            return 1.0, {name: np.zeros_like(p) for name, p in state.trainable.items()}

        model, state = new_run(seed=seed)
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "loss_and_gradients", recording)
            train_in(Path(folder), model, state, ROWS, [], PLAN)
        return found

    first = drawn(seed)
    assert len(first) == len(set(first)) == 14  # 9 rows make 2 + 2 + 1 micro-batches an epoch
    assert not set(first) & set(drawn(seed + 1))


def test_accumulation_weighs_each_token_alike_which_an_average_of_averages_does_not() -> None:
    """The mean is taken over the labels of the whole step, however they are spread over its micro-batches."""
    model, _ = new_run()
    short, long = Example([1, 2, 3], [False, False, True]), Example([4, 5, 6, 7], [False, True, True, True])
    micro = batches_of([[short], [long]], 1, pad_id=0)
    one, three = (mean_loss(model, [batch]) for batch in micro)
    loss, _ = loss_and_gradients(model, micro)
    assert math.isclose(loss, (1 * one + 3 * three) / 4)
    assert not math.isclose(loss, (one + three) / 2, rel_tol=1e-3)


def test_packed_rows_train_as_padded_rows_do(tmp_path: Path) -> None:
    examples = [row[0] for row in ROWS]
    packed = [[examples[i] for i in row] for row in pack([len(example.tokens) for example in examples], 12)]
    assert len(packed) < len(ROWS)
    plan = replace(DESCENT, batch_size=len(ROWS), grad_accumulation=1)  # each step is an epoch: the same rows in both
    on_packed = trained(tmp_path / "packed", plan, packed, optimizer="sgd")
    on_padded = trained(tmp_path / "padded", plan, optimizer="sgd")
    assert on_packed.tokens == on_padded.tokens == plan.steps * sum(len(example.tokens) for example in examples)
    for name, p in on_padded.trainable.items():
        np.testing.assert_allclose(on_packed.trainable[name], p, rtol=1e-7, atol=1e-9)


@given(count=st.integers(1, 12), batch_size=st.integers(1, 5), accumulation=st.integers(1, 3), seed=seeds)
def test_the_micro_batches_of_an_epoch_hold_every_row_once(
    count: int, batch_size: int, accumulation: int, seed: int
) -> None:
    rows = make_rows(count, seed)
    _, state = new_run(rows, seed=seed)
    plan = replace(PLAN, batch_size=batch_size, grad_accumulation=accumulation)
    steps = [next_batches(state, rows, plan, 0) for _ in range(steps_per_epoch(rows, batch_size, accumulation))]
    assert state.order.epoch == 1 and state.order.cursor == count
    assert all(1 <= len(batches) <= accumulation for batches in steps)
    assert all(len(batch.tokens) <= batch_size for batches in steps for batch in batches)
    dealt = itertools.chain(*(zip(batch.tokens, batch.segments, strict=True) for batch in itertools.chain(*steps)))
    found = [tokens[segments > 0].tolist() for tokens, segments in dealt]
    assert sorted(found) == sorted(row[0].tokens for row in rows)


def test_training_lowers_the_loss_and_changes_no_byte_of_what_is_frozen(tmp_path: Path) -> None:
    model, state = new_run()
    weights = random_weights(TINY, seed=0)
    batches = batches_of(ROWS, 4, pad_id=0)
    start = mean_loss(model, batches)
    train_in(tmp_path, model, state, ROWS, [], replace(PLAN, steps=30))
    assert mean_loss(model, batches) < 0.8 * start
    for name, site in model.sites.items():
        frozen = getattr(site, "base", site)  # of an adapted site, what stands beneath the adapter
        found = frozen.gain if hasattr(frozen, "gain") else frozen.weight.dense()
        expected = weights["model.embed_tokens.weight" if name == "lm_head" else f"{name}.weight"]
        assert found.tobytes() == expected.tobytes()


# --- Validation, the best, and patience ---


@settings(max_examples=50)
@given(
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, math.nan]), min_size=1, max_size=8),
    patience=st.integers(0, 3),
)
def test_training_stops_after_patience_without_gain_and_ends_as_at_the_best_validation(
    losses: list[float], patience: int
) -> None:
    """What overfits afterwards is thrown away."""
    at_validation: list[dict[str, bytes]] = []

    def scripted(model: Model, batches: Any) -> float:
        if batches is not VALID:
            return 1.0  # asked before a saving: is the loss still finite?
        at_validation.append(parameter_bytes(state))
        return losses[len(at_validation) - 1]

    best, best_loss, expected = -1, math.inf, len(losses)
    for i, loss in enumerate(losses):
        if loss < best_loss:
            best, best_loss = i, loss
        if patience and i - best >= patience:
            expected = i + 1
            break
    model, state = new_run()
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "mean_loss", scripted)
        plan = replace(PLAN, steps=len(losses), eval_every=1, patience=patience, save_every=0)
        train_in(Path(folder), model, state, ROWS, VALID, plan)
    assert state.step == len(at_validation) == expected
    assert (state.best_loss, state.best_step) == (best_loss, best + 1)
    assert parameter_bytes(state) == at_validation[best]  # the last ones if no loss was ever a number


@pytest.mark.parametrize(("eval_every", "expected"), [(0, []), (3, [3, 6, 8]), (4, [4, 8]), (20, [8])])
def test_validation_comes_every_so_many_steps_and_at_the_end(
    tmp_path: Path, eval_every: int, expected: list[int]
) -> None:
    trained(tmp_path, replace(PLAN, eval_every=eval_every))
    assert [line["step"] for line in read_metrics(tmp_path) if "valid_loss" in line] == expected
