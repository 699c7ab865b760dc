"""Words and phrases are kept in plain files beside the code that uses them; these functions read such files."""

import json
from pathlib import Path
from typing import Any


def read_words(file: Path) -> tuple[str, ...]:
    """Return the entries of a text file, one a line."""
    return tuple(file.read_text(encoding="utf-8").splitlines())


def read_table(file: Path) -> Any:
    """Return the content of a JSON file, with a tuple for every list in it."""
    return _frozen(json.loads(file.read_text(encoding="utf-8")))


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
