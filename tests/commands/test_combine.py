"""The command combine: one adapter out of several, and what cannot be combined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapter_folders import DENSE, combined
from support.commands import assert_refused, contents, good, run
from support.strategies import QV

from minilora.formats.library import named_adapters
from minilora.formats.load import load_model
from minilora.formats.peft import read_adapter, write_adapter
from minilora.lora import delta
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.lora_embedding import adapter_names


def change_of(folders: Sequence[Path], module: str) -> np.ndarray:
    """The sum of the adapters' ΔW at a module, formed."""
    total = np.zeros(())
    for method, trained, *_ in (read_adapter(folder, DENSE) for folder in folders):
        if place := method.places(DENSE).get(module):
            total = total + delta(*(trained[name] for name in adapter_names(module)), place.scale)
    return total


def test_a_lower_rank_reports_the_error_that_it_has(folder: Path, tmp_path: Path) -> None:
    printed = combined(folder, tmp_path / "out", "--combination-type", "svd", "--rank", 2)
    report = json.loads((tmp_path / "out" / "combine.json").read_text())
    lost = whole = 0.0
    for module, error in report["relative_error_by_module"].items():
        dW = change_of([folder / "a", folder / "b"], module)
        off = np.linalg.norm(dW - change_of([tmp_path / "out"], module))
        assert 0.01 < error == pytest.approx(off / np.linalg.norm(dW), rel=1e-4)
        lost, whole = lost + off**2, whole + np.linalg.norm(dW) ** 2
    assert report["relative_error"] == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
    assert f"{report['relative_error']:.2%}" in printed and "6 modules of rank 2" in printed


def test_the_rank_is_that_of_the_largest_adapter_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    assert "rank 3 to 4" in combined(folder, tmp_path / "out", "--combination-type", "svd")
    report = json.loads((tmp_path / "out" / "combine.json").read_text())
    at_q, at_v = (report["relative_error_by_module"][f"model.layers.0.self_attn.{end}"] for end in ("q_proj", "v_proj"))
    assert at_q < 1e-6 < 0.01 < at_v  # of rank 4, and of 4 + 2


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        (LoRA(2, target_modules=QV, rank_pattern={"v_proj": 6}), 6),  # more than the rank of all others
        (LoRA(9, target_modules=QV, rank_pattern={".*": 5}), 5),  # the rank of none
        (LoRA(5, target_modules=QV), 5),
    ],
)
def test_the_rank_of_an_adapter_is_that_of_its_modules_whatever_its_patterns_say(
    folder: Path, tmp_path: Path, settings: LoRA, largest: int
) -> None:
    base, _ = load_model(folder / "base")
    rng = np.random.default_rng(0)
    trained = {name: rng.standard_normal(shape, np.float32) for name, shape in settings.shapes(base.config).items()}
    write_adapter(tmp_path / "d", settings, trained, DENSE, str(folder / "base"))
    flags = ("--adapter", folder / "a", "--adapter", tmp_path / "d", "--combination-type", "svd")
    good("combine", *flags, "--out", tmp_path / "out")
    method, tensors, *_ = read_adapter(tmp_path / "out", DENSE)
    at_v = "model.layers.0.self_attn.v_proj"  # where both add up to more
    assert max(place.rank for place in method.places(DENSE).values()) == method.places(DENSE)[at_v].rank == largest
    assert len(tensors[adapter_names(at_v)[0]]) == largest


def test_modules_that_several_adapters_change_are_named(folder: Path, tmp_path: Path) -> None:
    printed = combined(folder, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "combine.json").read_text())
    assert report["overlapping_modules"] == [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    assert "2 of them are changed by more than one adapter" in printed and "v_proj" in printed
    assert [(each["name"], each["weight"]) for each in report["adapters"]] == [("a", 1.0), ("b", 1.0)]
    printed = good("combine", "--adapter", folder / "a", "--adapter", folder / "c", "--out", tmp_path / "apart")
    assert "no module is changed by more than one adapter" in printed


def copy_of(source: Path, target: Path, **changes: Any) -> Path:
    """An adapter whose config says something else."""
    target.mkdir(parents=True)
    for name, content in contents(source).items():
        (target / name).write_bytes(content)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({"base_model_name_or_path": "other/base"}, False),
        ({"revision": "an-older-one"}, False),
        ({"revision": None}, True),
        ({"base_model_name_or_path": None}, True),
        ({}, True),
    ],
)
def test_adapters_that_name_different_bases_are_not_combined_unless_forced(
    folder: Path, tmp_path: Path, change: dict[str, Any], fits: bool
) -> None:
    one = copy_of(folder / "a", tmp_path / "one", revision="abc")
    other = copy_of(folder / "b", tmp_path / "other", **{"revision": "abc"} | change)
    flags = ["--adapter", one, "--adapter", other, "--out", tmp_path / "out", "--model", folder / "base"]
    result = run("combine", *flags)
    if fits:
        assert result.code == 0
    else:
        assert_refused(result, "one was trained on", "--force")
        assert not (tmp_path / "out").exists()
        good("combine", *flags, "--force")
    assert read_adapter(tmp_path / "out", DENSE).method.scale == 1


def test_a_path_written_two_ways_is_one_base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    copy_of(folder / "b", tmp_path / "other", base_model_name_or_path="./base/")
    good("combine", "--adapter", folder / "a", "--adapter", tmp_path / "other", "--out", tmp_path / "out")


def test_what_cannot_be_combined_is_named(folder: Path, tmp_path: Path) -> None:
    base, _ = load_model(folder / "base")
    for name, method in {
        "saved": LoRA(2, modules_to_save=("norm",), target_modules=QV),
        "dora": DoRA(2, target_modules=QV),
    }.items():
        write_adapter(
            tmp_path / name, method, method.start(base, np.random.default_rng(0)), DENSE, str(folder / "base")
        )
    copy_of(folder / "a", tmp_path / "prefix", peft_type="PREFIX_TUNING")
    for name, named in {"saved": "modules_to_save (norm)", "dora": "dora", "prefix": "prefix"}.items():
        flags = ["--adapter", folder / "a", "--adapter", tmp_path / name, "--out", tmp_path / "out"]
        assert_refused(run("combine", *flags), named, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--adapter", "a"], "--adapter is given 1 times"),
        (["--adapter", "a", "--adapter", "b", "--weights", "1"], "--weights 1"),
        (["--adapter", "a", "--adapter", "b", "--weights", "1", "nan"], "--weights 1 nan"),
        (["--adapter", "a", "--adapter", "b", "--rank", "2"], "--rank 2 goes with --combination-type svd"),
        (["--adapter", "a", "--adapter", "b", "--rank", "-1", "--combination-type", "svd"], "--rank -1"),
        (["--adapter", "a", "--adapter", "a"], "'a' is taken"),
        (["--adapter", "base=a", "--adapter", "b"], "'base' is that of the model"),
        (["--adapter", "=a", "--adapter", "b"], "is empty"),
        (["--adapter", "a", "--adapter", "nowhere"], "nowhere: no such folder"),
        (["--adapter", "a", "--adapter", "b", "--out", "a"], "--out a exists"),
        (["--adapter", "a", "--adapter", "b", "--model", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_in_combining_is_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], named: str
) -> None:
    monkeypatch.chdir(folder)
    assert_refused(run("combine", "--out", "new", *flags), named)
    assert not (folder / "new").exists()


def test_names_are_chosen_or_those_of_the_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert named_adapters(["a", "mine=a", "./b/"]) == {"a": Path("a"), "mine": Path("a"), "b": Path("./b/")}
