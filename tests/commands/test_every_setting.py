"""Every setting of a run and of every method acts on what it is there for.

A setting may be parsed, checked, written to settings.json, and then forgotten on its way. So each has an entry in the
table below: another value, what it acts on, and what becomes of that. A new setting fails here until it has one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.commands import ADAPTER, CONFIG, PAIRS, TEXTS, good, write_rows
from support.observed import Seen, observe

from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.frozen.half import HALVES
from minilora.methods.method import known_methods
from minilora.methods.setting import settings_of
from minilora.methods.starts import STARTS
from minilora.model.config import Config
from minilora.runs.settings import DEFAULT_METHOD, Settings, all_settings, read_settings
from minilora.runs.task import load_data
from minilora.training.loss_scale import FIRST
from minilora.training.optimizers import OPTIMIZERS

Look = Callable[..., Seen]
ANOTHER = "whatever, but not what it was"
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
COMMON: dict[str, Any] = {"model": "tiny", "data": "rows", "steps": 2, "eval_rows": 0, "learning_rate": 0.01}
STILL: dict[str, Any] = {"learning_rate": 0.0}  # what is written is what training began with
PLAIN: dict[str, Any] = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "steps": 1}
BY_EPOCHS: dict[str, Any] = {"steps": 0, "epochs": 2.0, "batch_size": 2, "grad_accumulation": 2}  # 7 rows: 2 steps each


class Case(NamedTuple):
    """Another value, what it acts on, what becomes of that (a value, or a function of what it was), and the settings
    that both runs have."""

    value: Any
    acts_on: Callable[[Seen], Any]
    becomes: Any = ANOTHER
    beside: dict[str, Any] = {}


# --- The runs ---


def pairs(names: list[str], prompt: str = "prompt", completion: str = "completion") -> list[dict[str, Any]]:
    return [{prompt: f"{name} ->", completion: f" {name.upper()}"} for name in names]


def chat(word: str) -> list[dict[str, str]]:
    """Two questions with the same answer."""
    return [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}] * 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all runs start in: models, data and an adapter, named as in the table."""
    place = tmp_path_factory.mktemp("place")
    for name, raw in {"tiny": CONFIG, "other": CONFIG | {"intermediate_size": 40}}.items():
        config = Config.from_dict(raw)
        write_checkpoint(place / name, raw, random_weights(config, 0, "bfloat16", 0.3), "bfloat16")
        train_tokenizer(TEXTS * 3, config.vocab_size, place / name)
    for part, words in {
        "train": "one two six four five odd even".split(),
        "valid": "up down on".split(),
        "test": "left right and are".split(),
    }.items():
        asked = [a | b for a, b in zip(pairs(words), pairs(words[::-1], "ask", "tell"), strict=True)]
        for name, rows in {
            "rows": pairs(words),
            "chats": [{"messages": chat(word)} for word in words],
            "two kinds of pairs": asked,
            "two texts": [{"text": "one", "body": word} for word in words],
            "two chats": [{"messages": chat("one"), "turns": chat(word)} for word in words],
        }.items():
            write_rows(place / name / f"{part}.jsonl", rows)
    write_rows(place / "others" / "train.jsonl", PAIRS)
    write_rows(place / "one file.jsonl", pairs([f"{a} {b}" for a in "abcde" for b in "vwxyz"]))
    (place / "book.txt").write_text("\n".join(TEXTS * 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        good("train", "--model", "tiny", "--data", "rows", "--steps", 1, "--eval-rows", 0, "--out", "learnt")
    return place


@pytest.fixture(scope="module")
def look(place: Path) -> Iterator[Look]:
    """Runs with such settings, each made once, on a machine without CuPy and with a log for TensorBoard."""
    seen: dict[str, Seen] = {}

    def look(values: dict[str, Any]) -> Seen:
        key = json.dumps(COMMON | values, sort_keys=True)
        if key not in seen:
            seen[key] = observe(place / "runs" / str(len(seen)), COMMON | values)
        return seen[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setitem(sys.modules, "cupy", None)
        patch.setitem(sys.modules, "tensorboardX", log_for_tensorboard())
        yield look


def log_for_tensorboard() -> ModuleType:
    """tensorboardX as far as a run needs it: it makes its folder, and logs nothing."""

    def writer(folder: str, **options: Any) -> SimpleNamespace:
        Path(folder).mkdir()
        return SimpleNamespace(add_scalar=lambda *arguments: None, close=lambda: None)

    module = ModuleType("tensorboardX")
    module.__spec__ = ModuleSpec("tensorboardX", None)
    module.__dict__["SummaryWriter"] = writer
    return module


# --- What the settings act on ---


def rows_of_a_step(seen: Seen) -> list[int]:
    """How many rows each micro-batch of the first step has."""
    return [len(batch.tokens) for batch in seen.steps[0].batches]


def steps(seen: Seen) -> int:
    return len(seen.steps)


def rates(seen: Seen) -> list[float]:
    return seen.figures("learning_rate")


def size_of_A(seen: Seen) -> float:
    return seen.size("lora_A")


def size_of_B(seen: Seen) -> float:
    return seen.size("lora_B")


def written(seen: Seen) -> dict[str, bytes]:
    return {name: p.tobytes() for name, p in seen.written.items()}


def modules(seen: Seen) -> list[str]:
    """What is adapted: the modules' names, from the layer on."""
    return sorted({name.removeprefix("model.layers.").partition("_proj")[0] for name in seen.arrays})


def ranks(seen: Seen) -> list[int]:
    """The smaller sides of the matrices at two modules."""
    return [min(p.shape) for m in (Q, UP) for name, p in seen.arrays.items() if name.startswith(m) and p.ndim == 2]


def held(seen: Seen) -> list[str]:
    return [type(seen.frozen_at(module)).__name__ for module in (Q, UP)]


def at(attribute: str) -> Callable[[Seen], list[Any]]:
    """An attribute of the sites at two modules."""
    return lambda seen: [seen.at(Q, attribute), seen.at(UP, attribute)]


def times(factor: float) -> Callable[[Any], Any]:
    """So many times what it was."""
    return lambda before: pytest.approx(np.multiply(factor, before), rel=1e-4)


def learnt(before: Any) -> dict[str, bytes]:
    """The adapter of that name."""
    return {name: p.tobytes() for name, p in load_file(f"learnt/{ADAPTER}").items()}


CASES: dict[str, list[Case]] = {
    # of every run
    "model": [Case("other", lambda seen: seen.run.base.config.intermediate_size, 40)],
    "revision": [Case("v1", lambda seen: "--revision v1 goes with a model of the H" in seen.refusal, True)],  # a folder
    "data": [Case("others", lambda seen: seen.texts, [row["prompt"] + row["completion"] for row in PAIRS])],
    "prompt_feature": [
        Case("ask", lambda seen: seen.texts[0], "even -> ONE", {"data": "two kinds of pairs"}),
    ],
    "completion_feature": [
        Case("tell", lambda seen: seen.texts[0], "one -> EVEN", {"data": "two kinds of pairs"}),
    ],
    "text_feature": [Case("body", lambda seen: seen.texts[1], "two", {"data": "two texts"})],
    "chat_feature": [Case("turns", lambda seen: "TWO" in seen.texts[1], True, {"data": "two chats"})],
    "train_on": [
        Case("everything", lambda seen: seen.not_labelled, [0, 0, 0]),
        Case("last-turn", lambda seen: seen.labels, times(1 / 2), {"data": "chats"}),
    ],
    "date": [Case("2001-02-03", lambda seen: str(seen.run.tokenizer.now.date()), "2001-02-03")],
    "untie": [Case(True, lambda seen: "--untie" in seen.refusal, False, {"modules_to_save": ("lm_head",)})],
    "adapter": [Case("learnt", written, learnt, STILL)],
    "format": [Case("mlx", lambda seen: "adapters.safetensors" in seen.files, True)],
    "steps": [Case(3, steps, 3)],
    "epochs": [Case(1.5, steps, 3, BY_EPOCHS)],
    "batch_size": [
        Case(2, rows_of_a_step, [2]),
        Case(2, lambda seen: [len(batch.tokens) for batch in seen.run.task.valid], [2, 1]),
    ],
    "grad_accumulation": [
        Case(3, rows_of_a_step, [2, 2, 2], {"batch_size": 2}),
        Case(3, steps, 4, {"steps": 0, "epochs": 2.0, "batch_size": 2}),  # of 6 rows and of 1, twice
    ],
    "learning_rate": [Case(0.03, rates, times(3)), Case(0.03, size_of_B, times(3), PLAIN)],
    "optimizer": [
        Case(name, lambda seen: type(seen.run.state.optimizer), rule)
        for name, rule in OPTIMIZERS.items()
        if name != "adamw"
    ],
    "schedule": [
        Case("linear", rates, pytest.approx([0.01, 0.0075, 0.005, 0.0025]), {"steps": 4, "warmup": 0.0}),
        Case("constant", rates, [0.01] * 4, {"steps": 4, "warmup": 0.0}),
        Case("linear", size_of_B, ANOTHER, PLAIN | {"steps": 2}),
    ],
    "warmup": [
        Case(2.0, rates, pytest.approx([0.01 / 3, 0.02 / 3, 0.01]), {"steps": 3, "schedule": "constant"}),
        Case(1.0, size_of_B, times(1 / 2), PLAIN),
        Case(0.5, rates, pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01]), BY_EPOCHS | {"schedule": "constant"}),
    ],
    "weight_decay": [Case(0.5, size_of_A, times((1 - 0.01 * 0.5) / (1 - 0.01 * 0.01)), PLAIN)],
    "max_grad_norm": [Case(0.001, size_of_B, pytest.approx(0.01 * 0.001, rel=1e-3), PLAIN)],
    "max_length": [Case(16, lambda seen: seen.longest, [16, 16, 16], {"data": "book.txt"})],
    "packing": [Case(True, lambda seen: max(map(len, seen.run.task.rows)) > 1, True)],
    "activation_checkpointing": [Case(True, lambda seen: seen.steps[0].layer_runs, times(2))],
    "eval_every": [Case(5, lambda seen: seen.figures("step", of="valid_loss"), [5, 10, 12], {"steps": 12})],
    "eval_rows": [Case(2, lambda seen: seen.printed.count(" right: "), 2)],
    "patience": [Case(2, steps, 3, STILL | {"steps": 6, "eval_every": 1})],
    "save_every": [Case(2, lambda seen: seen.saved, [0, 2, 4, 5], {"steps": 5})],
    "report_to": [Case("tensorboard", lambda seen: "tensorboard" in seen.files, True)],
    "inspect": [Case(False, lambda seen: "changes" in seen.found, False)],
    "seed": [
        Case(1, written, ANOTHER, STILL),
        Case(1, lambda seen: seen.steps[0].batches[0].tokens.tolist(), ANOTHER, {"batch_size": 2}),
        Case(1, lambda seen: [*seen.run.task.held_out_rows], ANOTHER, {"data": "one file.jsonl"}),
    ],
    "device": [Case("cuda", lambda seen: "minilora[cuda12]" in seen.refusal, True)],
    "dtype": [
        Case("float64", lambda seen: {p.dtype.name for p in seen.arrays.values()}, {"float64"}),
        Case("float64", lambda seen: seen.frozen_at(Q).dense().dtype.name, "float64"),
    ],
    "frozen": [
        Case(name, held, [kind] * 2)
        for name, kind in {
            "stored": "StoredWeight",
            "nf4": "NF4Weight",
            "offloaded": "StoredWeight",
            "mapped": "MappedWeight",
        }.items()
    ],
    "mixed_precision": [
        Case("bf16", lambda seen: getattr(seen.frozen_at(Q), "half", None), HALVES["bf16"]),
        Case("fp16", lambda seen: getattr(seen.frozen_at(Q), "half", None), HALVES["fp16"]),
        Case("fp16", lambda seen: seen.run.state.loss_scale.value, FIRST),
    ],
    # of methods
    "target_modules": [
        Case(("q_proj", "up_proj"), modules, ["0.mlp.up", "0.self_attn.q", "1.mlp.up", "1.self_attn.q"]),
        Case((r"model\.layers\.1\..*(q|up)_proj",), modules, ["1.mlp.up", "1.self_attn.q"]),
    ],
    "exclude_modules": [
        Case(("q_proj", "mlp.up_proj"), modules, lambda before: [m for m in before if not m.endswith((".q", ".up"))])
    ],
    "num_layers": [Case(1, modules, lambda before: [module for module in before if module.startswith("1.")])],
    "modules_to_save": [Case(("norm",), lambda seen: "model.norm.weight" in seen.arrays, True)],
    "rank": [Case(4, ranks, lambda before: [4] * len(before))],
    "alpha": [Case(64.0, at("scale"), times(4))],
    "dropout": [Case(0.5, at("dropout"), [0.5, 0.5]), Case(0.5, lambda seen: seen.figures("grad_norm")[0])],
    "init": [Case(name, written, ANOTHER, STILL) for name in STARTS if name != "kaiming"],
    "rslora": [Case(True, at("scale"), times(math.sqrt(8)))],
    "loraplus_lr_ratio": [Case(4.0, size_of_B, times(4), PLAIN | {"max_grad_norm": 0.0})],
    "rank_pattern": [Case({"q_proj": 4}, ranks, [4, 4, 8, 8])],
    "alpha_pattern": [Case({"q_proj": 64.0}, at("scale"), [8.0, 2.0])],
    "train_norms": [Case(True, lambda seen: "model.norm.weight" in seen.arrays, True)],
    "bottleneck_size": [Case(3, lambda seen: {min(p.shape) for p in seen.arrays.values() if p.ndim == 2}, {3})],
    "random_share": [Case(0.4, lambda seen: sum(p.size for p in seen.arrays.values()), round(0.4 * 15_360))],
    "num_virtual_tokens": [Case(3, lambda seen: [len(p) for p in seen.arrays.values()], [3])],
    "init_text": [
        Case("one two", lambda seen: seen.run.tokenizer.decode(getattr(seen.run.method, "text", ())), "one two"),
        Case("one two", written, ANOTHER, STILL),
    ],
    # of one method, where they are another thing
    "random.seed": [Case(1, lambda seen: seen.at(Q, "chosen").o.tolist())],
    "head.modules_to_save": [
        Case(("norm",), lambda seen: "--modules-to-save" in seen.refusal, True)
    ],  # its name says it
}
OF_METHODS = {cls: name for name, cls in reversed(known_methods().items())}  # a name for each class
SETTINGS = [
    *((DEFAULT_METHOD().name, name) for name in settings_of(Settings)),
    *((method, name) for cls, method in OF_METHODS.items() for name in settings_of(cls)),
]


@pytest.mark.parametrize(("method", "name"), dict.fromkeys(SETTINGS))
def test_another_value_of_a_setting_changes_what_it_is_there_for(look: Look, method: str, name: str) -> None:
    for value, acts_on, becomes, beside in CASES.get(f"{method}.{name}") or CASES[name]:
        beside = beside if method == DEFAULT_METHOD().name else {"method": method} | beside
        plain, changed = look(beside), look(beside | {name: value})
        before, after = acts_on(plain), acts_on(changed)
        assert after != before
        if becomes is not ANOTHER:
            assert after == (becomes(before) if isinstance(becomes, FunctionType) else becomes)
        assert changed.refusal or read_settings(changed.folder) == changed.run.settings  # so that it is resumed with it


def test_every_choice_of_a_setting_is_tried_above() -> None:
    for name, known in all_settings().items():
        if known.declaration.choices and name not in ("method", "device"):  # methods are below; few machines have CUDA
            assert {known.default, *(case.value for case in CASES[name])} == set(known.declaration.choices), name


@pytest.mark.parametrize("name", known_methods())
def test_each_method_is_the_one_that_is_run_with_the_settings_that_its_name_stands_for(look: Look, name: str) -> None:
    run = look({"method": name, "untie": True}).run
    assert type(run.method) is known_methods()[name]
    assert {key: p.shape for key, p in run.state.trainable.items()} == run.method.shapes(run.base.config)
    meant = run.method.names[name]
    assert {setting: run.settings.values()[setting] for setting in meant} == meant


def test_the_seed_decides_the_rows_of_the_built_in_task() -> None:
    one, same, other = (load_data(Settings(seed=seed)).train[:5] for seed in (1, 1, 2))
    assert one == same != other
