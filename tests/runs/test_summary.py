"""`summary.json` and the plan of a run: each figure is the one that its name says; distinct ones go in."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minilora.runs import run as running
from minilora.runs.run import Judgement, default_max_length, judge, make_plan, summarize
from minilora.runs.settings import make_settings

TASK = SimpleNamespace(rows=[[]] * 9, figures={"train": {"examples": 9, "tokens": 900, "labels": 90}})
TEXT = [SimpleNamespace(segments=np.array([[1, 1, 0], [1, 1, 1]])), SimpleNamespace(segments=np.array([[1]]))]


def fake_run(**others: Any) -> Any:
    """A run whose figures all differ."""
    state = SimpleNamespace(
        trainable={"A": np.zeros((3, 5)), "B": np.zeros(7)}, best={"A": np.zeros(1)}, step=40, best_step=30,
        best_loss=0.75, tokens=1000, seconds=16.004, made_from={"base model": "digest of the base"},
    )  # fmt: skip
    run = {
        "state": state, "folder": "folder", "settings": make_settings({}), "tokenizer": "words", "adapted": "adapted",
        "base": SimpleNamespace(config="config"), "task": TASK,
    }  # fmt: skip
    return SimpleNamespace(**run | others)


def summary(monkeypatch: pytest.MonkeyPatch, run: Any) -> dict[str, Any]:
    def advise(metrics: Any, settings: Any, before: float, after: float) -> list[str]:
        return [f"{metrics}: from {before} to {after}"]

    def drift(base: Any, adapted: Any, text: Any, chunk: int) -> float:
        assert text is TEXT and chunk == 26  # of 8 rows with 10 labels each
        return {("base", "adapted"): 0.125}[base.name, adapted]

    monkeypatch.setattr(running, "drift", drift)
    monkeypatch.setattr(
        running, "outside_text", lambda tokenizer, texts, at_once: {("words", 7, 6): TEXT}[tokenizer, texts, at_once]
    )
    monkeypatch.setattr(running, "parameter_count", lambda config: {"config": 90_000}[config])
    monkeypatch.setattr(running, "peak_memory_bytes", lambda: 4_000)
    monkeypatch.setattr(running, "read_metrics", lambda folder: f"metrics of {folder}")
    monkeypatch.setattr(running, "advise", advise)
    monkeypatch.setattr("minilora.runs.run.time.perf_counter", lambda: 150.0)
    run.base.name = "base"
    return summarize(run, Judgement(2.5, 0.1, []), Judgement(1.25, 0.6, []), started=128.004)


def test_each_figure_of_the_summary_is_the_one_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed is that of training alone, without loading and judging."""
    assert summary(monkeypatch, fake_run()) == {
        "base_fingerprint": "digest of the base",
        "base_loss": 2.5, "adapted_loss": 1.25, "base_exact_match": 0.1, "adapted_exact_match": 0.6, "drift_kl": 0.125,
        "drift_tokens": 6,
        "data": TASK.figures, "trainable_parameters": 22, "total_parameters": 90_000, "steps": 40,
        "best_step": 30, "best_valid_loss": 0.75, "tokens": 1000, "tokens_per_second": 62.5, "training_seconds": 16.0,
        "seconds": 22.0, "peak_memory_bytes": 4_000, "advice": ["metrics of folder: from 2.5 to 1.25"],
    }  # fmt: skip


def test_without_validation_there_is_no_best_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run()
    run.state.best = {}
    assert summary(monkeypatch, run)["best_valid_loss"] is None


def test_a_model_is_judged_by_all_held_out_batches_and_the_first_rows_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"prompt": str(n), "completion": "right"} for n in range(5)]
    task = SimpleNamespace(held_out=["a batch", "another"], held_out_rows=rows, **vars(TASK))
    run = fake_run(task=task, settings=make_settings({"eval_rows": 4}))
    monkeypatch.setattr(running, "mean_loss", lambda model, batches: {"model": 0.5}[model] * len(batches))

    def answers(model: Any, tokenizer: Any, asked: Any, at_once: int, on_batch: Any) -> list[str]:
        assert at_once == 64  # training has 80 rows of logits at once
        return ["right" if row["prompt"] == "1" else "wrong" for row in asked]

    monkeypatch.setattr(running, "answers", answers)
    model: Any = "model"
    assert judge(run, model) == Judgement(1.0, 0.25, ["wrong", "right", "wrong", "wrong"])
    run.task = SimpleNamespace(held_out=[], held_out_rows=[{"text": "no answer"}])
    without = judge(run, model)
    assert math.isnan(without.loss) and without.exact_match is None and without.answers == []


@pytest.mark.parametrize(
    ("given", "steps", "warmup", "eval_every"),
    [
        ({"epochs": 2.0}, 14, 2, 2),  # 20 rows in steps of 3 are 7 an epoch; of 14 steps 0.1 are 1.4
        ({"epochs": 1.5}, 11, 2, 2),
        ({"steps": 31}, 31, 5, 4),
        ({"steps": 31, "eval_every": 7, "warmup": 9.0}, 31, 9, 7),
        ({"steps": 3, "warmup": 0.0}, 3, 0, 1),
        ({"epochs": 1.0, "grad_accumulation": 2}, 4, 1, 1),
    ],
)
def test_a_plan_has_steps_where_the_settings_have_epochs_and_shares(
    given: dict[str, Any], steps: int, warmup: int, eval_every: int
) -> None:
    usual = {"batch_size": 3, "grad_accumulation": 1, "warmup": 0.15}
    own = {
        "learning_rate": 0.25, "schedule": "linear", "max_grad_norm": 0.5, "activation_checkpointing": True,
        "patience": 6, "save_every": 8,
    }  # fmt: skip
    task: Any = SimpleNamespace(rows=[[]] * 20)
    plan = make_plan(make_settings(usual | own | given), task)
    assert (plan.steps, plan.warmup, plan.eval_every) == (steps, warmup, eval_every)
    assert {name: getattr(plan, name) for name in own} == own
    assert (plan.batch_size, plan.grad_accumulation) == (3, given.get("grad_accumulation", 1))


def test_rows_are_as_long_as_the_context_leaves_room_for_and_at_most_1024_tokens() -> None:
    for context, virtual, most in ((64, 0, 64), (64, 20, 44), (1024, 0, 1024), (4096, 20, 1024), (1040, 20, 1020)):
        model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context), virtual_tokens=virtual)
        assert default_max_length(model) == most
