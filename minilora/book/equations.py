"""The table of equations in docs/README.md: each equation, the functions that compute it, the tests that state it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TABLE = DOCS / "README.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^()\s]+)\)")


class Row(NamedTuple):
    """A row of the table: links as pairs of a text and a file."""

    equation: str
    page: Path
    functions: list[tuple[str, Path]]
    tests: list[tuple[str, Path]]


def table() -> Iterator[Row]:
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| \[[A-Z]\d+\]", line):
            equation, _, functions, tests = line.strip("| ").split(" | ")
            ((number, target),) = LINK.findall(equation)
            yield Row(number, file_of(TABLE, target), links(functions), links(tests))


def links(cell: str) -> list[tuple[str, Path]]:
    return [(text.strip("`"), file_of(TABLE, target)) for text, target in LINK.findall(cell)]


def file_of(page: Path, target: str) -> Path:
    """The file that a link leads to, seen from its page."""
    name = target.partition("#")[0]
    return (page.parent / name).resolve() if name else page


class Definition(NamedTuple):
    """Where a function, a class or a method stands in its file, counted from 1, and its text."""

    line: int
    text: str


@cache
def definitions(path: Path) -> dict[str, Definition]:
    """The functions, classes and methods of a Python file by name: `lora`, `AdamW`, `AdamW.update`."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found: dict[str, Definition] = {}

    def add(nodes: Iterable[ast.stmt], prefix: str = "") -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min(part.lineno for part in (node, *node.decorator_list))
                text = dedent("\n".join(lines[first - 1 : node.end_lineno]))
                found[prefix + node.name] = Definition(first, text)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{prefix}{node.name}.")

    add(ast.parse(source).body)
    return found
