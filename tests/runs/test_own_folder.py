"""A run's folder is its own: one process writes there, what it is made from is checked, and nothing foreign is lost."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import ADAPTER, PAIRS, assert_refused, contents, good, process, read, run, write_rows

from minilora.formats.fingerprint import PIECE, PIECES, fingerprint
from minilora.formats.gguf_file import open_gguf
from minilora.runs.folder import LOCK_FILE, only_run

# --- One writer ---


def test_a_second_process_is_kept_out_of_a_run_until_the_first_has_ended_however_it_ends(
    model: Path, data: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    child = process("train", "--model", model, "--data", data / "pairs.jsonl", "--steps", 100_000, "--out", cut)
    while child.poll() is None and not (cut / "metrics.jsonl").exists():
        time.sleep(0.01)
    try:
        assert_refused(run("train", "--resume", cut), str(cut), "another process")
    finally:
        child.kill()
        child.communicate()
    assert (cut / LOCK_FILE).exists(), "a kill leaves the file"
    with only_run(cut):
        pass
    assert not (cut / LOCK_FILE).exists()


def test_of_two_runs_that_begin_in_one_folder_at_once_the_second_is_refused(
    train: Any, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first begins while the second is reading its data."""
    before: dict[str, bytes] = {}

    def prepared_late(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        shutil.copytree(whole, tmp_path / "taken")
        before.update(contents(tmp_path / "taken"))
        return prepared

    whole = train("pairs.jsonl", out="whole")
    from minilora.runs.run import prepare

    monkeypatch.setattr("minilora.train.prepare", prepared_late)
    flags = ("--model", model, "--data", data / "pairs.jsonl", "--steps", 1, "--out", tmp_path / "taken")
    assert_refused(run("train", *flags), str(tmp_path / "taken"), "another process has begun")
    assert contents(tmp_path / "taken") == before


def test_a_folder_that_is_gone_is_not_made_again_with_half_a_run_in_it(
    train: Any, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removing(*arguments: Any) -> Any:
        shutil.rmtree(tmp_path / "run")
        return take_step(*arguments)

    from minilora.training.loop import take_step

    monkeypatch.setattr("minilora.training.loop.take_step", removing)
    flags = ("--model", model, "--data", data / "pairs.jsonl", "--steps", 1, "--out", tmp_path / "run")
    assert_refused(run("train", *flags), str(tmp_path / "run"), "is gone")
    assert not (tmp_path / "run").exists()


# --- What a run is made from ---


@pytest.fixture
def cut(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped at its first step, on a model and rows of its own, which a test may change."""
    shutil.copytree(model, tmp_path / "model")
    for part, rows in {"train": PAIRS[:3], "valid": PAIRS[3:4], "test": PAIRS[4:]}.items():
        write_rows(tmp_path / "data" / f"{part}.jsonl", rows)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minilora.training.loop.take_step", killed)
        flags = ("--model", tmp_path / "model", "--data", tmp_path / "data", "--steps", 2, "--eval-rows", 0)
        assert run("train", *flags, "--out", tmp_path / "run").code == 130
    return tmp_path / "run"


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    weights = {name: np.array(p * np.float32(1.5), p.dtype) if "up_proj" in name else p for name, p in weights.items()}
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})


def change_config(folder: Path) -> None:
    config = read(folder / "model" / "config.json")
    (folder / "model" / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))


def change_setting(folder: Path) -> None:
    values = read(folder / "run" / "settings.json")
    (folder / "run" / "settings.json").write_text(json.dumps(values | {"learning_rate": 0.1}))


def change_rows(part: str) -> Callable[[Path], Path]:
    return lambda folder: write_rows(folder / "data" / f"{part}.jsonl", PAIRS[1:4])


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (change_weights, "the base model has changed"),
    "configuration": (change_config, "the base model has changed"),
    "training rows": (change_rows("train"), "the data has changed"),
    "validation rows": (change_rows("valid"), "the validation data has changed"),
    "settings": (change_setting, "its settings have changed (learning_rate was 0.0005)"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_does_not_go_on_with_other_things_than_it_began_with(what: str, cut: Path) -> None:
    change, named = CHANGES[what]
    change(cut.parent)
    before = contents(cut)
    assert_refused(run("train", "--resume", cut), str(cut / "state.safetensors"), named)
    assert contents(cut) == before


def test_a_run_goes_on_where_its_model_and_rows_have_moved_to(cut: Path, tmp_path: Path) -> None:
    shutil.copytree(cut, tmp_path / "same")
    good("train", "--resume", tmp_path / "same")
    for name in ("model", "data"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    values = read(cut / "settings.json")
    moved = {name: str(tmp_path / f"moved-{name}") for name in ("model", "data")}
    (cut / "settings.json").write_text(json.dumps(values | moved))
    good("train", "--resume", cut)
    assert (cut / ADAPTER).read_bytes() == (tmp_path / "same" / ADAPTER).read_bytes()


def test_another_number_of_cores_is_remarked(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.runs.run.cores", lambda: 3)
    result = run("train", "--resume", cut)
    assert result.code == 0 and "here are 3" in result.err and "OPENBLAS_NUM_THREADS=" in result.err


# --- The fingerprint of a base ---


def test_copies_have_one_fingerprint_however_they_are_cut_and_other_models_have_another(
    model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    assert fingerprint(tmp_path / "model") == fingerprint(model)
    good("convert", "--model", model, "--dtype", "bfloat16", "--out", tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(model)
    change_weights(tmp_path)
    assert fingerprint(tmp_path / "model") != fingerprint(model)
    good("random_checkpoint", model / "config.json", "--out", tmp_path / "random", "--tokenizer", model)
    assert fingerprint(tmp_path / "random") not in (fingerprint(tmp_path / "model"), fingerprint(model))


def test_a_change_at_either_end_of_a_large_tensor_changes_the_fingerprint(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    path, name = tmp_path / "model" / "model.safetensors", "model.embed_tokens.weight"
    whole = load_file(path)
    assert whole[name].nbytes > PIECES * PIECE
    for place in (0, -1):
        changed = whole | {name: whole[name].copy()}
        changed[name].reshape(-1)[place] += 1
        save_file(changed, path, {"format": "pt"})
        assert fingerprint(tmp_path / "model") != fingerprint(model)


def test_a_gguf_file_has_a_fingerprint_of_its_tensors(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for name in ("one", "two"):
        good("convert", "--model", model, "--format", "gguf", "--out", tmp_path / name / "model.gguf")
    one, two = tmp_path / "one" / "model.gguf", tmp_path / "two" / "model.gguf"
    assert fingerprint(one) == fingerprint(two)
    tensor = open_gguf(two).tensors["blk.1.ffn_up.weight"]
    changed = bytearray(two.read_bytes())
    changed[tensor.data_offset] ^= 1
    two.write_bytes(changed)
    os.utime(two, (1, 1))
    assert fingerprint(one) != fingerprint(two)


# --- Nothing foreign is lost ---


@pytest.mark.parametrize("what", ["an adapter", "a model", "notes", "a file"])
def test_a_run_does_not_begin_where_something_foreign_is(
    what: str, model: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "taken"
    if what == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        source = {"an adapter": adapter / ADAPTER, "a model": model / "config.json", "notes": data / "book.txt"}[what]
        shutil.copy(source, out)
    before = contents(tmp_path)
    flags = ("--model", model, "--data", data / "pairs.jsonl", "--steps", 1)
    assert_refused(run("train", *flags, "--out", out), f"--out {out}")
    assert contents(tmp_path) == before


def test_an_adapter_is_not_replaced_by_its_own_training(model: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "adapter"
    own.mkdir()
    for name in (ADAPTER, "adapter_config.json"):
        shutil.copy(adapter / name, own)
    before = contents(own)
    flags = ("--model", model, "--data", data / "pairs.jsonl", "--steps", 1, "--adapter", own)
    assert_refused(run("train", *flags, "--out", own), f"--out {own}")
    assert contents(own) == before


@pytest.mark.parametrize("text", ["my notes\n", '{"prompt": "up"}\n', "[1]\n", "\n", b"\xff".decode("latin1")])
def test_answers_do_not_replace_a_file_that_is_not_of_answers(text: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    flags = ("--model", model, "--prompt", "up", "--max-tokens", 1)
    assert_refused(run("generate", *flags, "--out", out), f"--out {out}", "another name")
    assert out.read_text() == text
    good("generate", *flags, "--out", tmp_path / "new.jsonl")
    good("generate", *flags, "--out", tmp_path / "new.jsonl", "--seed", 1)
    assert_refused(run("generate", *flags, "--prompts", out, "--out", tmp_path), f"--out {tmp_path}")


def test_answers_do_not_replace_the_prompts_that_they_answer(model: Path, tmp_path: Path) -> None:
    flags = ("--model", model, "--max-tokens", 1)
    good("generate", *flags, "--prompt", "up", "--out", tmp_path / "file.jsonl")
    before = contents(tmp_path)
    result = run("generate", *flags, "--prompts", tmp_path / "file.jsonl", "--out", tmp_path / "file.jsonl")
    assert_refused(result, "--out", "--prompts")
    assert contents(tmp_path) == before
