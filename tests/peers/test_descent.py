"""Steps down the gradient: where PyTorch's and PEFT's optimisers walk, ours walk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.commands import ADAPTER, good
from support.peers import ONE_STEP_OF_DESCENT, pytorch_loss
from support.small_parameters import arrays, rates, walks_beside
from support.strategies import seeds

from minilora.training.optimizers import AdamW


def test_a_step_of_plain_descent_from_pefts_adapter_is_minus_pytorchs_gradient(
    model: Path, data: Path, tmp_path: Path
) -> None:
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    reference = peft.get_peft_model(reference, lora)
    reference.save_pretrained(tmp_path / "peft")
    flags = [*ONE_STEP_OF_DESCENT, "--adapter", tmp_path / "peft"]
    good("train", "--model", model, "--data", data / "train-only", "--out", tmp_path / "run", *flags)
    pytorch_loss(reference, model).backward()

    before, after = load_file(tmp_path / "peft" / ADAPTER), load_file(tmp_path / "run" / ADAPTER)
    trained = {name.replace(".default", ""): p for name, p in reference.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.numpy() for name, p in trained.items()}
    assert before.keys() == after.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(before[name] - after[name], gradient, rtol=1e-3, atol=2e-6)


@settings(max_examples=5)
@given(seed=seeds, rate=rates, decay=st.floats(0, 1))
def test_adamw_walks_where_pytorchs_walks(seed: int, rate: float, decay: float) -> None:
    torch = pytest.importorskip("torch")
    parameters = arrays(seed)
    gradients = [arrays(seed + t) for t in range(60)]
    ours = AdamW(parameters, decay)
    walks_beside(
        lambda groups: torch.optim.AdamW(groups, rate, foreach=False), ours, parameters, decay, rate, gradients, 1e-10
    )
