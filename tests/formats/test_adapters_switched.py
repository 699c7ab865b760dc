"""Several folders of adapters on one base: switched, and sharing its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from support.adapter_folders import DENSE, SETTINGS, outcome, tensors, tokens_of
from support.allocated import peak_bytes
from support.strategies import TINY, random_weights

from minilora.formats.library import load_adapters, named_adapters
from minilora.formats.load import load_model
from minilora.methods.lora import LoRA, LoRALinear
from minilora.model.base import base_model
from minilora.model.model import Model
from minilora.model.names import HEAD


def test_adapters_share_the_frozen_weights_of_their_base_and_leave_them_as_they_are(folder: Path) -> None:
    base, _ = load_model(folder / "base")
    before = {name: site.weight.dense().copy() for name, site in base.sites.items() if hasattr(site, "weight")}
    models = load_adapters(base, named_adapters([str(folder / name) for name in SETTINGS]))
    assert list(models) == ["base", "a", "b", "c"] and models["base"] is base
    tokens = tokens_of(0, 2, vocab=DENSE.vocab_size)
    first = {name: outcome(model, tokens) for name, model in models.items()}
    for name in ("c", "a", "base", "b"):  # whatever ran before
        assert outcome(models[name], tokens).tobytes() == first[name].tobytes()
    assert len({logits.tobytes() for logits in first.values()}) == 4
    for model in models.values():
        for name, site in model.sites.items():
            frozen = site.base if isinstance(site, LoRALinear) else site
            assert frozen is base.sites[name]
    assert all(base.sites[name].weight.dense().tobytes() == weight.tobytes() for name, weight in before.items())


def test_another_adapter_costs_the_memory_of_its_own_numbers_only() -> None:
    config = replace(TINY, hidden_size=512, intermediate_size=512, head_dim=256)
    base = base_model(config, random_weights(config, 0))
    method = LoRA(2, target_modules=("all-linear",))
    trained = [tensors(method, base, seed, np.float32) for seed in range(5)]
    models: list[Model] = []
    peak = peak_bytes(lambda: models.extend(method.attach(base, each) for each in trained))
    assert len(models) == 5 and peak < 100_000 < base.sites[HEAD].weight.dense().nbytes * 10
