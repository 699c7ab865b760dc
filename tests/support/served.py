"""A small model with adapters of several methods, served: in this process, or by the command in its own."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.adapter_folders import write_base_and_adapters
from support.commands import CONFIG, process

from minilora.data.tokenizer import Tokenizer
from minilora.formats.library import load_adapters, named_adapters
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.methods.prefix import PrefixTuning
from minilora.model.generation import complete
from minilora.model.model import Model
from minilora.serve.served import Limits, Served

RAW = CONFIG | {"max_position_embeddings": 1200}
METHODS: dict[str, Method] = {
    "a": LoRA(2, 8.0, target_modules=("all-linear",)),
    "b": LoRA(3, 9.0, target_modules=("q_proj", "up_proj", "lm_head")),
    "d": DoRA(2, 4.0, target_modules=("v_proj", "down_proj")),
    "p": PrefixTuning(2),
}
NAMES = ("base", *METHODS)


@dataclass(frozen=True)
class Library:
    """A base and its adapters, in folders and loaded."""

    folder: Path
    models: dict[str, Model]
    tokenizer: Tokenizer

    @property
    def flags(self) -> list[object]:
        adapters = (part for name in METHODS for part in ("--adapter", self.folder / name))
        return ["--model", self.folder / "base", *adapters]

    def served(self, **limits: int) -> Served:
        return Served("tiny", self.models, self.tokenizer, Limits(**({"max_tokens": 40, "max_length": 1200} | limits)))

    def alone(self, name: str, prompt: str, count: int) -> str:
        """The greedy answer of one adapter to one prompt, without any server."""
        return self.tokenizer.decode(self.tokens_alone(name, prompt, count))

    def tokens_alone(self, name: str, prompt: str, count: int) -> list[int]:
        return complete(self.models[name], [self.tokenizer.encode(prompt)], count, self.tokenizer.stop_ids)[0]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("served")
    base = write_base_and_adapters(folder, RAW | {"tie_word_embeddings": False}, METHODS)
    models = load_adapters(base, named_adapters([str(folder / name) for name in METHODS]))
    return Library(folder, models, Tokenizer.load(folder / "base"))


@contextmanager
def started(*flags: object, **options: Any) -> Iterator[str]:
    """The address of a server in a process of its own."""
    server = process("serve", "--port", 0, *flags, **options)
    assert server.stdout is not None and server.stderr is not None
    complaints: list[str] = []
    reader = threading.Thread(target=lambda: complaints.extend(server.stderr or ()), daemon=True)
    reader.start()
    try:
        line = server.stdout.readline()
        found = re.search(r"http://\S+?(?=/ )", line)
        assert found, f"{line}{''.join(complaints)}"
        yield found[0]
        assert server.poll() is None, "".join(complaints)
    finally:
        server.terminate()
        server.wait(20)
        reader.join(5)
    assert not any("Traceback" in line for line in complaints), "".join(complaints)


def sse(lines: Iterator[str]) -> list[Any]:
    """The objects of a stream of events; the last is "[DONE]"."""
    told = [line.removeprefix("data: ") for line in lines if line]
    return [json.loads(each) if each != "[DONE]" else each for each in told]
