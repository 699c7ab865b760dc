"""The command that measures the server: both sides are asked the same, and each figure is what it says."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.commands import good
from support.served import Library

pytest.importorskip("starlette", reason="the server needs Starlette: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install -e '.[serve]'")


def test_rows_together_and_one_by_one_are_measured_with_the_same_answers(library: Library, tmp_path: Path) -> None:
    flags = ["--model", library.folder / "base", "--adapter", library.folder / "a", "--rows", 3, "--max-tokens", 5]
    shown = good(
        "serve.measure", *flags, "--repeat", 1, "--out", tmp_path / "figures.json", "--markdown", tmp_path / "page.md"
    )
    assert (tmp_path / "page.md").read_text().count("| minilora, ") == 2
    figures = json.loads((tmp_path / "figures.json").read_text())["outcomes"]
    theirs = ["llama.cpp"] * 2 if find_spec("xllamacpp") and find_spec("gguf") else []
    assert [each["side"] for each in figures] == ["minilora", "minilora", *theirs]
    assert [each["rows"] for each in figures] == ["mixed", "one adapter"] * (len(figures) // 2)
    for each in figures:
        assert each["of"] == 3 and each["one_by_one"] > 0 and each["together"] > 0
        assert f"{each['together'] / each['one_by_one']:.2f}×" in shown
    assert all(each["same"] == 3 for each in figures if each["side"] == "minilora")
