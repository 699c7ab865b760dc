"""Tables of figures, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilora.formats.files import write_text

BEGIN, END = "<!-- begin of results -->", "<!-- end of results -->"


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def as_text(table: Table) -> str:
    """The table in aligned columns: the first flush left, the others flush right."""
    lines = [table.head, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    aligned = ("  ".join(_aligned(line, widths)).rstrip() for line in lines)
    return "\n".join([table.title, *aligned, *table.notes])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def as_markdown(all_tables: Sequence[Table], facts: dict[str, Any], notes: Sequence[str]) -> str:
    """All tables under headings, with the machine before and the notes after them."""
    parts = [machine_line(facts)]
    for table in all_tables:
        lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        parts.append(f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts += ["\n".join(f"- {note}" for note in table.notes)] if table.notes else []
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def machine_line(facts: dict[str, Any]) -> str:
    """The machine and the packages of the figures, in one line."""
    packages = [f"{name} {facts[name]}" for name in ("numpy", "torch", "transformers", "peft") if facts.get(name)]
    memory = f", {facts['memory_bytes'] / 1e9:.0f} GB" if facts["memory_bytes"] else ""
    gpu = f", {facts['gpu']}" if facts["gpu"] else ""
    machine = f"{facts['processor']}, {facts['threads']} threads{memory}{gpu}"
    return f"{machine}; Python {facts['python']}, {', '.join(packages)}, {facts['blas']}."


def check_markdown_file(path: Path) -> None:
    """ValueError unless `path` is new or has a place for the results."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
            raise ValueError(f"--markdown {path} exists and has no lines {BEGIN} and {END} to write between")


def write_markdown(path: Path, text: str) -> None:
    """Write a new file, or replace the text between the two lines of an existing one."""
    results = f"{BEGIN}\n\n{text}\n{END}"
    whole = path.read_text(encoding="utf-8") if path.exists() else f"{results}\n"
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    write_text(path, before + results + after)
