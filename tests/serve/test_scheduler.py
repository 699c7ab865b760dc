"""The scheduler: one batch for all, in which every row gets what it would get alone, whoever comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.served import NAMES, Library

from minilora.model.decoding import Decoder
from minilora.model.generation import Choose, greedy, sampler
from minilora.model.model import Model, forward
from minilora.model.names import HEAD
from minilora.serve import scheduler as scheduler_module
from minilora.serve.answer import chance
from minilora.serve.scheduler import QueueFull, Row, Scheduler

PROMPTS = ("one and", "two or three or four", "six", "four are odd and even and odd")


@dataclass
class Heard:
    """What a row is told."""

    row: Row
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    failed: list[Exception] = field(default_factory=list)


def row(library: Library, name: str, prompt: str, count: int, choose: Choose = greedy) -> Heard:
    """A row that ends after `count` tokens."""

    def hear(token: int, logits: np.ndarray) -> bool:
        heard.tokens.append(token)
        heard.logprobs.append(chance(token, logits, 0, 0).logprob)
        return len(heard.tokens) < count

    waiting = Row(
        library.models[name], library.tokenizer.encode(prompt), choose, hear, lambda e: heard.failed.append(e)
    )
    heard = Heard(waiting)
    return heard


def finish(scheduler: Scheduler) -> None:
    for _ in range(1000):
        if not (scheduler.waiting or scheduler.running):
            return
        scheduler.step()
    raise AssertionError("it does not end")


def answered(library: Library, *args: Any) -> Heard:
    """The row by itself."""
    heard, scheduler = row(library, *args), Scheduler(1, 1)
    scheduler.submit([heard.row])
    finish(scheduler)
    return heard


def chances(model: Model, prompt: list[int], answer: list[int]) -> list[float]:
    """The log-probability of each token of the answer, by one forward of the whole text."""
    tokens = np.array([prompt + answer])
    hidden, _, _ = forward(model, tokens, np.arange(tokens.size)[None], np.ones_like(tokens), keep=False)
    logits, _ = model.sites[HEAD].forward(hidden[len(prompt) - 1 : -1])
    return [chance(token, each, 0, 0).logprob for token, each in zip(answer, logits, strict=True)]


asked = st.tuples(st.sampled_from(NAMES), st.sampled_from(PROMPTS), st.integers(1, 8))


@settings(max_examples=30)
@given(data=st.data(), most=st.integers(1, 5), drawn=st.booleans())
def test_each_row_gets_the_tokens_and_probabilities_that_it_gets_alone(
    library: Library, data: st.DataObject, most: int, drawn: bool
) -> None:
    """Whatever adapters its neighbours use, and whenever they come and leave. Draws have a generator for each row."""

    def choose(seed: int) -> Choose:
        return sampler(1.5, 0, 0.9, np.random.default_rng(seed)) if drawn else greedy

    scheduler, everybody = Scheduler(most, 100), []
    for _ in range(data.draw(st.integers(1, 6))):
        new = [(*each, len(everybody) + i) for i, each in enumerate(data.draw(st.lists(asked, max_size=3)))]
        everybody += [(each, row(library, *each[:3], choose(each[3]))) for each in new]
        scheduler.submit([heard.row for _, heard in everybody[len(everybody) - len(new) :]])
        for _ in range(data.draw(st.integers(0, 3))):
            scheduler.step()
        assert scheduler.running <= most
        if everybody and data.draw(st.booleans()):
            scheduler.leave([data.draw(st.sampled_from(everybody))[1].row])
    finish(scheduler)
    for (name, prompt, count, seed), heard in everybody:
        expected = answered(library, name, prompt, count, choose(seed))
        told = len(heard.tokens)
        assert told == count or heard.row.gone
        assert heard.tokens == expected.tokens[:told] and not heard.failed
        np.testing.assert_allclose(heard.logprobs, expected.logprobs[:told], atol=1e-4)
        whole = chances(library.models[name], heard.row.text[: -told or None], heard.tokens)
        np.testing.assert_allclose(heard.logprobs, whole, atol=1e-4)
        if not drawn:
            greedily = library.tokens_alone(name, prompt, count)
            assert heard.tokens[: len(greedily)] == greedily[:told]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of what is computed: (rows, 1) for a batch, (1, T) for a prompt."""
    seen: list[tuple[int, int]] = []
    read = scheduler_module.read

    def reading(model: Any, tokens: Any, *rest: Any) -> Any:
        seen.append((1, len(tokens)))
        return read(model, tokens, *rest)

    class Recording(Decoder):
        def step(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            seen.append((len(tokens), 1))
            return super().step(tokens, positions)

    monkeypatch.setattr(scheduler_module, "read", reading)
    monkeypatch.setattr(scheduler_module, "Decoder", Recording)
    return seen


def test_those_who_arrive_together_are_one_batch_with_different_adapters(
    library: Library, shapes: list[tuple[int, int]]
) -> None:
    scheduler = Scheduler(8, 8)
    scheduler.submit([row(library, name, "six", 4).row for name in NAMES])
    finish(scheduler)
    length = len(library.tokenizer.encode("six"))
    assert shapes == [(1, length)] * len(NAMES) + [(len(NAMES), 1)] * 3


def test_a_long_prompt_is_read_in_parts_between_which_the_others_go_on(
    library: Library, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "READ_AT_ONCE", 10)
    scheduler = Scheduler(4, 4)
    first, long = row(library, "a", "six", 12), row(library, "p", "one and two " * 12, 2)
    scheduler.submit([first.row])
    scheduler.step()
    scheduler.submit([long.row])
    shapes.clear()
    finish(scheduler)
    parts = [tokens for rows, tokens in shapes if tokens > 1]
    assert len(parts) >= 3 and max(parts) == 10
    assert [rows for rows, tokens in shapes if tokens == 1].count(1) >= len(parts), "a token after each part"
    assert long.tokens == answered(library, "p", "one and two " * 12, 2).tokens


def test_who_is_gone_frees_a_place_in_the_batch_in_the_queue_and_while_it_is_read(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "READ_AT_ONCE", 2)
    scheduler = Scheduler(1, 2)
    running, read, waiting, last = (row(library, "a", "six and six and six", 50) for _ in range(4))
    scheduler.submit([running.row])
    while not running.tokens:
        scheduler.step()
    scheduler.submit([read.row, waiting.row])
    scheduler.leave([running.row, waiting.row])
    assert list(scheduler.waiting) == [read.row]
    told = len(running.tokens)
    scheduler.step()
    assert scheduler.reading is not None and scheduler.reading.row is read.row and scheduler.running == 1
    scheduler.leave([read.row])
    scheduler.submit([last.row])
    finish(scheduler)
    assert len(running.tokens) == told and not read.tokens and not waiting.tokens and len(last.tokens) == 50
    assert (scheduler.rows, scheduler.past, scheduler.decoder) == ([], None, None), "nothing is kept of who has left"


def test_the_queue_takes_all_rows_of_a_request_or_none(library: Library) -> None:
    scheduler = Scheduler(2, 3)
    scheduler.submit([row(library, "a", "six", 3).row for _ in range(4)])
    with pytest.raises(QueueFull):
        scheduler.submit([row(library, "a", "six", 3).row for _ in range(2)])
    assert len(scheduler.waiting) == 4
    scheduler.submit([row(library, "a", "six", 3).row])
    with pytest.raises(QueueFull):
        scheduler.submit([row(library, "a", "six", 3).row])
    finish(scheduler)
    scheduler.submit([row(library, "a", "six", 3).row for _ in range(5)])


def test_a_row_that_fails_fails_alone(library: Library) -> None:
    def broken(logits: np.ndarray, texts: Any = ()) -> np.ndarray:
        raise ValueError("no token is good enough")

    scheduler = Scheduler(4, 4)
    good, bad = row(library, "a", "six", 5), row(library, "b", "one and", 5, broken)
    empty = row(library, "b", "", 5)
    scheduler.submit([good.row, bad.row, empty.row])
    finish(scheduler)
    assert good.tokens == answered(library, "a", "six", 5).tokens and not good.failed
    assert [str(error) for error in bad.failed] == ["no token is good enough"] and len(empty.failed) == 1


def test_after_a_failure_of_the_model_all_its_rows_know_and_the_next_are_answered(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(4, 4)
    lost = [row(library, name, "six", 5) for name in ("a", "b")]
    scheduler.submit([heard.row for heard in lost])
    with monkeypatch.context() as patch:

        def full(*_: Any) -> Any:
            raise MemoryError("no room")

        patch.setattr(Decoder, "step", full)
        scheduler.step()
    assert all(isinstance(heard.failed[0], MemoryError) for heard in lost) and scheduler.running == 0
    heard = row(library, "a", "six", 5)
    scheduler.submit([heard.row])
    finish(scheduler)
    assert heard.tokens == answered(library, "a", "six", 5).tokens


def test_numbers_that_are_not_finite_end_the_answer(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "to_host", lambda logits: logits * np.nan)
    heard = answered(library, "a", "six", 5)
    assert not heard.tokens and "not finite" in str(heard.failed[0])


def test_numbers_of_one_row_that_are_not_finite_end_its_answer_and_no_other(library: Library) -> None:
    """They come up after its prompt was read, in what it has read."""
    scheduler = Scheduler(4, 4)
    bad, good = row(library, "a", "two or three or four", 9), [row(library, name, "six", 9) for name in NAMES]
    scheduler.submit([bad.row, *(heard.row for heard in good[:3])])
    scheduler.step()
    assert scheduler.past is not None
    for keys, _ in scheduler.past.layers:
        keys[0, 1] = np.nan
    scheduler.submit([heard.row for heard in good[3:]])
    finish(scheduler)
    assert len(bad.tokens) == 2 and "not finite" in str(bad.failed[0])
    for name, heard in zip(NAMES, good, strict=True):
        assert heard.tokens == answered(library, name, "six", 9).tokens and not heard.failed


def test_its_thread_sleeps_until_somebody_comes_and_ends_when_told(library: Library) -> None:
    scheduler = Scheduler(2, 2)
    scheduler.start()
    for _ in range(3):
        heard = row(library, "a", "six", 5)
        scheduler.submit([heard.row])
        while len(heard.tokens) < 5:
            assert scheduler.thread.is_alive()
            scheduler.thread.join(0.01)
    scheduler.stop()
    scheduler.thread.join(5)
    assert not scheduler.thread.is_alive()
