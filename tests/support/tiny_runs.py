"""A tiny model, data of every shape, and runs on them: fixtures that a room's conftest.py takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import CONFIG, ROWS, TEXTS, good, write_rows

from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.model.config import Config
from minilora.runs import folder as folder_module
from minilora.training.state import State


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of two layers in bfloat16, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = random_weights(Config.from_dict(CONFIG), seed=0, dtype="bfloat16", std=0.3)
    write_checkpoint(folder, CONFIG, weights, "bfloat16")
    train_tokenizer(TEXTS * 3, CONFIG["vocab_size"], folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets: a .jsonl of each shape, a .txt, and a folder of parts."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "book.txt").write_text("\n".join(TEXTS * 5))
    for part, rows in {"train": TEXTS[:8], "valid": TEXTS[8:10], "test": TEXTS[10:]}.items():
        write_rows(folder / "parts" / f"{part}.jsonl", [{"text": text} for text in rows])
    write_rows(folder / "train-only" / "train.jsonl", ROWS["pairs"])
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Path:
    """The run of an adapter that has learnt the pairs."""
    folder = tmp_path_factory.mktemp("runs") / "learnt"
    flags = "--steps 80 --learning-rate 0.01 --rank 4".split()
    good("train", "--model", model, "--data", data / "train-only", "--out", folder, *flags)
    return folder


@pytest.fixture
def train(model: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train a few steps in a new run folder, and return that."""

    def train(name: str, *flags: object, out: str = "run") -> Path:
        few = () if {"--steps", "--epochs", "--config"} & set(flags) else ("--steps", 3)
        good("train", "--model", model, "--data", data / name, "--out", tmp_path / out, *few, *flags)
        return tmp_path / out

    return train


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory, model: Path, adapter: Path) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "float32"
    good("merge", "--model", model, "--adapter", adapter, "--out", folder)
    return folder


def interrupted_after(step: int) -> Any:
    """`save_state` that ends as if the user had pressed Ctrl-C as soon as the state of this step is saved."""
    save = folder_module.save_state

    def save_or_stop(state: State, folder: Path) -> None:
        save(state, folder)
        if state.step == step:
            raise KeyboardInterrupt

    return save_or_stop
