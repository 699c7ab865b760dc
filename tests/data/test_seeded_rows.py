"""The rows that a seed draws are the same for ever: figures of different days and machines are of the same data.

Where a list of words or a phrasing is changed on purpose, the digests here change with it, and so does every figure
that was measured on the rows before.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import write_rows
from support.small_tokenizer import write_tokenizer

from minilora.data.datasets import load_dataset
from minilora.data.few_shot import few_shot_rows
from minilora.data.tokenizer import Tokenizer
from minilora.rows.parts import part_of, split
from minilora.tasks.nl2sql.rows import nl2sql_rows


def digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("part", "expected"), [("train", "2bce9c85d780ee61"), ("valid", "796415590d2d75b4"), ("test", "fb30eb8847f44c35")]
)
def test_the_rows_of_the_built_in_task_are_the_same_for_ever(part: str, expected: str) -> None:
    assert digest(nl2sql_rows(part, 50)) == expected


def test_the_rows_that_a_seed_holds_out_are_the_same_for_ever(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": str(n)} for n in range(30)])
    for seed, expected in ((0, [2, 11, 26]), (7, [4, 12, 14])):
        found = load_dataset(tmp_path / "rows.jsonl", seed)
        assert [int(row["text"]) for row in found.valid] == expected
        assert [int(row["text"]) for row in found.train] == [n for n in range(30) if n not in expected]


def test_the_shots_that_a_seed_shows_are_the_same_for_ever(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    shown = [{"prompt": f"{n}", "completion": ""} for n in range(9)]
    rows, _ = few_shot_rows([{"prompt": "?", "completion": "!"}] * 3, shown, 2, tokenizer, 99, seed=5)
    assert [row["prompt"].split() for row in rows] == [["7", "5", "?"], ["6", "4", "?"], ["5", "2", "?"]]


def test_the_parts_and_the_order_of_a_made_data_set_are_the_same_for_ever() -> None:
    """The checksum of a key says its part, whatever the seed, which decides the order and what is left out."""
    assert [part_of(key) for key in "abcd"] == ["train", "test", "train", "train"]
    rows = {str(n): [{"prompt": str(n), "completion": ""}] for n in range(60)}
    parts = split(rows, seed=3, limit=40)
    assert [int(row["prompt"]) for row in parts["valid"]] == [6, 29, 48]
    assert digest(parts) == "5d21219d6038c141"
