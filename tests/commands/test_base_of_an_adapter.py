"""An adapter knows its base: commands without --model take the one that its folder names, and say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from support.commands import assert_refused, good, read, run

from minilora.formats.load import SHIPPED_MODEL

COMMANDS = {
    "evaluate": lambda data, out: ("--data", data / "pairs.jsonl", "--eval-rows", 2),
    "generate": lambda data, out: ("--prompt", "up ->", "--max-tokens", 3),
    "merge": lambda data, out: ("--out", out),
    "convert": lambda data, out: ("--format", "mlx", "--out", out),
}
each_command = pytest.mark.parametrize("command", COMMANDS)


def named(adapter: Path, folder: Path, base: object) -> Path:
    """A copy of the adapter that names another base."""
    shutil.copytree(adapter, folder)
    config = read(folder / "adapter_config.json") | {"base_model_name_or_path": base and str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@each_command
def test_without_a_model_the_base_that_the_adapter_names_is_taken_and_told(
    command: str, adapter: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    result = run(command, "--adapter", adapter, *COMMANDS[command](data, tmp_path / "out"))
    assert result.code == 0, result.err
    assert f"base: {model}, which {adapter} names" in result.err
    told = good(command, "--model", model, "--adapter", adapter, *COMMANDS[command](data, tmp_path / "again"))
    assert told.replace("again", "out") == result.out


@each_command
def test_a_base_that_is_not_here_is_told_by_its_name_and_the_flag_that_finds_it(
    command: str, adapter: Path, data: Path, tmp_path: Path
) -> None:
    folder = named(adapter, tmp_path / "adapter", "/nowhere/to/be/found")
    result = run(command, "--adapter", folder, *COMMANDS[command](data, tmp_path / "out"))
    assert_refused(result, str(folder), "/nowhere/to/be/found", "--model")


@each_command
def test_an_adapter_that_names_no_base_asks_for_one(command: str, adapter: Path, data: Path, tmp_path: Path) -> None:
    folder = named(adapter, tmp_path / "adapter", None)
    assert_refused(
        run(command, "--adapter", folder, *COMMANDS[command](data, tmp_path / "out")), str(folder), "--model"
    )


def test_the_shipped_model_is_found_wherever_minilora_is_installed(adapter: Path, tmp_path: Path) -> None:
    """An adapter of tinysmol that was trained elsewhere names a folder of that machine."""
    folder = named(adapter, tmp_path / "adapter", "/another/machine/weights/tinysmol")
    result = run("generate", "--adapter", folder, "--prompt", "up ->", "--max-tokens", 2)
    assert "does not fit" in result.err or "tinysmol" in result.err
    assert "/another/machine" not in result.err.splitlines()[-1]
    assert SHIPPED_MODEL.exists()


def test_adapters_that_name_different_bases_ask_for_the_model(adapter: Path, tmp_path: Path) -> None:
    other = named(adapter, tmp_path / "other", "another/base")
    result = run("generate", "--adapter", adapter, "--adapter", other, "--prompt", "up ->")
    assert_refused(result, "another/base", "--model")


def test_a_base_of_the_same_shape_and_other_weights_is_told(adapter: Path, model: Path, tmp_path: Path) -> None:
    """Two models of one shape would pass in silence. A copy of the base is the base, wherever it lies."""
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(model, copy)
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: -weights[name]}, other / "model.safetensors")
    flags = ("--adapter", adapter, "--prompt", "up ->", "--max-tokens", 1)
    assert "other weights" not in run("generate", "--model", copy, *flags).err
    told = run("generate", "--model", other, *flags)
    assert (
        told.code == 0 and f"{adapter} was trained on a base with other weights" in told.err and str(other) in told.err
    )
