"""Folders of adapters on one base, and what a model gives with one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import CONFIG, TEXTS, good
from support.strategies import QV, VOCAB, random_adapter

from minilora.adapters.combination import Summand
from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats import checkpoint
from minilora.formats.adapters import write_method
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.load import load_model
from minilora.formats.peft import read_adapter, write_adapter
from minilora.lora import delta
from minilora.methods.lora import LoRA
from minilora.methods.lora_embedding import adapter_names
from minilora.methods.method import Method
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import EMBED, HEAD

DENSE = Config.from_dict(CONFIG)
SETTINGS = {  # what folders of adapters are made with
    "a": LoRA(4, 8.0, target_modules=QV),
    "b": LoRA(2, 8.0, target_modules=("v_proj", "up_proj"), rslora=True, rank_pattern={"up_proj": 3}),
    "c": LoRA(2, 4.0, target_modules=("o_proj",), layers_to_transform=(1,)),
}


def tensors(method: LoRA, base: Model, seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """An adapter as after some training."""
    trained = random_adapter(method.start(base, np.random.default_rng(seed), dtype), seed)
    return {name: tensor.astype(dtype) for name, tensor in trained.items()}


def outcome(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, T, V)."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = forward(model, tokens, positions, np.ones_like(tokens), keep=False)[0]
    return np.asarray(model.sites[HEAD].forward(hidden)[0]).reshape(*tokens.shape, -1)


def tokens_of(seed: int, rows: int, length: int = 4, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab, size=(rows, length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters on it that PEFT and minilora read."""
    folder = tmp_path_factory.mktemp("adapters")
    write_checkpoint(folder / "base", CONFIG, checkpoint.random_weights(DENSE, seed=0, std=0.3))
    base, _ = load_model(folder / "base")
    for seed, (name, method) in enumerate(SETTINGS.items()):
        write_adapter(folder / name, method, tensors(method, base, seed, np.float32), DENSE, str(folder / "base"))
    return folder


def combined(folder: Path, out: Path, *flags: object) -> str:
    return good("combine", "--adapter", folder / "a", "--adapter-path", folder / "b", "--out", out, *flags)


def oracle_logits(folder: Path, weights: dict[str, float], tokens: np.ndarray) -> np.ndarray:
    config, _ = checkpoint.read_config(folder / "base")
    plain = {name: w.astype(np.float64) for name, w in checkpoint.read_weights(folder / "base", config).items()}
    parts = [(Summand(name, *read_adapter(folder / name, config)[:2]), w) for name, w in weights.items()]
    return outcome(summed(config, plain, parts), tokens)


def summed(config: Config, weights: dict[str, np.ndarray], parts: Sequence[tuple[Summand, float]]) -> Model:
    """The oracle: a model whose every matrix is W + Σ w ΔW, formed."""
    changed = dict(weights)
    for adapter, w in parts:
        for module, place in adapter.method.places(config).items():
            A, B = (adapter.tensors[name] for name in adapter_names(module))
            dW = w * delta(A, B, place.scale)
            changed[f"{module}.weight"] = changed[f"{module}.weight"] + (dW.T if module == EMBED else dW)
    return base_model(config, changed, np.float64)


def write_base_and_adapters(folder: Path, raw: dict[str, Any], methods: Mapping[str, Method]) -> Model:
    """A random base in `folder`/base that talks nonsense, and beside it adapters with which it talks other nonsense."""
    config = Config.from_dict(raw)
    write_checkpoint(folder / "base", raw, random_weights(config, seed=3, std=0.3))
    train_tokenizer(TEXTS * 3, config.vocab_size, folder / "base")
    base, _ = load_model(folder / "base")
    for seed, (name, method) in enumerate(methods.items()):
        rng = np.random.default_rng(seed)
        trained = {
            key: value + 0.3 * rng.standard_normal(value.shape) for key, value in method.start(base, rng).items()
        }
        tensors = {key: value.astype(np.float32) for key, value in trained.items()}
        write_method(folder / name, method, tensors, config, str(folder / "base"))
    return base
