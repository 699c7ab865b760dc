"""The commands on models with a prefix or a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import RUN_FILES, contents, good, run
from support.tiny_runs import interrupted_after

from minilora.runs import folder as folder_module


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_train_generate_evaluate_and_resume_know_virtual_tokens_and_merge_refuses_them(
    method: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--model", model, "--data", data / "pairs.jsonl", "--method", method, "--num-virtual-tokens", 3]
    flags += ["--packing", "--activation-checkpointing", "--learning-rate", 0.05, "--eval-rows", 2]
    good("train", *flags, "--steps", 6, "--out", tmp_path / "whole")
    assert set(contents(tmp_path / "whole")) == RUN_FILES
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    width = {"prefix": 2 * 2 * 2 * 8, "prompt": 32}[method]
    assert summary["trainable_parameters"] == 3 * width
    assert summary["drift_kl"] > 0

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_state", interrupted_after(3))
        assert run("train", *flags, "--steps", 6, "--save-every", 3, "--out", tmp_path / "again").code == 130
    assert learnt(tmp_path / "again") != learnt(tmp_path / "whole")
    good("train", "--resume", tmp_path / "again")
    assert learnt(tmp_path / "again") == learnt(tmp_path / "whole")

    adapted = ["--model", model, "--adapter", tmp_path / "whole"]
    assert "drift_kl" in good("evaluate", *adapted, "--data", data / "pairs.jsonl")
    good("generate", *adapted, "--prompt", "up ->", "--max-tokens", 3)
    refused = run("generate", *adapted, "--prompt", "one " * 70)
    assert (refused.code, "the model sees 61" in refused.err) == (2, True)
    refused = run("merge", *adapted, "--out", tmp_path / "merged")
    assert (refused.code, "cannot be merged" in refused.err) == (2, True)
    refused = run("train", *flags[:-1], 0.1, "--num-virtual-tokens", 63, "--out", tmp_path / "none")
    assert refused.code == 2


def learnt(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_an_initial_text_is_what_the_virtual_tokens_start_as(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--data", data / "pairs.jsonl", "--method", "prompt", "--num-virtual-tokens", 4]
    for text, out in (("up", "one"), ("up", "same"), ("down", "other")):
        flags_of_text = ["--prompt-tuning-init-text", text, "--steps", 1, "--learning-rate", 0, "--eval-rows", 0]
        good("train", *flags, *flags_of_text, "--out", tmp_path / out)
    assert learnt(tmp_path / "one") == learnt(tmp_path / "same") != learnt(tmp_path / "other")
