"""The folder of every method: read back exactly, and refused by name where it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.method_laws import METHODS, WRITTEN, adapted, is_read_back_exactly
from support.strategies import TINY

from minilora.formats.adapters import read_method, write_method


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("tied", [True, False])
def test_a_method_is_read_back_from_its_folder_exactly(tmp_path: Path, name: str, tied: bool) -> None:
    config = replace(TINY, tie_word_embeddings=tied)
    method = is_read_back_exactly(tmp_path, METHODS[name], config)
    if name != "lora on embedding and head":  # its dataclass holds mappings, which compare as they are
        assert method == METHODS[name]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bottleneck", {"size": "3"}, "size is '3', expected int"),
        ("bottleneck", {"size": 4}, "wrong shape: .*adapter_down"),
        ("bitfit", {"norms": None}, "norms is None, expected bool"),
        ("head", {"modules_to_save": ["c_attn"]}, "c_attn"),
        ("random subset", {"share": 0.2}, "wrong shape: .*values"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    base, _, trainable = adapted(TINY, METHODS[name], 5)
    write_method(tmp_path, METHODS[name], trainable, TINY, "some/base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_method(tmp_path, base)
