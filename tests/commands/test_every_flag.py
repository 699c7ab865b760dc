"""Every flag of the commands beside train changes what they print or write, or how they go about it.

A flag may be parsed and then forgotten. Those of train are settings: test_every_setting.py.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import string
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import CONFIG, PAIRS, TEXTS, contents, good, run, write_rows

from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.model import layers
from minilora.model.block import block
from minilora.model.config import Config

# A command, and what it is called with; {out} is a new path each time.
LINES = {
    "evaluate": "--model tiny --data rows",
    "generate": "--model tiny --prompt 'one and' --max-tokens 6",
    "chat": "--model tiny --max-tokens 6",
    "serve": "--model tiny --port 0",
    "merge": "--model tiny --adapter learnt --out {out}",
    "combine": "--adapter learnt --adapter more --out {out}",
    "convert": "--adapter learnt --format mlx --out {out}",
    "random_checkpoint": "tiny/config.json --tokenizer tiny --out {out}",
    "report": "learnt more --out {out}.html",
}
OF_MODELS = {"model": "--model other", "revision": "--revision v1"}
OF_ANSWERS = {
    **OF_MODELS,
    "adapter": "--adapter learnt",
    "max_tokens": "--max-tokens 2",
    "temp": "--temp 5",
    "top_k": "--temp 5 + --top-k 1",
    "top_p": "--temp 5 + --top-p 0.01",
    "repetition_penalty": "--repetition-penalty 0.01",
    "seed": "--temp 5 + --seed 1",
    "extra_eos_token": f"--extra-eos-token % {' '.join(string.ascii_letters)}",
    "device": "--device cuda",
    "frozen": "--frozen nf4",
    "mixed_precision": "--temp 5 + --mixed-precision bf16",
    "system_prompt": "--system-prompt six",
}
FLAGS: dict[str, dict[str, str]] = {  # what is added; before a + stands what both calls have
    "evaluate": {
        **OF_MODELS,
        "adapter": "--adapter learnt",
        "data": "--data others.jsonl",
        "batch_size": "--batch-size 1",
        "prompt": "--data 'two kinds.jsonl' + --prompt-feature ask",
        "completion": "--data 'two kinds.jsonl' + --completion-feature tell",
        "text": "--data texts.jsonl + --text-feature body",
        "messages": "--data chats.jsonl + --chat-feature turns",
        "train_on": "--train-on everything",
        "few_shot": "--few-shot 2",
        "seed": "--few-shot 2 + --seed 1",
        "max_length": "--max-length 10",
        "eval_rows": "--eval-rows 0",
        "device": "--device cuda",
        "json": "--json",
    },
    "generate": {
        **OF_ANSWERS,
        "system_prompt": "--chat + --system-prompt six",
        "prompt": "--prompt 'two and'",
        "prompts": "--prompts prompts.jsonl",
        "chat": "--chat",
        "batch_size": "--prompt 'two and' + --batch-size 1",
        "json": "--json",
        "out": "--out {out}",
    },
    "chat": OF_ANSWERS,
    "serve": {
        **OF_MODELS,
        "adapter": "--adapter learnt",
        "device": "--device cuda",
        "frozen": "--frozen nf4",
        "mixed_precision": "--mixed-precision bf16",
        "host": "--host localhost",
        "port": "--port 99999",
        "api_key": "--api-key sesame",
        "max_batch": "--max-batch 1",
        "queue": "--queue 1",
        "max_tokens": "--max-tokens 5",
        "max_length": "--max-length 5",
    },
    "merge": {
        **OF_MODELS,
        "adapter": "--adapter more",
        "out": "--out {out}2",
        "format": "--format gguf",
        "dtype": "--dtype bfloat16",
        "untie": "--adapter head + --untie",
        "max_shard_size": "--max-shard-size 0.00003",
    },
    "combine": {
        "adapter": "--adapter third=learnt",
        "weights": "--weights 1 2",
        "combination_type": "--combination-type svd",
        "rank": "--combination-type svd + --rank 1",
        "out": "--out {out}2",
        "model": "--model nowhere",
        "force": "--adapter of-another + --force",
    },
    "convert": {
        "adapter": "--adapter more",
        "format": "--format peft",
        "out": "--out {out}2",
        "model": "--model nowhere",
        "dtype": "--dtype float16",
    },
    "report": {"out": "--out {out}2.html"},
    "random_checkpoint": {
        "out": "--out {out}2",
        "dtype": "--dtype float32",
        "seed": "--seed 1",
        "tokenizer": "--tokenizer nowhere",
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all commands start in: two models of one shape, adapters and rows."""
    place = tmp_path_factory.mktemp("place")
    config = Config.from_dict(CONFIG)
    for seed, name in enumerate(("tiny", "other")):
        write_checkpoint(place / name, CONFIG, random_weights(config, seed, "bfloat16", 0.3), "bfloat16")
        train_tokenizer(TEXTS * 3, config.vocab_size, place / name)
    for path in ("rows/train.jsonl", "rows/test.jsonl", "others.jsonl"):
        write_rows(place / path, PAIRS[: 2 if "others" in path else None])
    turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": word}] for word in ("one", "two")]
    rows: dict[str, dict[str, Any]] = {
        "two kinds": {"prompt": "one", "completion": " two", "ask": "six", "tell": " odd"},
        "texts": {"text": "one and two", "body": "six"},
        "chats": {"messages": turns[0], "turns": turns[1]},
        "prompts": {"prompt": "six"},
    }
    for name, row in rows.items():
        write_rows(place / f"{name}.jsonl", [row])
    few = "--model tiny --data rows --steps 3 --learning-rate 0.1 --eval-rows 0 --save-every 0 --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for seed, name in enumerate(("learnt", "more", "of-another")):
            good("train", *few.split(), name, "--rank", 2, "--seed", seed)
        good("train", *few.split(), "head", "--target-modules", "lm_head", "--untie")
    described = json.loads((place / "of-another" / "adapter_config.json").read_text())
    (place / "of-another" / "adapter_config.json").write_text(
        json.dumps(described | {"base_model_name_or_path": str(place / "other")})
    )
    return place


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without CuPy."""
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "cupy", None)


def answers(server: Any, sockets: object) -> None:
    """In the place of uvicorn, which would serve for ever: print what the application answers."""
    from starlette.testclient import TestClient

    asked = {"model": "base", "prompt": "one and", "max_tokens": 6, "temperature": 0, "logprobs": 1}
    with TestClient(server.config.app, base_url="http://127.0.0.1") as client:
        told = [client.get("/v1/models"), client.get("/health"), client.post("/v1/completions", json=asked)]
    for response in told:
        print(re.sub(r'"(id|created)":("cmpl-\w+"|\d+),?', "", response.text))


def outcome(command: str, line: str, folder: Path) -> tuple[object, ...]:
    """What the command says and leaves, and the shapes of what its layers are given."""
    shapes: list[tuple[int, ...]] = []

    def watched(x: Any, *arguments: Any) -> Any:
        shapes.append(x.shape)
        return block(x, *arguments)

    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "block", watched)
        patch.setattr(sys, "stdin", io.StringIO("one\n/quit\n"))
        if command == "serve":
            pytest.importorskip("httpx", reason="Starlette's test client needs httpx")
            patch.setattr(pytest.importorskip("uvicorn").Server, "run", answers)
        code, out, err = run(command, *shlex.split(line.format(out=folder / "out")))
    complaint = err.splitlines()[-1] if code else ""  # above it may be a progress bar, with times
    out = re.sub(r":\d{4,5}/", ":PORT/", out.replace(str(folder), ""))
    return code, out, complaint, contents(folder), sorted(shapes)


def flags_of(command: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of all that the command's parser takes."""
    parsers: list[argparse.ArgumentParser] = []

    def caught(parser: argparse.ArgumentParser, argv: Any = None) -> None:
        parsers.append(parser)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", caught)
        assert run(command).code == 130
    return {action.dest for action in parsers[0]._actions if action.option_strings} - {"help"}


@pytest.mark.parametrize("command", LINES)
def test_every_flag_of_a_command_is_in_the_table(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flags_of(command, monkeypatch) == set(FLAGS[command])


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command in FLAGS for flag in FLAGS[command]])
def test_a_flag_changes_what_its_command_says_leaves_or_computes(command: str, flag: str, tmp_path: Path) -> None:
    beside, _, added = FLAGS[command][flag].rpartition("+")
    line = f"{LINES[command]} {beside}"
    without, again, given = (
        outcome(command, each, tmp_path / name)
        for name, each in {"without": line, "again": line, "given": f"{line} {added}"}.items()
    )
    assert without == again, "else a difference would mean nothing"
    assert given != without
