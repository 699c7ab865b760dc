"""The table at the end of a run of the laws: which hold, which are broken and by what, and which were not offered.

A law that is a convention is not broken by who follows another one: it "differs".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.kit import place_in
from tools.specification import spelt

HELD, DIFFERS, BROKEN, NOT_OFFERED = "held", "differs", "broken", "not offered"
CASE = re.compile(r"^    (\w+)=(.*?),?$")


class Law(NamedTuple):
    place: tuple[str, int, str]  # file, line and variant, in whose order the laws are told
    chapter: str
    law: str  # a sentence
    status: str
    detail: str  # what is wrong, or what is missing
    counterexample: str  # the smallest one that was found


def law_of(
    item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException] | None, outcome: str, implementation: Path
) -> Law:
    """The outcome of one test of `laws/`. An error other than a law's verdict is told with its place in the file."""
    name, _, variant = item.name.partition("[")
    sentence = spelt(name.removeprefix("test_").replace("_", " ")) + (f" ({variant[:-1]})" if variant else "")
    chapter = (item.module.__doc__ or "").partition(":")[0].partition(" (")[0]  # type: ignore[attr-defined]
    place = (item.path.name, item.reportinfo()[1] or 0, variant)
    if excinfo is None:
        return Law(place, chapter, sentence, HELD, "", "")
    error = first_of(excinfo.value)
    if outcome == "skipped":
        return Law(place, chapter, sentence, NOT_OFFERED, str(error).removeprefix("not offered: "), "")
    detail = str(error).partition("\n")[0] or "the law's condition does not hold"
    if not isinstance(error, AssertionError):
        detail = f"{type(error).__name__}: {detail} ({place_in(implementation, error)})"
    status = DIFFERS if item.get_closest_marker("convention") else BROKEN
    return Law(place, chapter, sentence, status, detail, case_of(error))


def first_of(error: BaseException) -> BaseException:
    """Hypothesis may report several failures of one test as a group."""
    parts = getattr(error, "exceptions", ())
    return first_of(parts[0]) if parts else error


def case_of(error: BaseException) -> str:
    """The drawn values of Hypothesis's falsifying example, the implementation and fixed parameters apart."""
    lines = "\n".join(getattr(error, "__notes__", [])).splitlines()
    found = [match.groups() for line in lines if (match := CASE.match(line))]
    return "; ".join(
        value if name == "case" else f"{name} = {value}" for name, value in found if name != "implementation"
    )


def by_status(laws: Sequence[Law]) -> str:
    return ", ".join(
        f"{sum(law.status == status for law in laws)} {status}" for status in (HELD, DIFFERS, BROKEN, NOT_OFFERED)
    )


def as_terminal_table(laws: Sequence[Law]) -> list[str]:
    """Lines for the terminal: one for each law, and below one that does not hold its reason and counterexample."""
    lines, chapter = [], ""
    for law in laws:
        if law.chapter != chapter:
            chapter = law.chapter
            lines += ["", chapter]
        missing = f": {law.detail}" if law.status == NOT_OFFERED else ""
        lines.append(f"  {law.status:12}{law.law}{missing}")
        if law.status in (DIFFERS, BROKEN):
            lines.append(f"{'':14}{law.detail}")
            if law.counterexample:
                lines.append(f"{'':14}with {law.counterexample}")
    return [*lines[1:], "", by_status(laws)]


def as_markdown(implementation: Path, laws: Sequence[Law]) -> str:
    """A page with the table."""
    lines = [f"# The laws of LoRA, held against {implementation.name}", "", f"{by_status(laws)}.", ""]
    lines += ["| chapter | law | | what was seen |", "|---|---|---|---|"]
    for law in laws:
        seen = law.detail + (f"; with {law.counterexample}" if law.counterexample else "")
        lines.append(f"| {escaped(law.chapter)} | {escaped(law.law)} | {law.status} | {escaped(seen)} |")
    return "\n".join(lines) + "\n"


def escaped(words: str) -> str:
    return re.sub(r"([*_|\[\]<])", r"\\\1", words)


def write_report(path: Path, implementation: Path, laws: Sequence[Law]) -> list[Path]:
    """FILE.md and FILE.json, whatever ending FILE has of the two. Returns the paths."""
    stem = path.with_suffix("") if path.suffix in (".md", ".json") else path
    page, data = (stem.with_name(f"{stem.name}{ending}") for ending in (".md", ".json"))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(as_markdown(implementation, laws), "utf-8")
    content: dict[str, Any] = {"implementation": implementation.name, "laws": [law._asdict() for law in laws]}
    data.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return [page, data]
