"""`metrics.jsonl`: one JSON object a line, as training goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minilora.formats.files import write_text

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines written so far. A last line cut short by a kill is left out."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class MetricsFile:
    """Appends lines; on resuming, lines of steps that will be run again are dropped first."""

    def __init__(self, folder: Path, step: int) -> None:
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_text(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = (folder / METRICS_FILE).open("a", encoding="utf-8")

    def write(self, **values: float | int) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
