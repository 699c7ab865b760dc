"""The training run that the flags describe, with all that decides its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.counting.step_count import Storage
from minilora.data.batches import Batch, collate
from minilora.data.store import Example
from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import read_layout
from minilora.formats.checkpoint import DTYPES, read_config, read_config_file
from minilora.formats.gguf_file import is_gguf
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.known_configs import KNOWN_CONFIGS, LARGE_SHAPES
from minilora.formats.load import SHIPPED_MODEL
from minilora.methods.method import Method
from minilora.model.config import Config
from minilora.runs.settings import Settings
from minilora.runs.task import load_task, micro_batches

KNOWN_SHAPES = KNOWN_CONFIGS | LARGE_SHAPES


class MicroBatch(NamedTuple):
    """The rows that go through the model together."""

    rows: int
    length: int  # tokens in each row
    labelled: int  # tokens with a label, in all rows

    def draw(self, config: Config, rng: np.random.Generator) -> Batch:
        """Full rows of random tokens. The last tokens of each row have labels, `labelled` of them in all."""
        tokens = rng.integers(config.vocab_size, size=(self.rows, self.length)).tolist()
        per_row, more = divmod(self.labelled, self.rows)
        counts = [per_row + (row < more) for row in range(self.rows)]
        return collate(
            [
                [Example(row, [i >= self.length - count for i in range(self.length)])]
                for row, count in zip(tokens, counts, strict=True)
            ],
            pad_id=0,
        )


class PlannedRun(NamedTuple):
    """A training run, with all that decides its size."""

    name: str  # the model's name, for output
    settings: Settings
    config: Config
    folder: Path | None  # the checkpoint's folder; None for a shape without weights
    method: Method
    micro_batch: MicroBatch
    storage: Storage
    rows_from: str = "full rows"  # where their lengths are from, in words


def plan_run(settings: Settings, labelled: float) -> PlannedRun:
    """The run on its data's longest micro-batch, or on full rows with labels on the share `labelled` of their tokens.

    ValueError or OSError for bad flags.
    """
    if not 0 < labelled <= 1:
        raise ValueError(f"--labelled {labelled} is not above 0 and at most 1")
    name, config, raw, folder = find_shape(settings)
    method = find_method(settings, config)
    length = settings.max_length or min(config.max_position_embeddings - method.virtual_tokens, 1024)
    if length < 2:
        raise ValueError(f"--max-length {length}: it takes two tokens to predict one")
    if settings.data and folder:
        micro_batch, rows_from = longest(settings, folder, length), f"the longest micro-batch of {settings.data}"
    else:
        rows = settings.batch_size
        tokens = max(1, round(labelled * rows * (length - 1)))  # what follows the last token of a row is unknown
        micro_batch, rows_from = MicroBatch(rows, length, tokens), "full rows"
        if settings.data:
            rows_from += f": there is no tokenizer of {name} here that would count those of {settings.data}"
    stored = raw.get("dtype") or raw.get("torch_dtype")
    storage = Storage(
        settings.dtype,
        settings.frozen,
        stored if stored in DTYPES else "float32",
        settings.mixed_precision,
    )
    return PlannedRun(name, settings, config, folder, method, micro_batch, storage, rows_from)


def longest(settings: Settings, folder: Path, max_length: int) -> MicroBatch:
    """The micro-batch of an epoch that has the most tokens, padding included: the peak of memory is its step's."""
    task = load_task(settings, Tokenizer.load(folder), max_length)
    lengths, labels = task.rows.lengths, task.rows.labels
    shapes = [
        MicroBatch(len(group), int(lengths[group].max()), int(labels[group].sum()))
        for group in micro_batches(lengths, settings)
    ]
    return max(shapes, key=lambda shape: (shape.rows * shape.length, shape.labelled))


def find_shape(settings: Settings) -> tuple[str, Config, dict[str, Any], Path | None]:
    """The model of `--model`: its name, its configuration, its config.json, and the folder if its weights are there."""
    path = Path(settings.model)
    if path.name in KNOWN_SHAPES and not path.exists():
        return path.name, Config.from_dict(KNOWN_SHAPES[path.name]), KNOWN_SHAPES[path.name], None
    if path.is_file() and not is_gguf(path):
        return str(path), *read_config_file(path), None
    try:
        folder = find_model(settings.model, settings.revision, ("config.json",)).folder
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; nor a known shape: {', '.join(KNOWN_SHAPES)}") from error
    whole = is_gguf(folder) or any(folder.glob("*.safetensors"))
    return settings.model, *read_config(folder), folder if whole else None


def find_method(settings: Settings, config: Config) -> Method:
    """The method of the settings, or of the adapter that training starts from."""
    if settings.adapter:
        return read_layout(find_adapter(settings.adapter).folder, config).method
    words = Tokenizer.load(SHIPPED_MODEL)  # for --init-text, which says where virtual tokens start, not how many
    return settings.method.for_model(config, words.encode)
