"""LoRA's variants from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.commands import ADAPTER, CONFIG, PAIRS, TEXTS, good, run, write_rows
from support.models import Arrays

from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights as checkpoint_weights
from minilora.formats.checkpoint import write_checkpoint
from minilora.model.config import Config
from minilora.training.schedules import learning_rate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, CONFIG, checkpoint_weights(Config.from_dict(CONFIG), seed=0, std=0.3))
    train_tokenizer(TEXTS * 3, CONFIG["vocab_size"], folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for part in ("train", "test"):
        write_rows(folder / f"{part}.jsonl", PAIRS)
    return folder


VARIANTS = {
    "dora": ["--method", "dora"],
    "rslora": ["--rslora", "--rank", 4],
    "loraplus": ["--loraplus-lr-ratio", 4],
    "orthogonal": ["--init", "orthogonal"],
    "pissa": ["--init", "pissa", "--rank", 4],
    "dora from pissa, rslora, loraplus": [
        *("--method", "dora", "--init", "pissa", "--use_rslora", "--loraplus_lr_ratio", 2, "--rank", 4)
    ],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_from_the_command_line_resumes_to_the_same_bytes_and_is_read_back(
    name: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", model, "--data", data, "--steps", 6, "--save-every", 2, "--learning-rate", 0.01]
    flags += ["--eval-rows", 0, *VARIANTS[name]]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    good("train", *flags, "--out", whole)

    def killed_in_the_last_step(step: int, *plan: Any) -> float:
        return learning_rate(step, *plan) if step < 5 else {}["killed"]  # no command catches a KeyError

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("minilora.training.loop.learning_rate", killed_in_the_last_step)
        run("train", *flags, "--out", cut)
    good("train", "--resume", cut)
    assert (cut / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()

    summary = json.loads((whole / "summary.json").read_text())
    assert summary["adapted_loss"] < summary["base_loss"]
    figures = json.loads(good("evaluate", "--model", model, "--adapter", whole, "--data", data, "--json"))
    assert figures["loss"] == pytest.approx(summary["adapted_loss"], rel=1e-4)


def test_the_flags_mean_what_pefts_fields_mean(model: Path, data: Path, tmp_path: Path) -> None:
    written = {}
    for name, flags in VARIANTS.items():
        out = tmp_path / name
        good("train", "--model", model, "--data", data, "--steps", 1, "--eval-rows", 0, *flags, "--out", out)
        config = json.loads((out / "adapter_config.json").read_text())
        written[name] = tuple(config.get(field, False) for field in ("use_dora", "use_rslora", "r", "lora_alpha"))
    assert written == {
        "dora": (True, False, 8, 16),
        "rslora": (False, True, 4, 16),
        "loraplus": (False, False, 8, 16),
        "orthogonal": (False, False, 8, 16),
        "pissa": (False, False, 8, 32),
        "dora from pissa, rslora, loraplus": (True, True, 8, pytest.approx(16 * 2**0.5)),
    }


def test_with_loraplus_the_first_step_of_B_is_longer_by_the_ratio(model: Path, data: Path, tmp_path: Path) -> None:
    def first_step(ratio: float) -> Arrays:
        out = tmp_path / str(ratio)
        flags = "--optimizer sgd --steps 1 --schedule constant --warmup 0 --max-grad-norm 0 --eval-rows 0".split()
        good("train", "--model", model, "--data", data, *flags, "--loraplus-lr-ratio", ratio, "--out", out)
        return load_file(out / ADAPTER)

    plain, plus = first_step(1), first_step(4)
    assert any(p.any() for name, p in plain.items() if "lora_B" in name)
    for name, p in plain.items():
        np.testing.assert_array_equal(plus[name], 4 * p if "lora_B" in name else p)


def test_loraplus_without_a_B_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--model", model, "--data", data, "--out", tmp_path / "run", "--loraplus-lr-ratio")
    result = run("train", *flags, 4, "--method", "full")
    assert result.code == 2 and "--loraplus-lr-ratio is for --method" in result.err
    result = run("train", *flags, 0.5)
    assert result.code == 2 and "--loraplus-lr-ratio 0.5 is less than 1" in result.err
