"""docs/lora_in_one_file.py stays short, and stands on NumPy alone."""

from __future__ import annotations

import ast

from support.one_file import FILE

ALLOWED = {"numpy", "safetensors", "tokenizers", "json", "sys", "tempfile", "pathlib"}


def test_it_has_at_most_250_lines_and_imports_only_numpy_and_readers_of_files() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= ALLOWED
