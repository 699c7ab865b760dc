"""The code that the pages link to, each file as a page of the book, with an anchor at each definition."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from minilora.book.equations import ROOT, definitions

ROOMS = ("minilora", "tests")


@cache
def sources() -> frozenset[Path]:
    """Every file that has a page here, and the folders above it."""
    files = {path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    files |= {ROOT / "docs" / "lora_in_one_file.py", ROOT / "setup.cfg"}
    return frozenset(
        files | {parent for path in files for parent in path.parents if parent.is_relative_to(ROOT)} - {ROOT}
    )


def anchor_in(path: Path, words: str) -> str:
    """The definition that a link's words name: `lora`, or the sentence of a test without its underscores."""
    if path.suffix != ".py":
        return ""
    wanted = letters(words)
    return next((name for name in definitions(path) if letters(name.removeprefix("test_")) == wanted), "")


def letters(words: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", words.lower().replace("+", "plus"))


def source_pages(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The name, the content and the template of each page."""
    for path in sorted(sources()):
        name = path.relative_to(ROOT).as_posix()
        body = listing(path) if path.is_dir() else highlighted(path, app.builder.highlighter)
        yield name, {"title": name, "body": f"<h1>{escape(name)}</h1>\n{body}"}, "page.html"


def listing(folder: Path) -> str:
    """The files and folders in a folder that have pages."""
    entries = sorted(path for path in sources() if path.parent == folder)
    items = (f'<li><a href="{folder.name}/{path.name}.html">{escape(path.name)}</a></li>' for path in entries)
    return "<ul>" + "\n".join(items) + "</ul>"


def highlighted(path: Path, highlighter: Any) -> str:
    """A file in colours; before the first line of each definition stands its anchor."""
    text = path.read_text(encoding="utf-8")
    block: str = highlighter.highlight_block(text, "python" if path.suffix == ".py" else "text")
    if path.suffix != ".py":
        return block
    head, opening, code = block.partition("<pre>")
    lines = code.split("\n")
    for name, definition in definitions(path).items():
        lines[definition.line - 1] = f'<span id="{name}"></span>' + lines[definition.line - 1]
    return head + opening + "\n".join(lines)
