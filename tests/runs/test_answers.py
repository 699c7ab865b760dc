"""The exact match, on tokenizers of other kinds: what a model was taught is right, and what runs past it is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support.small_tokenizer import POST_PROCESSORS, START, write_tokenizer

from minilora.data.examples import Row, encode_row
from minilora.data.few_shot import SEPARATOR, first_answer
from minilora.data.tokenizer import Tokenizer
from minilora.model import generation
from minilora.runs.evaluation import MOST_ANSWER_TOKENS, answers, exact_match

ROWS: list[Row] = [  # across the border of the first, and of the second, the tokenizers would merge
    {"prompt": "The answer", "completion": "s are three"},
    {"prompt": "How are ", "completion": "you?"},
    {"prompt": "two plus two ->", "completion": " four\n"},
    {"prompt": "well", "completion": ", thank you. I am well, thank you."},
    {"prompt": "ü", "completion": "ß 漢"},
]
CORPUS = ["The answers are three.", "How are you? I am well, thank you.", "two plus two -> four", "ü ß 漢\n"] * 3
Tokens = Sequence[int]


@pytest.fixture(scope="module", params=[*POST_PROCESSORS, "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With and without BOS or EOS around a text, and with spaces as Llama 2 has them; two tokens end an answer."""
    folder, kind = tmp_path_factory.mktemp("tokenizer"), request.param
    write_tokenizer(folder, "bos" if kind == "metaspace" else kind, CORPUS, metaspace=kind == "metaspace")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    return Tokenizer.load(folder)


def taught(row: Row, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
    """The tokens of a row before its answer, and its answer, the closing token left out."""
    tokens, trained = encode_row(row, tokenizer)
    assert tokens[-1] == tokenizer.eos_id
    begin = trained.index(True)
    assert tokens[:begin] == tokenizer.backend.encode(row["prompt"]).ids[:begin]  # BOS and all, as transformers has it
    return tokens[:begin], tokens[begin:-1]


def answered(
    said: Mapping[tuple[int, ...], Tokens], rows: Sequence[Row], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The answers of a model that says these tokens after these prompts, knows no other, and then stutters for ever."""

    def stream(model: Any, prompts: Sequence[Tokens], choose: Any) -> Iterator[np.ndarray]:
        texts = [said[tuple(prompt)] for prompt in prompts]
        for step in itertools.count():
            yield np.array([text[step] if step < len(text) else text[-1] for text in texts])

    monkeypatch.setattr(generation, "stream", stream)
    model: Any = None
    return answers(model, tokenizer, rows, batch_size=2)


def test_the_tokenizers_differ_in_what_they_are_to_show(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.stop_ids) == 2
    for row in ROWS[:2]:
        apart = [*tokenizer.encode(row["prompt"]), *tokenizer.encode(row["completion"])]
        assert tokenizer.encode(row["prompt"] + row["completion"]) != apart


@pytest.mark.parametrize("which", range(2))
def test_a_model_that_says_what_it_was_taught_and_stops_is_right_in_every_row(
    tokenizer: Tokenizer, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the very tokens of training, those of BOS included, and whichever of the stop tokens it says."""
    stop = sorted(tokenizer.stop_ids)[which]
    beyond = tokenizer.encode(" four")
    said = {}
    for row in ROWS:
        prompt, answer = taught(row, tokenizer)
        said[tuple(prompt)] = [*answer, stop, *beyond]
    assert exact_match(answered(said, ROWS, tokenizer, monkeypatch), ROWS) == 1


@pytest.mark.parametrize("beyond", [" four", "!", "\n", START])
def test_an_answer_that_runs_past_the_right_one_without_an_end_is_not_right(
    tokenizer: Tokenizer, beyond: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by white space or a special token, of which a text shows nothing; nor is the longest answer."""
    long = {"prompt": "two", "completion": " four" * MOST_ANSWER_TOKENS}
    for rows in ([ROWS[3]], ROWS, [*ROWS, long]):
        said = {}
        for row in rows:
            prompt, answer = taught(row, tokenizer)
            said[tuple(prompt)] = [*answer, *tokenizer.encode(beyond)]
        assert exact_match(answered(said, rows, tokenizer, monkeypatch), rows) == 0


def test_white_space_before_the_end_does_no_harm_to_an_answer_however_long(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for row in ROWS:
        prompt, answer = taught(row, tokenizer)
        said[tuple(prompt)] = [*answer, *tokenizer.encode(" \n"), 2]
    assert exact_match(answered(said, ROWS, tokenizer, monkeypatch), ROWS) == 1


def test_after_a_few_shots_an_answer_also_ends_where_the_next_row_begins(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was never taught to stop goes on as the prompt does."""
    said = {}
    for row in ROWS:
        prompt, answer = taught(row, tokenizer)
        said[tuple(prompt)] = [*answer, *tokenizer.encode(SEPARATOR), *tokenizer.encode("well, well")]
    texts = answered(said, ROWS, tokenizer, monkeypatch)
    cut = [first_answer(text, row["completion"]) for text, row in zip(texts, ROWS, strict=True)]
    assert exact_match(cut, ROWS) == 1 and exact_match(texts, ROWS) == 0
