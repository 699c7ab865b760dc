"""A run's folder as figures for a page: what the templates show and the script draws, read from the run's own files."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.formats.files import read_json
from minilora.methods.method import known_methods
from minilora.pages.charts import Series, chart, is_wide, loss_series, rate_series
from minilora.pages.words import marked
from minilora.runs.findings import FINDINGS_FILE
from minilora.runs.folder import read_summary
from minilora.runs.metrics import read_metrics
from minilora.runs.settings import SETTINGS_FILE, all_settings

PAGE_FILE = "report.html"
PINNED = ("date", "revision")  # settings that a run fills in itself, so that it is resumed with the same
EVENLY_SPACED = 16  # ranks; up to more, each doubling is as wide on the axis
MOST_TABLE_ROWS = 24  # of the table under the curves

Figures = dict[str, Any]

NOTHING: Figures = {  # what a run has found out that has not finished, or was not looked into
    **{"finished": "", "tokens": [], "less": {}, "drift": {}},
    "answers": {"counts": {}, "rows": []},
}
FILES = {  # what a run leaves, in the order of interest
    "adapter_model.safetensors": "the adapter, in PEFT's layout",
    "adapters.safetensors": "the adapter, in mlx-lm's layout",
    "model.safetensors": "the whole model",
    "adapter_config.json": "what the adapter is, and of which base",
    "report.html": "this page",
    "summary.json": "the figures of this page, for programs",
    "metrics.jsonl": "loss, rate and speed, a line for each step",
    "settings.json": "the settings, which --resume reads",
    "report.json": "the answers, token losses and weight changes of this page",
    "loss.png": "the loss curve as a picture",
    "state.safetensors": "the state from which --resume goes on",
    "tensorboard": "the log for TensorBoard",
}


def run_view(folder: Path) -> Figures:
    """All that the page of a run shows. FileNotFoundError if the folder holds no run."""
    if not (folder / SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no run ({SETTINGS_FILE} is missing): give the folder of a `train` run")
    settings, summary, lines = read_json(folder / SETTINGS_FILE), read_summary(folder), read_metrics(folder)
    found = NOTHING | (read_json(folder / FINDINGS_FILE) if (folder / FINDINGS_FILE).is_file() else {})
    losses = loss_series(lines, summary.get("base_loss"), summary.get("adapted_loss"))
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "settings": settings,
        "changed_settings": changed_settings(settings),
        "task": Path(settings["data"]).name if settings.get("data") else "the built-in task, English questions to SQL",
        "base": Path(settings.get("model", "")).name,
        "summary": summary,
        "found": found,
        "lines": lines,
        "steps": table_of_steps(lines),
        "charts": {
            "loss": chart("step", "nats per labelled token", losses, is_wide(losses)),
            "rate": chart("step", "learning rate", [rate_series(lines)]),
            **charts_with_less([(found, "held-out loss", 0)]),
        },
        "answers": answer_rows(found["answers"]["rows"]),
        "map": weight_map(found.get("changes", {})),
        "files": files(folder),
        "next": how_to_go_on(folder, settings, summary),
    }


def changed_settings(settings: Mapping[str, Any]) -> Figures:
    """The settings that differ from the defaults of their flags."""
    known = all_settings()
    defaults = {name: json.loads(json.dumps(setting.default)) for name, setting in known.items()}
    return {
        name: value
        for name, value in settings.items()
        if name not in PINNED and not (name in defaults and defaults[name] == value)
    }


def table_of_steps(lines: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """Steps evenly spread over the run, and every validation up to as many, for the table under the curves."""
    train = [line for line in lines if "loss" in line]
    valid = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    every = max(1, math.ceil(len(train) / MOST_TABLE_ROWS))
    kept = {line["step"] for line in train[::-1][::every]} | {*list(valid)[:MOST_TABLE_ROWS]}
    return [{**line, "valid_loss": valid.get(line["step"])} for line in train if line["step"] in kept]


def charts_with_less(of_runs: Sequence[tuple[Mapping[str, Any], str, int]]) -> Figures:
    """The losses with ΔW cut and scaled, of one run or of several, each with a label and a colour."""
    ranks, scales = [], []
    for found, label, color in of_runs:
        if less := found["less"]:
            of_rank = {0: less["scales"][0]["loss"]} | {point["rank"]: point["loss"] for point in less["ranks"]}
            of_scale = {point["scale"]: point["loss"] for point in less["scales"]}
            ranks.append(Series(label, [*of_rank], [*of_rank.values()], color))
            scales.append(Series(label, [*of_scale], [*of_scale.values()], color))
    y = "nats per labelled token"
    if not ranks:
        return {}
    many = max(max(one.x) for one in ranks) > EVENLY_SPACED
    return {
        "rank": chart("rank of ΔW", y, ranks, is_wide(ranks), log_x=many),
        "scale": chart("scale of ΔW", y, scales, is_wide(scales)),
    }


def answer_rows(rows: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """Answers with the words marked that differ from the right one, and what became of each."""
    kinds = {(True, True): "kept", (False, True): "gained", (True, False): "lost", (False, False): "wrong"}
    return [
        {
            **row,
            "kind": kinds[row["was_right"], row["is_right"]],
            "right": marked(row["right"], row["now"]),
            "before": marked(row["before"], row["right"]),
            "now": marked(row["now"], row["right"]),
        }
        for row in rows
    ]


def weight_map(changes: Mapping[str, Mapping[str, Any]], most: Mapping[str, float] | None = None) -> Figures:
    """The changed weights as a table of layers × modules, and those that belong to no layer.

    Each cell has the shares of its figures of the largest on the map, or of `most`, by which it is coloured.
    """
    most = most or largest(changes)
    cells: dict[str, Figures] = {}
    for module, change in changes.items():
        shares = {f"{key}_share": (change[key] or 0) / most[key] if most[key] else 0 for key in most}
        cells[module] = {**change, **shares, "module": module}
    layers: dict[int, dict[str, Figures]] = {}
    others = {}
    for module, cell in cells.items():
        if place := re.fullmatch(r"model\.layers\.(\d+)\.(?:\w+\.)*(\w+)", module):
            layers.setdefault(int(place[1]), {})[place[2].removesuffix("_proj")] = cell
        else:
            others[module.rpartition(".")[2]] = cell
    columns = list(dict.fromkeys(name for layer in layers.values() for name in layer))
    return {"columns": columns, "layers": layers, "others": others, "cells": cells}


def largest(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The largest figures on the map."""
    keys = ("ratio", "effective_rank")
    return {key: max((change[key] or 0 for change in changes.values()), default=0) for key in keys}


def files(folder: Path) -> list[Figures]:
    """The files of the run with their sizes, those first that matter most. The size of the page itself is not known."""
    names = sorted({path.name for path in folder.iterdir() if not path.name.startswith(".")} | {PAGE_FILE})
    names.sort(key=lambda name: [*FILES, name].index(name))
    return [{"name": name, "what": FILES.get(name, ""), "size": _size(folder / name)} for name in names]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() and path.name != PAGE_FILE else None


def how_to_go_on(folder: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do next, each as a sentence and the command for it."""
    run, python = shlex.quote(str(folder)), "python -m minilora."
    if not summary:
        return [("finish the run", f"{python}train --resume {run}")]
    method = known_methods().get(settings["method"])
    if method is None or not method.freezes_base:
        return [
            ("continue a prompt", f"{python}generate --model {run} --prompt '…'"),
            ("measure it on other rows", f"{python}evaluate --model {run} --data rows.jsonl"),
            ("compare it with another run", f"{python}report {run} OTHER-RUN"),
        ]
    model = "" if not settings.get("model") else f" --model {shlex.quote(settings['model'])}"
    return [
        ("continue a prompt", f"{python}generate{model} --adapter {run} --prompt '…'"),
        ("talk with it", f"{python}chat{model} --adapter {run}"),
        ("measure it on other rows", f"{python}evaluate{model} --adapter {run} --data rows.jsonl"),
        ("make one model of base and adapter", f"{python}merge{model} --adapter {run} --out merged"),
        ("compare it with another run", f"{python}report {run} OTHER-RUN"),
    ]
