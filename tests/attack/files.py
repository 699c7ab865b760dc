"""Every format that minilora reads, as a file with mistakes: what a command does with it is classed.

A command that gets such a file does its work or says in a line what is wrong and where. It never shows a traceback,
never goes on for ever, and never takes memory without bounds.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from support.commands import CHATS, PAIRS, good, write_rows

from attack import faulty
from attack.faulty import Ended
from attack.mutants import mutant
from attack.promises import Ground

WORKS, CLEAR, UNNAMED = "works", "clear error", "error without the file's name"
TRACEBACK, HANG, MEMORY, CRASH = "traceback", "hang", "memory", "crash"
OUTCOMES = (WORKS, CLEAR, UNNAMED, TRACEBACK, HANG, MEMORY, CRASH)
SECONDS, BYTES = 20, 3 * 2**30
METHODS = ("dora", "miss", "prefix", "prompt", "bottleneck", "bitfit", "head")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Case(NamedTuple):
    """A file to be changed, below the ground, and a command that reads it."""

    format: str
    file: str
    command: str
    flags: Sequence[object]


class Outcome(NamedTuple):
    """How a command took a changed file. `seed` repeats it, but for the seconds that a run writes into its files."""

    case: Case
    seed: int
    kind: str
    output: str
    changed: bytes


class Files:
    """Files of every format in a folder `good`, and a copy of it, `bad`, in which one of them is changed."""

    def __init__(self, folder: Path) -> None:
        self.good, self.bad = folder / "good", folder / "bad"
        self.good.mkdir()
        ground = Ground(self.good)
        good("train", *ground.flags("train", self.good / "run"))
        model = ["--model", ground.model]
        (self.good / "model" / "chat_template.jinja").write_text(TEMPLATE)
        few = [*model, "--data", ground.rows, "--steps", 1, "--eval-rows", 0]
        for method in METHODS:
            untied = ["--untie"] if method == "head" else []
            good("train", *few, "--method", method, *untied, "--out", self.good / method)
        good("convert", *model, "--adapter", ground.adapter, "--format", "mlx", "--out", self.good / "mlx")
        good("merge", *model, "--adapter", ground.adapter, "--max-shard-size", 2e-5, "--out", self.good / "shards")
        if find_spec("gguf"):
            good("convert", *model, "--format", "gguf", "--out", self.good / "model.gguf")
        write_rows(self.good / "chats.jsonl", [{"messages": chat} for chat in CHATS])
        (self.good / "rows.json").write_text(json.dumps(PAIRS))
        (self.good / "book.txt").write_text("One and two are three.\n" * 30)
        write_rows(self.good / "prompts.jsonl", [{"prompt": "up"}, {"messages": CHATS[0][:1], "adapter": "base"}])
        settings = {"rank": 4, "lora_alpha": 8.0, "steps": 1, "eval_rows": 0, "target_modules": ["q_proj", "v_proj"]}
        mlx = {"lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["q_proj"]}, "iters": 1, "fine_tune_type": "lora"}
        (self.good / "run.json").write_text(json.dumps(settings | {"rank_pattern": {"q_proj": 2}, "optim": "sgd"}))
        yaml = "".join(f"{key}: {json.dumps(value)}\n" for key, value in (mlx | {"learning_rate": 1e-5}).items())
        (self.good / "run.yaml").write_text(yaml)
        (self.good / "run.toml").write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in settings.items()))
        self.cases = list(self._cases())

    def _cases(self) -> Iterator[Case]:
        def at(name: str) -> Path:
            return self.bad / name

        asked: list[object] = ["--model", at("model"), "--prompt", "up", "--max-tokens", 2]
        told = [*asked, "--chat"]
        adapted = [*asked, "--adapter", at("adapter")]
        shown: list[object] = ["--model", at("model"), "--show-batch"]
        out = ["--out", at("out")]
        yield Case("config.json", "model/config.json", "generate", asked)
        yield Case("config.json", "model/config.json", "merge", [*adapted[:2], *adapted[-2:], *out])
        yield Case("config.json", "model/config.json", "random_checkpoint", [at("model/config.json"), *out])
        yield Case("model.safetensors", "model/model.safetensors", "generate", asked)
        yield Case(
            "index.json", "shards/model.safetensors.index.json", "generate", ["--model", at("shards"), *asked[2:]]
        )
        yield Case("tokenizer.json", "model/tokenizer.json", "generate", asked)
        yield Case("tokenizer_config.json", "model/tokenizer_config.json", "generate", told)
        yield Case("generation_config.json", "model/generation_config.json", "generate", asked)
        yield Case("chat_template.jinja", "model/chat_template.jinja", "generate", told)
        yield Case("adapter_config.json", "adapter/adapter_config.json", "generate", adapted)
        for method in METHODS:
            flags = [*asked, "--adapter", at(method)]
            yield Case("adapter_config.json", f"{method}/adapter_config.json", "generate", flags)
        yield Case("adapter_model.safetensors", "adapter/adapter_model.safetensors", "generate", adapted)
        yield Case("mlx", "mlx/adapter_config.json", "generate", [*asked, "--adapter", at("mlx")])
        yield Case("mlx", "mlx/adapters.safetensors", "generate", [*asked, "--adapter", at("mlx")])
        if find_spec("gguf"):
            yield Case("gguf", "model.gguf", "generate", ["--model", at("model.gguf"), *asked[2:]])
        yield Case("rows", "rows.jsonl", "train", [*shown, "--data", at("rows.jsonl")])
        yield Case("rows", "chats.jsonl", "train", [*shown, "--data", at("chats.jsonl")])
        yield Case("rows", "rows.json", "train", [*shown, "--data", at("rows.json")])
        yield Case("rows", "book.txt", "train", [*shown, "--data", at("book.txt")])
        yield Case("prompts", "prompts.jsonl", "generate", [*asked[:2], *asked[-2:], "--prompts", at("prompts.jsonl")])
        for name in ("run.yaml", "run.toml", "run.json"):
            yield Case("--config", name, "train", [*shown, "--data", at("rows.jsonl"), "-c", at(name)])
        for name in ("settings.json", "state.safetensors", "metrics.jsonl"):
            yield Case("resume", f"run/{name}", "train", ["--resume", at("run")])
        yield Case("resume", "run/summary.json", "generate", [*asked, "--adapter", at("run")])

    def anew(self) -> None:
        """The copy is as good as the original."""
        shutil.rmtree(self.bad, ignore_errors=True)
        shutil.copytree(self.good, self.bad, copy_function=_linked)

    def attack(self, seed: int) -> Outcome:
        """One case with its file changed, both as the seed says."""
        draw = random.Random(seed)
        case = self.cases[seed % len(self.cases)]
        self.anew()
        file = self.bad / case.file
        place = str(self.good).encode()  # which differs from call to call, and a seed has to make the same mistake
        changed = mutant(file.read_bytes().replace(place, b"/good"), file.suffix, draw).replace(b"/good", place)
        file.unlink()  # it is a link to the good one
        file.write_bytes(changed)
        ended = faulty.limited(case.command, case.flags, SECONDS, BYTES)
        return Outcome(case, seed, classed(ended, Path(case.file)), ended.output, changed)


def _linked(source: str, target: str) -> None:
    """As a copy that costs nothing. Whole files are written beside the old ones, so no command changes the original."""
    Path(target).hardlink_to(source)


def classed(ended: Ended, file: Path) -> str:
    """The kind of an outcome."""
    if ended.code == faulty.TOO_LONG:
        return HANG
    if ended.code < 0:
        return CRASH
    if "out of memory" in ended.output or "Unable to allocate" in ended.output:
        return MEMORY
    if ended.code == 0 and "Traceback" not in ended.output:
        return WORKS
    if not ended.clear:
        return TRACEBACK
    (line, *_) = (line for line in ended.output.splitlines() if "error: " in line)
    return CLEAR if file.name in line or f"{file.parent.name}:" in line or f"{file.parent.name}," in line else UNNAMED
