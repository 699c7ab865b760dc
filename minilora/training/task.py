"""What a run trains on and is judged by: rows of text, encoded, with their held-out part."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from minilora.text.batches import Batch, Rows, batches_of, pack
from minilora.text.examples import Dataset, Example, Row, encode_rows, load_dataset, report
from minilora.text.nl2sql import nl2sql_rows
from minilora.text.tokenizer import Tokenizer
from minilora.training.settings import Settings

BUILT_IN_ROWS = {"train": 8000, "valid": 100, "test": 200}


@dataclass(frozen=True)
class Task:
    """Rows to train on, batches to validate on, and the held-out rows by which the outcome is judged."""

    rows: Rows
    valid: list[Batch]
    held_out: list[Batch]  # test, or valid where there is no test
    held_out_rows: list[Row]
    report: list[str]

    @property
    def digest(self) -> str:
        """A checksum of all tokens that train, and where: a resumed run must find the same."""
        checksum = 0
        for row in self.rows:
            checksum = zlib.crc32(json.dumps(row).encode(), checksum)
        return f"{checksum:08x}"


def load_task(settings: Settings, tokenizer: Tokenizer, max_length: int) -> Task:
    """Read, split, encode and (with `packing`) pack the data. ValueError where it cannot be trained on."""
    if settings.data:
        data = load_dataset(Path(settings.data), settings.seed)
    else:
        data = Dataset(*(nl2sql_rows(split, count, settings.seed) for split, count in BUILT_IN_ROWS.items()))
    encoded = {name: encode_rows(rows, tokenizer, max_length) for name, rows in data._asdict().items() if rows}
    examples = {name: part.examples for name, part in encoded.items()}
    train = examples["train"]
    rows: list[list[Example]] = [[example] for example in train]
    if settings.packing:
        rows = [[train[i] for i in indices] for indices in pack(train, max_length)]
    valid, held_out = (
        batches_of([[example] for example in part], settings.batch_size, tokenizer.pad_id)
        for part in (examples.get("valid", []), examples.get("test", examples.get("valid", [])))
    )
    lines = [report(part, max_length, name) for name, part in encoded.items()]
    if settings.packing:
        lines.append(f"packed: {len(rows):,} rows of at most {max_length} tokens")
    judged = "test" if data.test else "valid"
    held_out_rows = encoded[judged].kept(getattr(data, judged)) if judged in encoded else []
    return Task(rows, valid, held_out, held_out_rows, lines)
