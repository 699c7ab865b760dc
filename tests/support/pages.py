"""The pages of docs/ taken apart: their prose, headings and equations."""

from __future__ import annotations

import re
from pathlib import Path


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
