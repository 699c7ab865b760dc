"""Merging: one folder of plain weights computes what base and adapter compute, and what rounding costs is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.strategies import QV

from minilora.backend import to_host
from minilora.data.tokenizer import save_tokenizer_files
from minilora.formats.adapters import load_adapter, write_method
from minilora.formats.checkpoint import random_weights, read_config, write_checkpoint
from minilora.formats.load import SHIPPED_MODEL, load_model
from minilora.merge import main
from minilora.methods.lora import LoRA
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import HEAD

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TOKENS = np.arange(12).reshape(2, 6) * 97 % 4096
ADAPTERS = {
    "projections": LoRA(2, 8.0, target_modules=("all-linear",)),
    "patterns": LoRA(2, 8.0, target_modules=("q_proj", "down_proj"), rank_pattern={"q_proj": 3}, rslora=True),
    "embedding": LoRA(2, 8.0, target_modules=("embed_tokens", "v_proj")),
    "head": LoRA(2, 8.0, target_modules=("lm_head",)),
    "both": LoRA(2, 8.0, target_modules=("lm_head", "embed_tokens")),
    "saved head": LoRA(2, 8.0, modules_to_save=("lm_head",), target_modules=QV),
    "saved embedding and norms": LoRA(2, 8.0, modules_to_save=("embed_tokens", "norm"), target_modules=QV),
}
UNTYING = [name for name in ADAPTERS if name not in ("projections", "patterns")]


def base(folder: Path, tied: bool, biases: bool = False, dtype: str = "float32") -> Path:
    raw = {**RAW, "tie_word_embeddings": tied, "attention_bias": biases, "mlp_bias": biases}
    write_checkpoint(folder, raw, random_weights(Config.from_dict(raw), 0, std=0.2), dtype)
    save_tokenizer_files(SHIPPED_MODEL, folder)
    return folder


def adapter(folder: Path, model: Path, method: LoRA) -> Path:
    rng = np.random.default_rng(1)
    started = method.start(load_model(model)[0], rng)
    trained = {name: to_host(p) + 0.2 * rng.standard_normal(p.shape).astype(np.float32) for name, p in started.items()}
    write_method(folder, method, trained, read_config(model)[0], str(model))
    return folder


def logits(model: Model) -> np.ndarray:
    positions = np.broadcast_to(np.arange(6), (2, 6))
    hidden = forward(model, TOKENS, positions, np.ones((2, 6), np.int64), keep=False)[0]
    return np.asarray(model.sites[HEAD].forward(hidden)[0])


def merge(model: Path, adapter: Path, out: Path, *flags: str) -> int:
    return main(["--model", str(model), "--adapter", str(adapter), "--out", str(out), *flags])


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


@pytest.mark.parametrize("name", ["projections", "both", "saved embedding and norms"])
def test_transformers_loads_the_folder_in_shards_too_with_the_logits_of_peft(tmp_path: Path, name: str) -> None:
    torch, transformers, peft = (pytest.importorskip(each) for each in ("torch", "transformers", "peft"))
    model = base(tmp_path / "base", tied=True)
    folder = adapter(tmp_path / "adapter", model, ADAPTERS[name])
    assert merge(model, folder, tmp_path / "out", "--untie", "--max-shard-size", "0.0001") == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    load, tokens = transformers.AutoModelForCausalLM.from_pretrained, torch.tensor(TOKENS)
    together, merged = peft.PeftModel.from_pretrained(load(model), folder), load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, together(tokens).logits, rtol=1e-4, atol=1e-4)
    text = "Table: cats (name)"
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(each) for each in (model, tmp_path / "out"))
    assert ours(text).input_ids == theirs(text).input_ids


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
