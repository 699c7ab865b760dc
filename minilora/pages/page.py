"""The pages themselves: figures and templates as one file of HTML, which loads nothing.

Whatever stands in rows and answers is escaped by jinja2. A content security policy in the page allows the two scripts
that it ships, known by their checksums, and nothing else: no other script and no address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from minilora.formats.files import read_text, write_text
from minilora.pages.comparison import comparison_view
from minilora.pages.view import PAGE_FILE, Figures, run_view

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "minilora.report"  # stands in the head of each page, so that no other file is overwritten
NONE = "–"


def write_page(folder: Path) -> Path:
    """`report.html` in the folder of a run, from the run's other files."""
    path = folder / PAGE_FILE
    write_text(path, run_page(folder))
    return path


def run_page(folder: Path) -> str:
    run = run_view(folder)
    return render(
        "run.html", {"title": run["name"], "run": run}, {"charts": run["charts"], "cells": run["map"]["cells"]}
    )


def comparison_page(folders: Sequence[Path]) -> str:
    compared = comparison_view(folders)
    runs = compared["runs"]
    cells = {f"{i} {module}": cell for i, run in enumerate(runs) for module, cell in run["map"]["cells"].items()}
    title = " · ".join(run["name"] for run in runs)
    return render("comparison.html", {"title": title, **compared}, {"charts": compared["charts"], "cells": cells})


def is_page(path: Path) -> bool:
    """Whether a file is a page that was made here."""
    return f'name="generator" content="{GENERATOR}"' in read_text(path)[:2000]


def render(template: str, figures: Figures, data: Mapping[str, Any]) -> str:
    """A template with figures for people, and data for the script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    licence = "\n".join(f" * {line}".rstrip() for line in _asset("uPlot.LICENSE.txt").splitlines())
    scripts = [f"/*!\n{licence}\n */\n{_asset('uPlot.iife.min.js')}", _asset("script.js")]
    return environment.get_template(template).render(
        **figures,
        generator=GENERATOR,
        styles=Markup(_asset("uPlot.min.css") + _asset("style.css")),
        scripts=[Markup(script) for script in scripts],
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {' '.join(map(_checksum, scripts))}",
        data=data,
    )


def _asset(name: str) -> str:
    return read_text(TEMPLATES / name)


def _checksum(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


# --- Figures for people ---


def loss(value: float | None) -> str:
    """Nats, and all else that is given with three decimals."""
    return NONE if value is None else f"{value:.3f}"


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}%}"


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in the unit that leaves the number between 1 and 1000."""
    if value is None:
        return NONE
    power = min(4, int(math.log10(max(value, 1)) / 3))
    return f"{value / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def setting(value: Any) -> str:
    """The value of a setting as it is typed, or nearly."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, list):
        return " ".join(map(str, value)) or NONE
    if isinstance(value, dict):
        return " ".join(f"{key}={entry}" for key, entry in value.items()) or NONE
    return NONE if value is None else json.dumps(value)


def visible(token: str) -> str:
    """A token with its line breaks as signs; the break itself follows."""
    return token.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥\t")


def signs(token: str) -> str:
    """A token, or some words, on one line: its line breaks and outer spaces are signs."""
    text = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    inner = text.strip(" ")
    return text.replace(inner, "\0").replace(" ", "␣").replace("\0", inner) if inner else "␣" * len(text)


FILTERS = {
    "loss": loss,
    "percent": percent,
    "count": count,
    "bytes": size,
    "setting": setting,
    "visible": visible,
    "signs": signs,
    "shade": lambda nats: NONE if nats is None else f"{1 - math.exp(-max(nats, 0)):.2f}",
    "flag": lambda name: "--" + name.replace("_", "-"),
}
