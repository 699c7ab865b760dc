"""PEFT loads a combined adapter, and combines two to the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.adapter_folders import DENSE, combined, oracle_logits, tensors, tokens_of
from support.commands import good

from minilora.formats.load import load_model
from minilora.formats.peft import write_adapter
from minilora.methods.lora import LoRA


def peft_logits(folder: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    torch, transformers, peft = (pytest.importorskip(each) for each in ("torch", "transformers", "peft"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between PEFT and transformers
        model = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens)).logits)


def test_peft_loads_the_combined_adapter_and_computes_the_weighted_sum(folder: Path, tmp_path: Path) -> None:
    tokens = tokens_of(0, 2, vocab=DENSE.vocab_size)
    combined(folder, tmp_path / "out", "--weights", 0.7, -0.3)
    expected = oracle_logits(folder, {"a": 0.7, "b": -0.3}, tokens)
    np.testing.assert_allclose(peft_logits(folder, tmp_path / "out", tokens), expected, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder / "base")
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert not np.allclose(expected, oracle_logits(folder, {"a": 0.7}, tokens), atol=1e-2)


def test_peft_combines_two_adapters_of_one_shape_to_the_same(folder: Path, tmp_path: Path) -> None:
    torch, transformers, peft = (pytest.importorskip(each) for each in ("torch", "transformers", "peft"))
    base, _ = load_model(folder / "base")
    for seed, name in enumerate(("one", "two")):
        method = LoRA(3, 6.0 + seed, target_modules=("q_proj", "down_proj"))
        write_adapter(tmp_path / name, method, tensors(method, base, seed, np.float32), DENSE, str(folder / "base"))
    tokens = tokens_of(0, 2, vocab=DENSE.vocab_size)
    both = ["--adapter", tmp_path / "one", "--adapter", tmp_path / "two", "--weights", 0.6, 0.9]
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "one", "one"
    )
    theirs.load_adapter(tmp_path / "two", "two")
    for kind, flags in (("cat", []), ("svd", ["--combination-type", "svd", "--svd-rank", 2])):
        good("combine", *both, *flags, "--out", tmp_path / kind)
        theirs.add_weighted_adapter(["one", "two"], [0.6, 0.9], kind, combination_type=kind, svd_rank=2)
        theirs.set_adapter(kind)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits
        found = peft_logits(folder, tmp_path / kind, tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
