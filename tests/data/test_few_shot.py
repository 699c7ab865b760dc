"""Few-shot prompting: training rows with their answers before each prompt, and what is judged stays the row's own."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import PAIRS, good, run, write_rows
from support.small_tokenizer import write_tokenizer

from minilora.data.examples import Row, encode_row
from minilora.data.few_shot import SEPARATOR, few_shot_rows, first_answer, with_shots
from minilora.data.tokenizer import Tokenizer

words = st.text("abc ", min_size=1, max_size=6)
pairs = st.builds(lambda prompt, completion: {"prompt": prompt, "completion": completion}, words, words)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@st.composite
def conversations(draw: st.DrawFn) -> Row:
    """Of either shape, with or without a system message."""
    messages = [turn("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages += [turn("user", draw(words)), turn("assistant", draw(words))]
    if draw(st.booleans()):
        return {"messages": messages}
    return {"prompt": messages[:-1], "completion": messages[-1:]}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def trained_text(row: Row, tokenizer: Tokenizer) -> str:
    tokens, trained = encode_row(row, tokenizer)
    return tokenizer.decode([token for token, is_trained in zip(tokens, trained, strict=True) if is_trained])


@given(pairs, st.lists(pairs, max_size=3))
def test_shots_are_written_out_before_the_prompt_each_with_its_answer(row: Row, shots: list[Row]) -> None:
    written = [shot["prompt"] + shot["completion"] for shot in shots]
    expected = {"prompt": SEPARATOR.join([*written, row["prompt"]]), "completion": row["completion"]}
    assert with_shots(row, shots) == expected


@given(conversations(), st.lists(conversations(), min_size=1, max_size=3))
def test_shots_of_conversations_are_earlier_turns_under_the_rows_own_system_message(row: Row, shots: list[Row]) -> None:
    def messages(one: Row) -> list[dict[str, str]]:
        return one["messages"] if "messages" in one else one["prompt"] + one["completion"]

    together = messages(with_shots(row, shots))
    system = [message for message in messages(row)[:1] if message["role"] == "system"]
    turns = [m for one in (*shots, row) for m in messages(one) if m["role"] != "system"]
    assert together == system + turns


@given(st.data())
def test_what_is_trained_is_the_rows_own_answer(tokenizer: Tokenizer, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([pairs, conversations()]))
    row, shots = data.draw(shape), data.draw(st.lists(shape, max_size=3))
    assert trained_text(with_shots(row, shots), tokenizer) == trained_text(row, tokenizer)


@given(st.lists(pairs, min_size=1, max_size=3), st.lists(pairs, max_size=5), st.integers(10, 60), st.data())
def test_as_many_shots_as_fit_are_taken_from_the_training_rows_without_repetition(
    tokenizer: Tokenizer, rows: list[Row], shown: list[Row], length: int, data: st.DataObject
) -> None:
    shown = [{**row, "prompt": f"{number}{row['prompt']}"} for number, row in enumerate(shown)]
    count, seed = data.draw(st.integers(0, len(shown))), data.draw(st.integers(0, 99))
    prompted, mean = few_shot_rows(rows, shown, count, tokenizer, length, seed)
    assert (prompted, mean) == few_shot_rows(rows, shown, count, tokenizer, length, seed)
    everything, _ = few_shot_rows(rows, shown, count, tokenizer, 10**6, seed)
    texts = [shot["prompt"] + shot["completion"] for shot in shown]
    taken = 0
    for row, short, whole in zip(rows, prompted, everything, strict=True):
        *shots, last = whole["prompt"].split(SEPARATOR)
        assert last == row["prompt"]
        assert len(shots) == len(set(shots)) == count
        assert set(shots) <= set(texts)
        # The beginning of all drawn shots, and as long a one as fits.
        variants = [SEPARATOR.join([*shots[:n], last]) for n in range(count + 1)]
        fits = [len(encode_row({**row, "prompt": v}, tokenizer).tokens) <= length for v in variants]
        most = max([n for n, fit in enumerate(fits) if fit], default=0)
        assert short["prompt"] == variants[most]
        taken += most
        assert all(a >= b for a, b in pairwise(fits))
    assert mean == pytest.approx(taken / len(rows))


def test_shots_are_drawn_anew_for_each_row_and_the_seed_decides_them(tokenizer: Tokenizer) -> None:
    shown = [{"prompt": f"{n} ->", "completion": " a"} for n in range(50)]

    def drawn(seed: int) -> list[str]:
        return [row["prompt"] for row in few_shot_rows(PAIRS[:1] * 5, shown, 2, tokenizer, 1000, seed)[0]]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 1


def test_rows_without_answers_and_too_few_of_them_are_refused_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="row 1: --few-shot needs prompts with answers"):
        few_shot_rows([{"text": "a"}], [{"text": "b"}], 1, tokenizer, 100, 0)
    with pytest.raises(ValueError, match="--few-shot 6: there are only 5 training rows to show"):
        few_shot_rows(PAIRS, PAIRS, 6, tokenizer, 100, 0)


@given(st.lists(words, min_size=1, max_size=3), st.lists(words, max_size=3))
def test_an_answer_ends_where_the_model_goes_on_to_a_row_of_its_own(parts: list[str], more: list[str]) -> None:
    right = SEPARATOR.join(parts)
    assert first_answer(SEPARATOR.join([*parts, *more]), right) == right


def evaluated(*flags: Any) -> dict[str, Any]:
    return json.loads(good("evaluate", *flags, "--json"))


@pytest.mark.parametrize(("shots", "matched"), [(0, 0.0), (2, 1.0)])
def test_evaluate_cuts_off_the_rows_that_a_model_adds_where_it_was_shown_some(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: int, matched: float
) -> None:
    """Shown rows one after the other, a model that was not taught to stop writes more of them."""
    write_rows(tmp_path / "train.jsonl", PAIRS[:3])
    write_rows(tmp_path / "test.jsonl", [{"prompt": "up and", "completion": f" left{SEPARATOR}right"}, *PAIRS[3:]])
    on_and_on = f"{SEPARATOR}down ->{SEPARATOR}up ->"
    monkeypatch.setattr(
        "minilora.evaluate.answers", lambda model, tokenizer, rows: [row["completion"] + on_and_on for row in rows]
    )
    assert evaluated("--model", model, "--data", tmp_path, "--few-shot", shots)["exact_match"] == matched


def test_evaluate_shows_training_rows_and_says_how_many_fitted(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", PAIRS[:3])
    write_rows(tmp_path / "test.jsonl", PAIRS[3:])
    flags = ["--model", model, "--data", tmp_path]
    none, two = evaluated(*flags), evaluated(*flags, "--few-shot", 2)
    assert "shots" not in none
    assert two["shots"] == 2
    assert two["loss"] != none["loss"]
    assert evaluated(*flags, "--few-shot", 3, "--max-length", 24)["shots"] < 3
    assert two == evaluated(*flags, "--few-shot", 2) != evaluated(*flags, "--few-shot", 2, "--seed", 1)

    lone = run("evaluate", "--model", model, "--data", tmp_path / "test.jsonl", "--few-shot", 1)
    assert (lone.code, "give --data a folder with train and test files" in lone.err) == (2, True)
