"""The data of a run: rows of text, encoded, with a held-out part."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.batches import Batch, ExampleRows, Ints, batches_of, of_like_length, pack, padding_share
from minilora.data.datasets import Dataset, load_dataset
from minilora.data.examples import Row, encode_rows
from minilora.data.report import figures, report
from minilora.data.tokenizer import Tokenizer
from minilora.runs.settings import Settings
from minilora.tasks.nl2sql.rows import nl2sql_rows
from minilora.training.order import Order

BUILT_IN_ROWS = {"train": 8000, "valid": 100, "test": 200}


@dataclass(frozen=True)
class Task:
    """The rows to train on, the batches to validate on, and the held-out rows that judge the outcome."""

    rows: ExampleRows
    valid: list[Batch]
    held_out: list[Batch]  # the test part, or valid if there is no test part
    held_out_rows: Sequence[Row]
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
    rows = {name: ExampleRows(part.examples) for name, part in encoded.items()}
    if settings.packing:
        train = encoded["train"].examples
        rows["train"] = ExampleRows(train, pack(train.lengths.tolist(), max_length))
    padding = {name: _padding_share(name, part.lengths, settings) for name, part in rows.items()}
    lines = [report(part, max_length, name, padding[name]) for name, part in encoded.items()]
    if settings.packing:
        lines.append(f"packed: {len(rows['train']):,} rows of at most {max_length} tokens")
    judged = "test" if data.test else "valid"
    batches = {
        name: batches_of(rows.get(name, []), settings.batch_size, tokenizer.pad_id) for name in {"valid", judged}
    }
    return Task(
        rows=rows["train"],
        valid=batches["valid"],
        held_out=batches[judged],
        held_out_rows=encoded[judged].kept(getattr(data, judged)) if judged in encoded else [],
        figures={name: figures(part, padding[name]) for name, part in encoded.items()},
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


def _padding_share(name: str, lengths: Ints, settings: Settings) -> float:
    groups = micro_batches(lengths, settings) if name == "train" else of_like_length(lengths, settings.batch_size)
    return padding_share(lengths[group] for group in groups)


def micro_batches(lengths: Ints, settings: Settings) -> Iterator[Ints]:
    """The numbers of the rows in each micro-batch of one epoch, dealt as the training loop does, with a random order of
    its own."""
    order, rng = Order(len(lengths)), np.random.default_rng(settings.seed)
    step = settings.batch_size * settings.grad_accumulation
    for _ in range(0, len(lengths), step):
        taken = np.array(order.take(step, rng))
        yield from (taken[group] for group in of_like_length(lengths[taken], settings.batch_size))
