"""A run outlives being killed: resumed, it leads to the same bytes; and a run that diverges ends well."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_runs import (
    PLAN,
    ROWS,
    VALID,
    few,
    methods,
    new_run,
    no_progress_bars,  # noqa: F401
    outcome,
    trained,
)

from minilora.data.batches import batches_of, count_labels
from minilora.runs import folder as folder_module
from minilora.runs import state_file as state_module
from minilora.runs.folder import train_in
from minilora.runs.metrics import METRICS_FILE, MetricsFile, read_metrics
from minilora.runs.state_file import STATE_FILE, load_state
from minilora.training import loop
from minilora.training.loop import Diverged, Plan
from minilora.training.schedules import learning_rate
from minilora.training.step import loss_and_gradients, mean_loss

# --- Killed and resumed ---


class Killed(BaseException):
    """The process ends here."""


def killed_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, until its process is killed at the start of one of its calls."""
    calls = itertools.count(1)

    def dying(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*args, **options)

    return dying


PLACES = {
    "before the gradients": (loop, "loss_and_gradients"),
    "before the update": (loop, "clip_gradients"),
    "after the update": (MetricsFile, "write"),
    "before validation": (loop, "mean_loss"),
    "before saving": (folder_module, "save_state"),
    "while saving": (state_module, "write_safetensors"),
}


plans = st.builds(
    replace,
    st.just(PLAN),
    eval_every=st.integers(0, 3),
    patience=st.integers(0, 2),
    save_every=st.integers(0, 4),
    activation_checkpointing=st.booleans(),
)


@settings(max_examples=40)
@given(
    plan=plans,
    options=methods,
    kills=st.lists(st.tuples(st.sampled_from(sorted(PLACES)), st.integers(1, 10)), min_size=1, max_size=3),
)
def test_killed_anywhere_and_resumed_equals_uninterrupted_to_the_last_bit(
    plan: Plan, options: dict[str, Any], kills: list[tuple[str, int]]
) -> None:
    with TemporaryDirectory() as whole, TemporaryDirectory() as cut:
        expected = outcome(trained(Path(whole), plan, **options), Path(whole))
        for place, call in kills:
            module, name = PLACES[place]
            with pytest.MonkeyPatch.context() as patch, suppress(Killed):
                patch.setattr(module, name, killed_at(call, getattr(module, name)))
                trained(Path(cut), plan, **options)
            with (Path(cut) / METRICS_FILE).open("a") as file:
                file.write('{"step": 3, "lo')
        assert outcome(trained(Path(cut), plan, **options), Path(cut)) == expected


@few
@given(save_every=st.integers(1, 4), data=st.data())
def test_every_saved_state_leads_to_the_same_end(save_every: int, data: st.DataObject) -> None:
    plan = replace(PLAN, save_every=save_every)
    saved: list[bytes] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        model, state = new_run(dropout=0.3)
        train_in(folder, model, state, ROWS, VALID, plan, 0, lambda _: saved.append((folder / STATE_FILE).read_bytes()))
        assert len(saved) == 1 + plan.steps // save_every + 1  # at the start, in between, at the end
        expected = outcome(state, folder)
        (folder / STATE_FILE).write_bytes(data.draw(st.sampled_from(saved), label="one of the saved states"))
        assert outcome(trained(folder, plan, dropout=0.3), folder) == expected


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        load_state(new_run()[1], tmp_path)
    trained(tmp_path)
    _, other = new_run()
    other.made_from["data"] = "other rows"
    with pytest.raises(ValueError, match="the data has changed"):
        load_state(other, tmp_path)
    with pytest.raises(ValueError, match="the data has changed"):
        load_state(new_run(ROWS[1:])[1], tmp_path)
    with pytest.raises(ValueError, match=r"trainable\.model\.embed_tokens\.weight is missing, unknown, or has"):
        load_state(new_run(method="full")[1], tmp_path)


# --- Metrics ---


def test_metrics_hold_one_line_for_each_step_with_what_happened_in_it(tmp_path: Path) -> None:
    state = trained(tmp_path)
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, PLAN.steps + 1))
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3]  # 9 rows, 4 a step
    assert [line["learning_rate"] for line in lines] == [learning_rate(k, 8, 0.05, "cosine", 2) for k in range(8)]
    assert sum(line["tokens"] for line in lines) == state.tokens
    an_epoch = sum(count_labels(batch) for batch in batches_of(ROWS, 1, pad_id=0))
    assert sum(line["labelled_tokens"] for line in lines[:3]) == an_epoch
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_on_resuming_lines_of_steps_to_be_run_again_are_dropped_and_a_torn_last_line_too(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    whole = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3, 4))
    (tmp_path / METRICS_FILE).write_text(whole + '{"step": 5, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    metrics = MetricsFile(tmp_path, step=2)
    metrics.write(step=3, loss=0.25)
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]


# --- Divergence ---


@pytest.mark.parametrize("sick", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_training_and_the_last_saved_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sick: str
) -> None:
    model, state = new_run()
    saved: list[bytes] = []
    calls = itertools.count(1)

    def sickening(*args: Any, **options: Any) -> Any:
        loss, gradients = loss_and_gradients(*args, **options)
        if next(calls) == 6:
            if sick == "loss":
                return math.inf, gradients
            gradients["model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = math.nan
        return loss, gradients

    monkeypatch.setattr(loop, "loss_and_gradients", sickening)
    with pytest.raises(Diverged, match=r"^step 6: .* keeps the last good state"):
        train_in(tmp_path, model, state, ROWS, VALID, PLAN, 0, lambda _: saved.append(_state_file(tmp_path)))
    assert _state_file(tmp_path) == saved[-1] and len(saved) == 2  # of steps 0 and 3
    assert state.step == 5 and all(np.isfinite(p).all() for p in state.trainable.values())


def _state_file(folder: Path) -> bytes:
    return (folder / STATE_FILE).read_bytes()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_rate_that_is_far_too_high_is_noticed(tmp_path: Path) -> None:
    model, state = new_run(optimizer="sgd")
    with pytest.raises(Diverged, match="the loss is"):
        train_in(tmp_path, model, state, ROWS, VALID, replace(PLAN, learning_rate=1e200, max_grad_norm=0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_state_that_a_divergence_leaves_is_one_with_a_finite_loss(tmp_path: Path) -> None:
    model, state = new_run(optimizer="sgd")
    plan = replace(PLAN, learning_rate=1e200, warmup=0, max_grad_norm=0, save_every=1)
    with pytest.raises(Diverged):
        train_in(tmp_path, model, state, ROWS, VALID, plan)
    saved_model, saved_state = new_run(optimizer="sgd")
    load_state(saved_state, tmp_path)
    assert math.isfinite(mean_loss(saved_model, batches_of(ROWS, 4, pad_id=0)))
