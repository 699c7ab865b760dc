"""Write docs/settings.md: every setting of `train`, as its declaration says it.

python tests/tools/settings_page.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from minilora.cli.flags import TO_TRAIN
from minilora.methods.method import known_methods
from minilora.methods.setting import Setting, flag, settings_of
from minilora.runs.settings import DEFAULT_JOB, METHOD, all_settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = "| flag | default | what it says | other names |\n|---|---|---|---|"


def page() -> str:
    """The whole page."""
    parts = [
        "# Settings",
        "Each setting of `python -m minilora.train` is declared once: those of every run in\n"
        "[runs/settings.py](../minilora/runs/settings.py), those of a method in the method's own file. This page is\n"
        "made from the declarations by `python tests/tools/settings_page.py`. `settings.json` in a run's folder holds\n"
        "the same names, and a file for `-c` may use any of them, with `-` or `_`. The other names are those of\n"
        "mlx-lm, TRL, transformers and PEFT; where they count in another unit, the value is converted.",
    ]
    groups: dict[str, list[Setting]] = {}
    for declared in all_settings().values():
        groups.setdefault(declared.declaration.group, []).append(declared)
    for title, settings in groups.items():
        parts += [f"## {title[0].upper()}{title[1:]}", "\n".join([HEAD, *map(row, settings)])]
        if title == METHOD:
            parts.append("\n".join(methods()))
    job = ", ".join(f"`{flag(name)} {value}`" for name, value in DEFAULT_JOB.items())
    parts.append(f"Without `--data`, the built-in task has defaults of its own: {job}.")
    others = "; ".join(f"`{flag(ours)}` is also {also(theirs)}" for ours, theirs in TO_TRAIN.items())
    parts.append(f"Flags that are no settings: {others}.")
    return "\n\n".join(parts) + "\n"


def row(declared: Setting) -> str:
    """One setting as a line of a table."""
    help, _, aliases, choices, at_least, above, at_most, below, *_ = declared.declaration
    bounds = [(at_least, "at least"), (above, "above"), (at_most, "at most"), (below, "below")]
    told = [f"{words} {bound:g}" for bound, words in bounds if math.isfinite(bound)]
    told += [", ".join(f"`{choice}`" for choice in choices)] if choices else []
    default = declared.shown_default if declared.name != "model" else "tinysmol"
    cells = [f"`{declared.flag}`", f"`{default}`" if default else "", "; ".join([help, *told]), also(aliases)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def also(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{flag(name)}`" for name in names)


def methods() -> Iterator[str]:
    """Which settings each method has."""
    yield "What each `--method` has of these:\n"
    yield "| method | its settings |\n|---|---|"
    for name, cls in known_methods().items():
        meant = cls.names[name].items()
        fixed = [f"{flag(key)} {' '.join(value) if isinstance(value, tuple) else value}" for key, value in meant]
        own = [flag(key) for key in settings_of(cls) if key not in cls.names[name]]
        told = ([f"means `{' '.join(fixed)}`"] if fixed else []) + [f"`{one}`" for one in own]
        yield f"| `{name}` | {', '.join(told) or 'none'} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
