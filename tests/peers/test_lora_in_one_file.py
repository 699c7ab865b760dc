"""PEFT loads the adapter that docs/lora_in_one_file.py writes, and computes the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.one_file import EXAMPLES, one_file, random_adapter

from minilora.formats.load import SHIPPED_MODEL

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def test_peft_loads_the_adapter_of_the_one_file_with_the_same_logits(tmp_path: Path) -> None:
    one = one_file()
    model = one.load(SHIPPED_MODEL)
    adapter = random_adapter(one, model)
    one.save(tmp_path, adapter, SHIPPED_MODEL)
    base = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path)
    assert len([name for name, _ in adapted.named_parameters() if "lora_" in name]) == sum(map(len, adapter.values()))
    tokens, _ = EXAMPLES[0]
    with torch.no_grad():
        theirs = adapted(torch.tensor([tokens])).logits[0].numpy()
    ours, _ = one.forward(model, adapter, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())
    assert np.abs(ours - one.forward(model, one.start(model, np.random.default_rng(0)), tokens)[0]).max() > 0.1
