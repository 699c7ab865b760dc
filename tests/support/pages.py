"""The pages of docs/ taken apart: links, headings, equations and the table of these."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TABLE = DOCS / "README.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^()\s]+)\)")


class Row(NamedTuple):
    """A row of the table of equations: links as pairs of a text and a file."""

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


def prose(page: Path) -> str:
    """A page without its fenced blocks and without code."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S))


def displayed(page: Path) -> list[str]:
    """The page's displayed equations."""
    return re.findall(r"^```math\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Where a link into the page may lead: its headings, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def definitions(path: Path) -> frozenset[str]:
    """The functions, classes and methods of a Python file: `lora`, `AdamW`, `AdamW.update`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return frozenset(names)
