"""Merging: one folder of plain weights computes what base and adapter compute, and what rounding costs is told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.merging import ADAPTERS, TOKENS, adapter, base, merge

from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import load_adapter
from minilora.formats.load import load_model
from minilora.merge import MUCH
from minilora.methods.bitfit import BitFit
from minilora.methods.lora import LoRA
from minilora.model.model import Model, forward
from minilora.model.names import HEAD
from minilora.runs.evaluation import drift, outside_text

UNTYING = [name for name in ADAPTERS if name not in ("projections", "patterns")]


def logits(model: Model) -> np.ndarray:
    positions = np.broadcast_to(np.arange(6), (2, 6))
    hidden = forward(model, TOKENS, positions, np.ones((2, 6), np.int64), keep=False)[0]
    return np.asarray(model.sites[HEAD].forward(hidden)[0])


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_merged_folder_computes_what_base_and_adapter_compute(tmp_path: Path, name: str, tied: bool) -> None:
    model = base(tmp_path / "base", tied, biases=not tied)
    folder = adapter(tmp_path / "adapter", model, ADAPTERS[name])
    assert merge(model, folder, tmp_path / "out", "--untie") == 0
    expected = logits(load_adapter(load_model(model)[0], folder))
    assert not np.allclose(expected, logits(load_model(model)[0]), atol=1e-2)
    np.testing.assert_allclose(logits(load_model(tmp_path / "out")[0]), expected, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] == (tied and name not in UNTYING)


@pytest.mark.parametrize("name", UNTYING)
def test_a_tied_model_is_untied_only_where_that_is_asked_for(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base(tmp_path / "base", tied=True)
    assert merge(model, adapter(tmp_path / "adapter", model, ADAPTERS[name]), tmp_path / "out") == 2
    assert "--untie" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_biases_for_which_a_kind_of_model_has_no_place_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("qwen2", "mistral", "llama"):
        model = base(tmp_path / kind, tied=True, model_type=kind, rope_theta=1e4)
        folder = adapter(tmp_path / f"adapter of {kind}", model, BitFit())
        merged = merge(model, folder, tmp_path / f"merged {kind}")
        if kind == "llama":
            assert merged == 0
        else:
            assert merged == 2 and f"of type {kind} has no place for these biases" in capsys.readouterr().err
            assert not (tmp_path / f"merged {kind}").exists()


def test_what_rounding_costs_is_measured_on_the_very_weights_that_are_written(tmp_path: Path) -> None:
    model = base(tmp_path / "base", tied=True)
    folder = adapter(tmp_path / "adapter", model, ADAPTERS["projections"])
    seen = []
    for dtype in ("float32", "float16", "bfloat16"):
        assert merge(model, folder, tmp_path / dtype, "--dtype", dtype) == 0
        report = json.loads((tmp_path / dtype / "merge.json").read_text())
        before, exact, written = (
            load_file(each / "model.safetensors") for each in (model, tmp_path / "float32", tmp_path / dtype)
        )
        assert {tensor.dtype.name for tensor in written.values()} == {dtype}
        changed = [name for name in before if "_proj" in name]
        lost = sum(((written[n].astype(np.float64) - exact[n]) ** 2).sum() for n in changed)
        update = sum(((exact[n] - before[n].astype(np.float64)) ** 2).sum() for n in changed)
        assert math.isclose(report["lost_share_of_update"], math.sqrt(lost / update), rel_tol=1e-3, abs_tol=1e-12)
        same = sum(int((written[n].astype(np.float32) == before[n]).sum()) for n in changed)
        assert report["unchanged_share"] == same / sum(before[n].size for n in changed)
        seen.append(report["largest_logit_difference"])
    assert seen[0] < 1e-4 < seen[1] < seen[2] < report["largest_logit"]


def test_a_merge_of_an_update_that_bfloat16_cannot_hold_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base(tmp_path / "base", tied=True, dtype="bfloat16")
    method = LoRA(2, 1e-3, target_modules=("all-linear",))
    assert merge(model, adapter(tmp_path / "adapter", model, method), tmp_path / "out", "--dtype", "bfloat16") == 0
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["unchanged_share"] > 0.5 and report["lost_share_of_update"] > 0.5
    assert "much of what was learnt is lost" in capsys.readouterr().err


def test_a_merge_is_judged_by_what_it_costs_not_by_the_share_of_the_norm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding is random, the update is not: much of its norm may be lost and nearly nothing of its effect."""
    model = base(tmp_path / "base", tied=True, dtype="bfloat16")
    folder = adapter(tmp_path / "adapter", model, LoRA(2, 0.05, target_modules=("all-linear",)))
    assert merge(model, folder, tmp_path / "out", "--dtype", "bfloat16") == 0
    report, told = json.loads((tmp_path / "out" / "merge.json").read_text()), capsys.readouterr()
    base_model, merged = load_model(model)[0], load_model(tmp_path / "out")[0]
    adapted, texts = load_adapter(base_model, folder), outside_text(Tokenizer.load(model))
    assert math.isclose(report["adapter_kl"], drift(adapted, base_model, texts), rel_tol=1e-2)
    assert math.isclose(report["rounding_kl"], drift(adapted, merged, texts), rel_tol=1e-2, abs_tol=1e-7)
    assert report["lost_share_of_update"] > 0.1
    assert report["rounding_kl"] < MUCH * report["adapter_kl"]
    assert "much of what was learnt" not in told.err
    assert f"{report['rounding_kl']:.2g} nats a token" in told.out
