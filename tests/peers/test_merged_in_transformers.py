"""transformers loads a merged folder and computes what PEFT computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.merging import ADAPTERS, TOKENS, adapter, base, merge

from minilora.data.tokenizer import Tokenizer


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


def test_transformers_loads_the_merged_folder_and_computes_what_peft_computes(
    model: Path, adapter: Path, merged: Path
) -> None:
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    load, tokens = transformers.AutoModelForCausalLM.from_pretrained, torch.tensor([[5, 77, 3, 290]])
    together = peft.PeftModel.from_pretrained(load(model, dtype=torch.float32), adapter)
    with torch.no_grad():
        torch.testing.assert_close(load(merged)(tokens).logits, together(tokens).logits, rtol=1e-4, atol=1e-5)
    assert load(merged).dtype == torch.float32
    text = "up -> UP"
    assert transformers.AutoTokenizer.from_pretrained(merged)(text).input_ids == Tokenizer.load(merged).encode(text)
