"""The fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import PAIRS, good, write_rows
from support.tiny_runs import adapter, data, model, train  # noqa: F401

HOSTILE = (  # each would act, break the page or leave it, if it were not escaped
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    "{{ 7 * 7 }}{% for x in y %}",
    "<!-- <style>* { display: none }",
    "\"><a href='https://example.org'>&lt;&amp;",
    "\u202eright to left, \u2028a line, \x07 a bell, a" + "long" * 60,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:  # noqa: F811
    """A run that has learnt some pairs, and was tested on them."""
    place = tmp_path_factory.mktemp("learnt")
    for part, rows in {"train": PAIRS, "valid": PAIRS[:3], "test": PAIRS[1:]}.items():  # so that their losses differ
        write_rows(place / "data" / f"{part}.jsonl", rows)
    flags = "--steps 70 --learning-rate 0.01 --rank 4".split()
    good("train", "--model", model, "--data", place / "data", "--out", place / "run", *flags)
    return place / "run"


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:  # noqa: F811
    """A run on rows that would take over a page."""
    place = tmp_path_factory.mktemp("hostile")
    rows = [{"prompt": f"{text} ->", "completion": f" {text[:20]}"} for text in HOSTILE]
    for part in ("train", "test"):
        write_rows(place / "data" / f"{part}.jsonl", rows)
    flags = ["--steps", 3, "--max-length", 1024, "--method", "dora"]
    out = place / "a <b> & 'c'"
    good("train", "--model", model, "--data", place / "data", "--out", out, *flags)
    return out
