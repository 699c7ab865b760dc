"""Evaluation: what drift and exact match count, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.allocated import peak_bytes
from support.strategies import TINY, VOCAB, batches, configs, random_weights, seeds

from minilora.data.batches import Batch, collate
from minilora.data.store import Example
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import HEAD
from minilora.runs import evaluation
from minilora.runs.evaluation import (
    AT_THE_SAME_TIME,
    answers,
    can_be_matched,
    differences,
    drift,
    exact_match,
    outside_text,
)
from minilora.runs.run import logits_at_once, other_text
from minilora.runs.settings import Settings
from minilora.training.parts import on_all_cores
from minilora.training.step import loss_and_gradients

few = settings(max_examples=40)


def model_of(config: Config, seed: int) -> Model:
    return base_model(config, random_weights(config, seed), np.float64)


def next_token_probabilities(model: Model, batch: Batch) -> np.ndarray:
    """(N, V), by the definition of softmax."""
    hidden, _, _ = forward(model, batch.tokens, batch.positions, batch.segments)
    e = np.exp(model.sites[HEAD].forward(hidden)[0])
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


# --- Drift: KL(base ‖ adapted) of the next token, as a mean over tokens ---


@few
@given(configs(), st.lists(batches(), min_size=1, max_size=2), seeds)
def test_drift_is_the_mean_over_tokens_of_the_divergence_of_the_adapted_distribution_from_the_base(
    config: Config, drawn: list[Batch], seed: int
) -> None:
    """Token by token, Σ p log(p/q) with p the base's distribution. Labels play no part; padding is no token."""
    base, adapted = model_of(config, seed), model_of(config, seed + 1)
    divergences = []
    for batch in drawn:
        p, q = next_token_probabilities(base, batch), next_token_probabilities(adapted, batch)
        for n, segment in enumerate(batch.segments.ravel()):
            if segment > 0:
                divergences.append(sum(p[n, v] * math.log(p[n, v] / q[n, v]) for v in range(VOCAB)))
    assert drift(base, adapted, drawn) == pytest.approx(sum(divergences) / len(divergences), rel=1e-10)


@few
@given(configs(), batches(), seeds)
def test_drift_is_never_negative_and_zero_from_a_model_to_itself(config: Config, batch: Batch, seed: int) -> None:
    base = model_of(config, seed)
    assert drift(base, base, [batch]) == 0
    assert drift(base, model_of(config, seed), [batch]) == 0
    assert drift(base, model_of(config, seed + 1), [batch]) > 0


def test_drift_has_a_direction_from_the_base_to_the_adapted_model() -> None:
    batch = Batch(*(np.array([[1, 2, 3]]) for _ in range(3)), segments=np.ones((1, 3), np.int64))
    base, adapted = model_of(TINY, 0), model_of(TINY, 1)
    p, q = next_token_probabilities(base, batch), next_token_probabilities(adapted, batch)
    forwards, backwards = (p * np.log(p / q)).sum() / 3, (q * np.log(q / p)).sum() / 3
    assert drift(base, adapted, [batch]) == pytest.approx(forwards, rel=1e-10)
    assert drift(adapted, base, [batch]) == pytest.approx(backwards, rel=1e-10)
    assert abs(forwards - backwards) > 1e-3 * forwards


@few
@given(configs(), batches(), st.integers(1, 4), st.integers(0, VOCAB - 1), seeds)
def test_padding_does_not_count_as_drift(config: Config, batch: Batch, extra: int, pad_id: int, seed: int) -> None:
    base, adapted = model_of(config, seed), model_of(config, seed + 1)
    fillers = {"tokens": pad_id, "labels": -100, "positions": 0, "segments": 0}
    padded = Batch(
        **{
            name: np.pad(array, ((0, 0), (0, extra)), constant_values=fillers[name])
            for name, array in batch._asdict().items()
        }
    )
    assert drift(base, adapted, [padded]) == pytest.approx(drift(base, adapted, [batch]), rel=1e-10)


@few
@given(configs(), batches(), st.integers(1, 5), seeds)
def test_the_drift_in_chunks_is_the_drift_at_once(config: Config, batch: Batch, chunk: int, seed: int) -> None:
    base, adapted = model_of(config, seed), model_of(config, seed + 1)
    at_once = drift(base, adapted, [batch], chunk=10**6)
    assert drift(base, adapted, [batch], chunk) == pytest.approx(at_once, rel=1e-12)


def test_a_drift_without_bounds_is_finite_for_logits_of_any_size() -> None:
    """Where a probability rounds to 0, its logarithm is still finite, because it is never taken of the probability."""
    weights = random_weights(TINY, 0)
    weights["model.norm.weight"] = 1e4 * weights["model.norm.weight"]
    extreme = base_model(TINY, weights, np.float64)
    batch = Batch(*(np.array([[1, 2, 3]]) for _ in range(3)), segments=np.ones((1, 3), np.int64))
    assert 0 < drift(model_of(TINY, 1), extreme, [batch]) < math.inf


@pytest.mark.parametrize("chunk", [1, 512])
def test_the_largest_difference_of_logits_is_of_all_real_tokens_and_whatever_its_sign(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Logits with a pencil: of four tokens the last one is padding, and the largest of all is below zero."""
    logits = {"merged": [[1.0, -7.0], [2.0, 0.0], [3.0, 1.0], [90.0, 0.0]]}
    logits["adapted"] = [[1.5, -7.0], [2.0, 0.0], [0.75, 1.0], [0.0, 99.0]]

    def model_with(name: str) -> Any:
        head = SimpleNamespace(forward=lambda rows: (np.array(logits[name])[rows], None))
        return SimpleNamespace(sites={HEAD: head})

    monkeypatch.setattr(evaluation, "hidden_states", lambda model, batch: np.arange(4))
    batch: Any = SimpleNamespace(segments=np.array([[1, 1], [2, 0]]))
    (found,), largest = differences(model_with("merged"), [model_with("adapted")], [batch], chunk)
    assert (found.logit, largest) == (2.25, 7.0)


@few
@given(configs(), batches(), st.integers(1, 5), seeds)
def test_several_models_compared_at_once_are_as_they_are_one_by_one(
    config: Config, batch: Batch, chunk: int, seed: int
) -> None:
    model, *others = (model_of(config, seed + i) for i in range(3))
    together, largest = differences(model, others, [batch], chunk)
    for found, other in zip(together, others, strict=True):
        assert found.kl == pytest.approx(drift(model, other, [batch]), rel=1e-12)
        assert ([found], largest) == differences(model, [other], [batch], chunk)


def test_the_largest_difference_of_logits_that_are_no_numbers_is_none() -> None:
    batch = Batch(*(np.array([[1, 2, 3]]) for _ in range(3)), segments=np.ones((1, 3), np.int64))
    weights = random_weights(TINY, 0)
    weights["model.norm.weight"] = np.nan * weights["model.norm.weight"]
    (found,), _ = differences(model_of(TINY, 0), [base_model(TINY, weights, np.float64)], [batch], 1)
    assert math.isnan(found.logit)


# --- Memory ---


@pytest.mark.parametrize("labels", [1, 5, 30])
def test_judging_takes_no_more_memory_than_a_training_step(monkeypatch: pytest.MonkeyPatch, labels: int) -> None:
    """Of a model whose vocabulary is much larger than its width, whether few or many tokens of a step are trained."""
    monkeypatch.setattr("minilora.training.parts.cores", lambda: 1)
    config = replace(TINY, vocab_size=30_000)
    base = base_model(config, random_weights(config, 0), np.float32)
    method = LoRA(rank=2).for_model(config, lambda text: [])
    adapted = method.attach(base, method.start(base, np.random.default_rng(0), "float32"))
    rows = [[Example([*range(32)], [i >= 32 - labels for i in range(32)])] for _ in range(4)]
    batch = collate(rows, 0)
    figures = {"train": {"tokens": 4 * 32, "labels": 4 * labels}}
    run: Any = SimpleNamespace(
        task=SimpleNamespace(rows=rows, figures=figures), settings=Settings(batch_size=4), tokenizer=Letters(),
        state=SimpleNamespace(tokens=10**6), base=base, adapted=adapted,
    )  # fmt: skip
    letters: Any = Letters()
    text = [Batch(*(array % 30_000 for array in batch)) for batch in other_text(run)]
    chunk = max(1, logits_at_once(run) // AT_THE_SAME_TIME)
    asked = rows_of(["ab"] * 80)
    training = peak_bytes(lambda: loss_and_gradients(adapted, [batch], run=on_all_cores))
    assert peak_bytes(lambda: drift(base, adapted, text[:2], chunk)) <= training
    assert peak_bytes(lambda: answers(adapted, letters, asked, min(64, logits_at_once(run)))) <= training
    assert peak_bytes(lambda: drift(base, adapted, text[:2], chunk=128)) > training or labels == 30


@pytest.mark.parametrize(("read", "texts"), [(0, 1), (300, 2), (2047, 15), (2048, 16), (10**9, 16)])
def test_the_drift_is_of_no_more_tokens_than_training_has_read_and_of_one_text_at_least(read: int, texts: int) -> None:
    """It depends on counts only. A batch has no more tokens than a micro-batch of training, but one text at least."""
    for batch_size, at_once in ((1, 1), (8, 2), (1000, 16)):
        run: Any = SimpleNamespace(
            task=SimpleNamespace(rows=[[]] * 100, figures={"train": {"tokens": 4_000, "labels": 1_000}}),
            settings=Settings(batch_size=batch_size), tokenizer=Letters(), state=SimpleNamespace(tokens=read),
        )  # fmt: skip
        found = other_text(run)
        assert sum(len(batch.tokens) for batch in found) == texts
        assert max(len(batch.tokens) for batch in found) == min(texts, at_once)


# --- Exact match ---


def rows_of(completions: Sequence[str]) -> list[dict[str, Any]]:
    return [{"prompt": "?", "completion": completion} for completion in completions]


@given(st.lists(st.tuples(st.sampled_from(["a", "ab", "B a"]), st.booleans()), min_size=1))
def test_exact_match_is_the_share_of_answers_equal_to_their_completion(drawn: list[tuple[str, bool]]) -> None:
    completions = [completion for completion, _ in drawn]
    found = [completion if right else completion + "!" for completion, right in drawn]
    assert exact_match(found, rows_of(completions)) == sum(right for _, right in drawn) / len(drawn)


def test_exact_match_passes_over_white_space_at_the_ends_and_nothing_else() -> None:
    assert exact_match([" a b\n"], rows_of(["a b "])) == 1
    for other in ("a  b", "A b", "a b.", "a", ""):
        assert exact_match([other], rows_of(["a b"])) == 0


def test_exact_match_wants_one_answer_for_each_row() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], rows_of(["a", "b"]))


def test_only_rows_that_ask_something_and_have_one_answer_in_words_can_be_matched() -> None:
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    assert can_be_matched(rows_of(["a", "b"]))
    assert can_be_matched([{"messages": [asked, answer]}, {"prompt": [asked], "completion": [answer]}])
    for rows in (
        [{"messages": [asked, answer, asked]}],
        [{"messages": [answer]}],
        [{"messages": [asked, call]}],
        [],
        [{"prompt": "a"}],
        [{"completion": "a"}],
        [{"messages": []}],
        [{"prompt": "a", "completion": [1]}],
    ):
        assert not can_be_matched(rows)
    assert not can_be_matched([*rows_of(["a"]), {"text": "b"}])


class Letters:
    """A tokenizer whose tokens are the numbers of characters."""

    pad_id = 0
    stop_ids = frozenset([0])

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        return [1, *ids]


@pytest.mark.parametrize(("longest", "asked_for"), [(1, 9), (7, 15), (127, 135), (128, 136), (500, 136)])
def test_an_answer_that_goes_on_beyond_the_longest_right_one_is_seen_to_do_so(
    monkeypatch: pytest.MonkeyPatch, longest: int, asked_for: int
) -> None:
    """Eight tokens more than the longest has are asked for, in which it may end; beyond 128 nothing more is."""
    letters: Any = Letters()
    rows = rows_of(["a" * longest, "a"])

    def endless(model: Any, prompts: Sequence[Any], max_tokens: int, stop_ids: frozenset[int]) -> list[list[int]]:
        assert list(prompts) == [[1, ord("?")]] * 2 and stop_ids == {0}
        return [[ord("a")] * max_tokens for _ in prompts]

    monkeypatch.setattr(evaluation, "complete", endless)
    model: Any = None
    texts = answers(model, letters, rows)
    assert texts == ["a" * asked_for + "…"] * 2
    assert exact_match(texts, rows) == 0


# --- Text outside the task ---


@given(texts=st.integers(1, 40), length=st.integers(2, 200))
@settings(max_examples=10)
def test_outside_text_is_the_beginnings_of_as_many_texts_as_asked_for_and_the_same_each_time(
    texts: int, length: int
) -> None:
    tokenizer: Any = Letters()
    (batch,) = outside_text(tokenizer, texts, length)
    (again,) = outside_text(tokenizer, texts, length)
    assert all(np.array_equal(one, other) for one, other in zip(batch, again, strict=True))
    assert batch.tokens.shape[0] == texts
    assert batch.tokens.shape[1] <= length
    assert (batch.tokens[:, 0] == 1).all()
    real = batch.segments > 0
    assert (batch.tokens[~real] == tokenizer.pad_id).all()
    assert real[:, :2].all()
    written = {"".join(map(chr, row[1:][here[1:]])) for row, here in zip(batch.tokens, real, strict=True)}
    assert length < 30 or len(written) == texts, "the texts are different ones"


def test_the_texts_are_spread_over_the_whole_language_reference() -> None:
    """Their titles stand at equal steps through the alphabet: the first ones alone are all of a kind."""
    tokenizer: Any = Letters()
    (batch,) = outside_text(tokenizer, texts=16, length=60)
    titles = sorted(topics)
    step = len(titles) // 16
    assert [row[1:][row[1:] > 0].tolist() for row in batch.tokens] == [
        tokenizer.encode(topics[titles[i * step]])[:59] for i in range(16)
    ]


def test_outside_text_reads_as_english() -> None:
    tokenizer: Any = Letters()
    (batch,) = outside_text(tokenizer)
    text = "".join(map(chr, batch.tokens[batch.segments > 0]))
    assert batch.tokens.shape == (16, 128)
    assert all(f" {word} " in text for word in ("the", "a", "of", "is"))
