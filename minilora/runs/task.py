"""The data of a run: rows of text, encoded, with a held-out part."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.batches import Batch, Rows, collate, of_like_length, pack, padding_share
from minilora.data.datasets import Dataset, load_dataset
from minilora.data.examples import Example, Row, encode_rows, row_shape
from minilora.data.report import figures, report
from minilora.data.tokenizer import Tokenizer
from minilora.runs.settings import Settings
from minilora.tasks.nl2sql.rows import nl2sql_rows
from minilora.training.order import Order

BUILT_IN_ROWS = {"train": 8000, "valid": 100, "test": 200}


@dataclass(frozen=True)
class Task:
    """The rows to train on, the batches to validate on, and the held-out rows that judge the outcome."""

    rows: Rows
    valid: list[Batch]
    held_out: list[Batch]  # the test part, or valid if there is no test part
    held_out_rows: list[Row]
    figures: dict[str, dict[str, Any]]  # the figures of each part, as in data/report.py
    report: list[str]  # the same in sentences

    @property
    def digests(self) -> dict[str, str]:
        """Checksums of all rows that training depends on, and of their order: a resumed run must find the same."""
        rows = (json.dumps(row).encode() for row in self.rows)
        batches = (array.tobytes() for batch in self.valid for array in batch)
        return {"data": _checksum(rows), "validation data": _checksum(batches)}


def _checksum(parts: Iterable[bytes]) -> str:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def load_task(settings: Settings, tokenizer: Tokenizer, max_length: int) -> Task:
    """Read, split, encode and (with `packing`) pack the data. ValueError if the data cannot be trained on."""
    data = load_data(settings)
    encoded = {
        name: encode_rows(rows, tokenizer, max_length, settings.train_on)
        for name, rows in data._asdict().items()
        if rows
    }
    train = encoded["train"].examples
    rows: list[list[Example]] = [[example] for example in train]
    if settings.packing:
        rows = [[train[i] for i in indices] for indices in pack(train, max_length)]
    groups = {
        name: of_like_length([[example] for example in part.examples], settings.batch_size)
        for name, part in encoded.items()
    }
    groups["train"] = micro_batches(rows, settings)
    padding = {name: padding_share(groups[name]) for name in encoded}

    lines = [report(part, max_length, name, padding[name]) for name, part in encoded.items()]
    if settings.packing:
        lines.append(f"packed: {len(rows):,} rows of at most {max_length} tokens")
    judged = "test" if data.test else "valid"
    return Task(
        rows=rows,
        valid=[collate(group, tokenizer.pad_id) for group in groups.get("valid", [])],
        held_out=[collate(group, tokenizer.pad_id) for group in groups.get(judged, [])],
        held_out_rows=encoded[judged].kept(getattr(data, judged)) if judged in encoded else [],
        figures={
            name: figures(part, padding[name]) | {"shapes": sorted({*map(row_shape, getattr(data, name))})}
            for name, part in encoded.items()
        },
        report=lines + tokenizer.remarks,
    )


def load_data(settings: Settings) -> Dataset:
    """The rows of the user's data, or of the built-in task."""
    if not settings.data:
        return Dataset(*(nl2sql_rows(split, count, settings.seed) for split, count in BUILT_IN_ROWS.items()))
    named = {
        "prompt": settings.prompt_feature,
        "completion": settings.completion_feature,
        "text": settings.text_feature,
        "messages": settings.chat_feature,
    }
    features = {name: key for name, key in named.items() if key}
    return load_dataset(Path(settings.data), settings.seed, features=features)


def micro_batches(rows: Rows, settings: Settings) -> list[Rows]:
    """The rows of each micro-batch of one epoch, dealt as the training loop does, with a random order of its own."""
    order, rng = Order(len(rows)), np.random.default_rng(settings.seed)
    groups: list[Rows] = []
    step = settings.batch_size * settings.grad_accumulation
    for _ in range(0, len(rows), step):
        groups += of_like_length([rows[i] for i in order.take(step, rng)], settings.batch_size)
    return groups
