"""Large files of rows: read row by row, encoded many rows at once, and held where they take little memory."""

from __future__ import annotations

import json
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_tokenizer import write_tokenizer

from minilora.data import datasets, examples, json_lines
from minilora.data.datasets import load_dataset, read_rows
from minilora.data.examples import encode_row, encode_rows
from minilora.data.json_lines import JsonLines, chosen
from minilora.data.rows import place_of
from minilora.data.store import Example, Examples
from minilora.data.tokenizer import Tokenizer
from minilora.formats.files import read_lines, read_text

ROWS = [{"prompt": "What is " * n, "completion": f"it is {n}"} for n in range(1, 40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "bos"))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- Row by row ---


@given(st.lists(st.sampled_from(["é", "a b", "", " ", "\u2028", "\n", "\r", "\r\n", "\x0b", "\x85"])), st.booleans())
def test_a_file_line_by_line_has_the_lines_of_its_text(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], marked: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"\xef\xbb\xbf" * marked + "".join(parts).encode())
    lines = list(read_lines(path))
    assert [text for _, _, text in lines] == read_text(path).removesuffix("\n").split("\n")[: len(lines)]
    assert sum(text == "" for *_, text in lines) >= read_text(path).removesuffix("\n").split("\n").count("") - 1
    data = path.read_bytes()
    assert all(data[start:].startswith(raw) for start, raw, _ in lines)
    assert b"".join(raw for _, raw, _ in lines) == data.removeprefix(b"\xef\xbb\xbf")


def test_rows_of_a_file_stay_unread_until_they_are_asked_for_and_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)))
    rows = read_rows(path)
    assert isinstance(rows, JsonLines) and isinstance(rows[3:9], JsonLines)
    assert [*rows] == ROWS and rows[-1] == ROWS[-1] and [*rows[3:9]] == ROWS[3:9]
    mask = np.arange(len(ROWS)) % 3 == 0
    some = chosen(rows, mask)
    assert isinstance(some, JsonLines) and [*some] == ROWS[::3] == chosen(ROWS, mask)
    assert [place_of(row, 0).number for row in some] == [1 + 2 * i for i in range(0, len(ROWS), 3)]
    with pytest.raises(IndexError):
        rows[len(ROWS)]


def test_a_byte_that_is_no_text_is_told_with_its_line_and_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError) as of_text:
        read_text(path)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not UTF-8 text \(0xe9, byte 25") as of_rows:
        read_rows(path)
    assert str(of_rows.value) == str(of_text.value)


def test_reading_and_encoding_show_how_far_they_are(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar(json_lines.tqdm):  # type: ignore[type-arg]
        seen: list[tuple[float, float]] = []

        def __init__(self, **options: Any) -> None:
            assert options["disable"] is None, "it is for terminals only"
            super().__init__(**{**options, "disable": False})

        def close(self) -> None:
            self.seen.append((self.n, self.total or 0))
            super().close()

    monkeypatch.setattr(json_lines, "tqdm", Bar)
    monkeypatch.setattr(examples, "tqdm", Bar)
    path = written(tmp_path / "rows.jsonl", ROWS)
    encode_rows(read_rows(path), tokenizer, 1000)
    size = path.stat().st_size
    assert Bar.seen[0] == (size, size) and (len(ROWS), len(ROWS)) in Bar.seen


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_a_file_that_is_read_as_a_whole_and_would_not_fit_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    rows, whole = written(tmp_path / "rows.jsonl", ROWS), tmp_path / f"whole{suffix}"
    whole.write_text(json.dumps(ROWS))
    monkeypatch.setattr(datasets, "memory_bytes", lambda: whole.stat().st_size)
    monkeypatch.setattr(datasets, "read_text", lambda path: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=rf"whole\{suffix} has .* GB of memory; here are .* as rows in a \.jsonl"):
        read_rows(whole)
    assert len(read_rows(rows)) == len(ROWS)
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "memory_bytes", lambda: 0)  # it cannot be told
    assert read_rows(whole)


# --- Many at once ---


@pytest.mark.parametrize("at_once", [1, 100, 10**9])
def test_rows_encoded_together_are_what_they_are_one_by_one(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    chat = [
        {"messages": [{"role": "user", "content": "so"}, {"role": "assistant", "content": "a" * n}]} for n in (1, 9)
    ]
    monkeypatch.setattr(examples, "TEXT_AT_ONCE", at_once)
    for rows in (ROWS, chat, [{"text": "a"}], [{"text": "a " * 70}] * 3):
        found = encode_rows(read_rows(written(tmp_path / "rows.jsonl", rows)), tokenizer, 1000).examples
        assert [*found] == [encode_row(row, tokenizer) for row in rows]


def test_texts_encoded_together_are_what_they_are_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", "a", "<|im_start|>b é", "a" * 500]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    with pytest.raises(ValueError, match="half of a character"):
        tokenizer.encode_batch(["a", "\ud83d"])


def test_what_is_wrong_with_a_later_row_is_told_with_its_line(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "a", "completion": "\ud83d"}, *ROWS])
    for at_once in (1, 10**9):
        monkeypatch.setattr(examples, "TEXT_AT_ONCE", at_once)
        with pytest.raises(ValueError, match=rf"rows\.jsonl, line {len(ROWS) + 1}: .*half of a character"):
            encode_rows(read_rows(path), tokenizer, 1000)


# --- In little memory ---

some_examples = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9).map(
        lambda pairs: Example([token for token, _ in pairs], [trained for _, trained in pairs])
    )
)


@given(some_examples, some_examples, st.sampled_from([1, 40, 2**20]))
def test_stored_examples_are_the_examples_also_when_they_are_read_between_and_from_the_disk(
    first: list[Example], more: list[Example], in_memory: int
) -> None:
    stored = Examples(first, in_memory)
    assert [*stored] == first
    for example in more:
        stored.append(example)
    both = first + more
    assert [*stored] == both and stored[1:3] == both[1:3] and (not both or stored[-1] == both[-1])
    assert stored.lengths.tolist() == [len(example.tokens) for example in both]
    assert stored.labels.tolist() == [sum(example.trained[1:]) for example in both]
    stored.file.close()


def test_reading_and_encoding_a_file_takes_less_memory_than_the_file_is_large(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as few rows and tokens at once as there are in a file that is large."""
    monkeypatch.setattr(examples, "TEXT_AT_ONCE", 2**12)
    monkeypatch.setattr(examples, "Examples", partial(Examples, in_memory=2**12))
    rows = [{"prompt": "What is it? " * 10, "completion": f"it is {n}"} for n in range(6000)]
    path = written(tmp_path / "rows.jsonl", rows)
    del rows
    tracemalloc.start()
    try:
        encoded = encode_rows(load_dataset(path, seed=0).train, tokenizer, 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(encoded.examples) == 5500
    assert peak < path.stat().st_size
    encoded.examples.file.close()
