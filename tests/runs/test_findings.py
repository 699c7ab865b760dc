"""What a run finds out about itself for its page: each figure is the one that other functions give, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import read
from support.strategies import batches, configs, random_weights, seeds

from minilora.data.batches import Batch
from minilora.methods.full import full_model
from minilora.methods.method import known_methods
from minilora.model.config import Config
from minilora.runs import findings as finding
from minilora.runs.evaluation import drift, drift_of_tokens, losses_of_tokens
from minilora.runs.findings import findings, part_of, ranks_to_try
from minilora.runs.run import Judgement, prepare
from minilora.runs.settings import read_settings
from minilora.runs.state_file import load_state
from minilora.training.step import labelled_tokens, mean_loss

few = settings(max_examples=25)
Train = Callable[..., Path]


def real_tokens(batches: list[Batch]) -> int:
    return sum(int((batch.segments > 0).sum()) for batch in batches)


def unpadded(batches: list[Batch]) -> list[list[Any]]:
    """The rows of the batches, their arrays without padding."""
    return [
        [array[i][batch.segments[i] > 0].tolist() for array in batch]
        for batch in batches
        for i in range(len(batch.tokens))
    ]


# --- Token by token ---


@few
@given(config=configs(), batch=batches(), seed=seeds)
def test_the_losses_of_the_labelled_tokens_have_the_mean_loss(config: Config, batch: Batch, seed: int) -> None:
    model = full_model(config, random_weights(config, seed))
    losses = losses_of_tokens(model, batch, chunk=2)
    assert np.isfinite(losses).sum() == labelled_tokens([batch])
    assert (np.isfinite(losses) == (batch.labels != -100)).all()
    assert np.nanmean(losses) == pytest.approx(mean_loss(model, [batch]), rel=1e-9)


@few
@given(config=configs(), batch=batches(), seed=seeds)
def test_the_drift_of_tokens_has_the_drift_as_its_mean(config: Config, batch: Batch, seed: int) -> None:
    base, adapted = (full_model(config, random_weights(config, seed + i)) for i in range(2))
    drifts = drift_of_tokens(base, adapted, batch, chunk=2)
    assert len(drifts) == real_tokens([batch]) and (drifts >= -1e-12).all()
    assert drifts.mean() == pytest.approx(drift(base, adapted, [batch]), rel=1e-9)


# --- The budget ---


@given(st.lists(batches(), min_size=1, max_size=4), st.integers(1, 60))
def test_part_of_the_batches_has_at_most_so_many_tokens_and_whole_rows(drawn: list[Batch], most: int) -> None:
    part = part_of(drawn, most)
    rows, chosen = unpadded(drawn), unpadded(part)
    assert chosen and all(row in rows for row in chosen)
    assert real_tokens(part) <= most or len(chosen) == 1
    if most >= real_tokens(drawn):
        assert real_tokens(part) == real_tokens(drawn)


@given(st.integers(1, 5000))
def test_few_ranks_are_all_tried_and_of_many_powers_of_two(largest: int) -> None:
    ranks = ranks_to_try(largest)
    assert ranks[0] == 1 and ranks[-1] == largest and ranks == sorted({*ranks})
    if largest <= 8:
        assert ranks == [*range(1, largest + 1)]
    else:
        assert all(math.log2(rank).is_integer() for rank in ranks[:-1]) and 2 * ranks[-2] >= largest


# --- A whole run ---


@pytest.fixture
def look(train: Train) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A run as it is at its end, and what it has found."""

    def look(*flags: object, data: str = "parts") -> tuple[Any, dict[str, Any]]:
        folder = train(data, "--learning-rate", 0.02, *flags)
        run = prepare(read_settings(folder), folder)
        load_state(run.state, folder)
        for name, array in run.state.best.items():
            run.state.trainable[name][...] = array
        return run, read(folder / "report.json")

    return look


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_all_of_the_change_has_the_adapted_loss_and_less_of_it_other_losses(look: Any, method: str) -> None:
    run, found = look("--method", method)
    less = found["less"]
    assert (less["rows"], less["tokens"]) == (less["all_rows"], real_tokens(run.task.held_out)), "it has few rows"
    by_rank = {point["rank"]: point["loss"] for point in less["ranks"]}
    by_scale = {point["scale"]: point["loss"] for point in less["scales"]}
    assert [*by_scale] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    adapted = mean_loss(run.adapted, run.task.held_out)
    assert by_scale[1.0] == by_rank[max(by_rank)] == pytest.approx(adapted, rel=1e-5)
    if method != "full":  # whose norms and embedding stay as they were trained
        assert by_scale[0.0] == pytest.approx(mean_loss(run.base, run.task.held_out), rel=1e-5)
    assert len({*by_rank.values(), *by_scale.values()}) > 6


def test_the_budget_is_a_share_of_the_tokens_trained_on(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = look()
    run.state.tokens = 10_000
    used: list[int] = []

    def counted(model: Any, batches: list[Batch]) -> float:
        used.append(real_tokens(batches))
        return mean_loss(model, batches)

    monkeypatch.setattr(finding, "mean_loss", counted)
    monkeypatch.setattr(finding, "LEAST", 100)
    monkeypatch.setattr(finding, "SHARE", 0.03)
    findings(run, Judgement(1.0, None, []), Judgement(1.0, None, []))
    assert len(used) == 14 and 100 < sum(used) <= 300


def test_of_a_large_model_fewer_tokens_are_read_at_any_rate(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = look()
    run.state.tokens = 0
    assert finding.budget(run) == finding.LEAST
    monkeypatch.setattr(finding, "SMALL", finding.parameter_count(run.adapted.config) / 100)
    assert finding.budget(run) == finding.LEAST // 100
    run.state.tokens = 10**6
    assert finding.budget(run) == finding.SHARE * 10**6


def test_held_out_rows_have_their_losses_at_their_own_tokens(look: Any) -> None:
    run, found = look(data="pairs.jsonl")
    (batch, *_) = run.task.held_out
    row = found["tokens"][0]
    tokens = batch.tokens[0][: len(row["pieces"])].tolist()
    assert row["pieces"] == [run.tokenizer.piece(token) for token in tokens]
    losses = losses_of_tokens(run.adapted, Batch(*(array[:1] for array in batch)))[0]
    assert row["now"][0] is None
    for place, value in enumerate(row["now"][1:]):
        assert value == (pytest.approx(losses[place], rel=1e-4) if batch.labels[0][place] != -100 else None)
    assert row["before"] != row["now"]


def test_the_farthest_tokens_of_other_texts_are_explained(look: Any) -> None:
    _, found = look("--steps", 20)
    examples, texts = found["drift"]["examples"], found["drift"]["texts"]
    largest = sorted((kl for text in texts for kl in text["drift"] if kl is not None), reverse=True)
    assert [example["drift"] for example in examples] == largest[: len(examples)]
    for example in examples:
        assert example["context"] and example["next"]
        for expected in (example["base"], example["adapted"]):
            shares = [p for _, p in expected]
            assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-6
        assert example["base"] != example["adapted"]


def test_answers_are_counted_by_what_became_of_them() -> None:
    rows = [{"prompt": str(n), "completion": "yes"} for n in range(7)]
    run: Any = SimpleNamespace(task=SimpleNamespace(held_out_rows=rows))
    before, after = ["yes", "yes", "no", "no", "no", "yes", "no"], [" yes", "no", "yes ", "yes", "yes", "yes", "nay"]
    found = finding.answers_side_by_side(run, Judgement(1.0, 0.5, before), Judgement(1.0, 0.5, after))
    assert found["counts"] == {"kept": 2, "gained": 3, "lost": 1, "wrong": 1}
    assert [row["now"] for row in found["rows"]] == after
    assert found["rows"][0] == {
        "asked": "0", "right": "yes", "before": "yes", "now": " yes", "was_right": True, "is_right": True,
    }  # fmt: skip


def test_without_inspection_only_what_is_known_anyway_is_kept(look: Any) -> None:
    _, found = look("--inspect", "no", data="pairs.jsonl")
    assert found.keys() == {"finished", "model", "answers"} and found["answers"]["rows"]


@pytest.mark.parametrize("method", known_methods())
def test_every_method_is_looked_into(look: Any, method: str) -> None:
    _, found = look("--method", method, "--untie", "yes")
    assert found["tokens"] and found["drift"]["texts"]
    if method in ("bottleneck", "prefix", "prompt", "bitfit"):
        assert found["changes"] == found["less"] == {}
    else:
        assert found["changes"] and all(change["ratio"] > 0 for change in found["changes"].values())
        assert found["less"]["ranks"]
