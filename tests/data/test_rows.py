"""A row is told by its file and line, whatever is wrong with it; rows of ShareGPT and Alpaca are read as our own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import PAIRS, assert_refused, good, run, write_rows

from minilora.data.conversations import ROLES
from minilora.data.datasets import load_dataset, read_rows
from minilora.data.examples import Row, encode_row, encode_rows, left_out
from minilora.data.few_shot import few_shot_rows
from minilora.data.rows import SHAREGPT_ROLES, FileRow, Place, as_ours, named, place_of
from minilora.data.tokenizer import Tokenizer

USER, ASSISTANT = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
TALK = {"messages": [USER, ASSISTANT]}


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def written(folder: Path, rows: list[Any], wrong: Any, name: str = "rows.jsonl") -> Path:
    """The rows, an empty line, and the wrong row: in line 2 + the number of rows."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + f"\n{wrong}\n")
    return path


# --- Places ---


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=30))
def test_places_are_told_with_their_file_once_and_at_most_ten_numbers(numbers: list[int]) -> None:
    told = named([Place("rows.jsonl", "line", number) for number in numbers])
    assert re.fullmatch(r"rows\.jsonl, lines? .*", told) and told.startswith("rows.jsonl, lines") == (len(numbers) > 1)
    assert re.findall(r"\d+", told) == [str(number) for number in numbers[:10]]
    assert told.endswith("…") == (len(numbers) > 10)


def test_a_row_of_a_file_is_the_dictionary_that_it_holds_and_knows_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, PAIRS, json.dumps(PAIRS[0]))
    rows = read_rows(path)
    assert [*rows] == [*PAIRS, PAIRS[0]]
    lines = [place_of(row, 0).number for row in rows]
    assert lines == [1, 2, 3, 4, 5, 7]
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    assert str(place_of(read_rows(tmp_path / "rows.json")[2], 0)) == f"{tmp_path / 'rows.json'}, row 3"
    assert str(place_of({"text": "a"}, 3)) == "row 3"


def test_rows_keep_their_lines_when_some_are_held_out(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(1, 40)]
    parts = load_dataset(write_rows(tmp_path / "rows.jsonl", rows), seed=3)
    for part in (parts.train, parts.valid):
        assert part and all(str(place_of(row, 0).number) == row["text"] for row in part)


def test_rows_left_out_are_told_by_their_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "a", "completion": "b" * 90}, PAIRS[0], {"prompt": "a" * 90, "completion": "b"}]
    encoded = encode_rows(read_rows(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer, 40)
    assert left_out(encoded, 40) == f"2 longer than --max-length 40 ({tmp_path / 'rows.jsonl'}, lines 6, 8)"
    assert encoded.kept(rows) == [*PAIRS, PAIRS[0]]


def test_a_row_with_others_before_it_keeps_its_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", PAIRS))
    prompted, _ = few_shot_rows(rows[2:], PAIRS, 2, tokenizer, 200, seed=0)
    assert [place_of(row, 0).number for row in prompted] == [3, 4, 5]
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 1: --few-shot needs prompts"):
        few_shot_rows(read_rows(write_rows(tmp_path / "texts.jsonl", [{"text": "a"}])), PAIRS, 1, tokenizer, 99, seed=0)


# --- What may be wrong with a row ---

WRONG = [  # (the rows before it, the wrong line, what is told)
    (PAIRS, '{"prompt": "a", "completion": ', "not valid JSON"),
    (PAIRS, "[" * 100_000, "not valid JSON (nested too deeply)"),
    (PAIRS, '{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
    (PAIRS, "3", "a number, not a JSON object"),
    (PAIRS, "null", "null, not a JSON object"),
    (PAIRS, '{"prompt": "a"}', "'prompt'"),
    (PAIRS, '{"prompt": "a", "completion": 5}', "prompt is a text, completion is a number"),
    (PAIRS, '{"prompt": "a", "completion": null}', "completion is null"),
    (PAIRS, '{"prompt": "a", "completion": true}', "completion is a boolean"),
    (PAIRS, '{"text": "a"}', "this row is text"),
    ([TALK], '{"messages": "a"}', "messages is a text"),
    ([TALK], '{"messages": {"role": "user"}}', "an object, not a list of messages"),
    ([TALK], '{"messages": ["a"]}', "message 1 is a text"),
    ([TALK], '{"messages": [{"role": "user", "text": "a"}]}', "message 1 has no content, only 'role', 'text'"),
    ([TALK], '{"messages": [{"speaker": "user", "content": "a"}]}', "message 1 has no role, only 'speaker', 'content'"),
    ([TALK], '{"messages": [{"role": "user", "content": ["a"]}]}', "message 1: its content is a list, not a text"),
    (
        [TALK],
        '{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}',
        "message 2 has the role 'asistant'; the roles are system, developer, user, assistant",
    ),
    ([TALK], '{"messages": [{"role": 3, "content": "a"}]}', "message 1 has the role 3"),
    ([TALK], '{"conversations": [{"from": "narrator", "value": "a"}]}', "message 1 is from 'narrator'"),
    ([TALK], '{"conversations": [{"from": ["gpt"], "value": "a"}]}', "message 1 is from ['gpt']"),
    ([TALK], '{"conversations": [{"from": "gpt", "value": 3}]}', "message 1: its content is a number"),
    (PAIRS, '{"instruction": "a", "input": 3, "output": "b"}', "the value of input is a number, not a text"),
    (PAIRS, '{"instruction": "a", "output": null}', "the value of output is null, not a text"),
]


@pytest.mark.parametrize(("before", "wrong", "told"), WRONG)
def test_whatever_is_wrong_with_a_row_is_told_with_its_file_and_line(
    tmp_path: Path, before: list[Any], wrong: str, told: str
) -> None:
    path = written(tmp_path, before, wrong)
    with pytest.raises(ValueError, match=", line ") as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}, line {len(before) + 2}: ") and told in str(error.value)


def test_what_only_the_tokenizer_sees_is_told_with_file_and_line_too(model: Path, tmp_path: Path) -> None:
    first = written(tmp_path, [TALK], json.dumps({"messages": [ASSISTANT], "tools": 3}))
    half = written(tmp_path, PAIRS, '{"prompt": "\\ud83d", "completion": "b"}', "half.jsonl")
    for path, line, told in ((first, 3, "the value of tools"), (half, 7, "half of a character")):
        result = run("evaluate", "--model", model, "--data", path)
        assert_refused(result, f"{path}, line {line}: ", told)


def test_training_tells_the_lines_that_it_leaves_out(model: Path, tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "one and two " * 100, "completion": " ONE"}, {"prompt": "a", "completion": ""}]
    path = write_rows(tmp_path / "train.jsonl", rows)
    flags = ("--model", model, "--data", tmp_path, "--steps", 1, "--eval-rows", 0, "--out", tmp_path / "run")
    out = good("train", *flags)
    assert f"1 longer than --max-length 64 ({path}, line 6)" in out


# --- ShareGPT and Alpaca ---

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


@given(st.lists(st.tuples(st.sampled_from(sorted(SHAREGPT_ROLES)), texts), max_size=5), st.none() | texts)
def test_a_row_of_sharegpt_is_its_messages(turns: list[tuple[str, str]], system: str | None) -> None:
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "id": 3}
    messages = [{"role": SHAREGPT_ROLES[role], "content": text} for role, text in turns]
    if system is not None:
        row["system"] = system
        messages = [{"role": "system", "content": system}, *messages] if system else messages
    assert as_ours(row) == {"id": 3, "messages": messages}
    assert set(SHAREGPT_ROLES.values()) <= set(ROLES)


@given(texts, texts, texts)
def test_a_row_of_alpaca_is_the_prompt_that_alpaca_was_trained_with(instruction: str, given: str, output: str) -> None:
    row = as_ours({"instruction": instruction, "input": given, "output": output})
    if given:
        head = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
        )
        prompt = f"{head}### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    else:
        head = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
        )
        prompt = f"{head}### Instruction:\n{instruction}\n\n### Response:\n"
    assert row == {"prompt": prompt, "completion": output}


@given(st.dictionaries(st.sampled_from(["prompt", "completion", "text", "input", "id"]), texts))
def test_a_row_of_our_own_shapes_stays_as_it_is(row: Row) -> None:
    assert as_ours(row) == row and as_ours({**row, **TALK}) == {**row, **TALK}


def test_files_of_sharegpt_and_alpaca_train_what_the_assistant_says(
    tokenizer: Tokenizer, model: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]
    share = read_rows(write_rows(tmp_path / "share.jsonl", [{"conversations": turns}, {"messages": turns}]))
    assert [*share] == [TALK, TALK] and all(isinstance(row, FileRow) for row in share)
    assert encode_row(share[0], tokenizer) == encode_row(TALK, tokenizer)
    path = write_rows(tmp_path / "alpaca.jsonl", [{"instruction": "one?", "input": "", "output": "two"}] * 4)
    example = encode_row(read_rows(path)[0], tokenizer)
    trained = [token for token, is_trained in zip(*example, strict=True) if is_trained]
    assert trained == [*tokenizer.encode("two"), tokenizer.eos_id]
    table = good("evaluate", "--model", model, "--data", path, "--max-length", 500, "--json")
    assert json.loads(table)["examples"] == 4


def test_keys_that_are_named_are_not_taken_for_alpaca(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "one?", "input": "", "output": "two"}])
    features = {"prompt": "instruction", "completion": "output"}
    assert [*read_rows(path, features)] == [{"prompt": "one?", "completion": "two"}]
    path = write_rows(tmp_path / "talk.jsonl", [{"talk": [{"from": "human", "value": "one?"}]}])
    assert [*read_rows(path, {"messages": "talk"})] == [{"messages": [USER]}]
