"""The functions of `from minilora import …`: a model and its tokenizer by name, an adapter on it, and text for text."""

from __future__ import annotations

from pathlib import Path
from typing import overload

import numpy as np

from minilora.backend import use
from minilora.data.tokenizer import Tokenizer
from minilora.formats import adapters
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.load import load_model
from minilora.model import generation
from minilora.model.model import Model


def load(
    model: str | Path, *, revision: str = "", frozen: str = "widened", device: str = "auto"
) -> tuple[Model, Tokenizer]:
    """The base model of a folder, or of an id of the Hugging Face Hub, and its tokenizer.

    `frozen` says how the weights are held, as the commands' `--frozen` does. `device` is `cpu`, `cuda` or `auto`, for
    the whole process.
    """
    use(device)
    folder = find_model(str(model), revision).folder
    base, _ = load_model(folder, frozen=frozen)
    return base, Tokenizer.load(folder).fitting(base.config.vocab_size)


def load_adapter(model: Model, adapter: str | Path) -> Model:
    """The model with the adapter of a folder (PEFT's layout or mlx-lm's) or of a hub id.

    `model` itself stays as it is, so several adapters can share it.
    """
    return adapters.load_adapter(model, find_adapter(str(adapter)).folder)


@overload
def complete(
    model: Model, tokenizer: Tokenizer, prompt: str, max_tokens: int = 128, *, temperature: float = 0.0, seed: int = 0
) -> str: ...
@overload
def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompt: list[str],
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]: ...
def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | list[str],
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> str | list[str]:
    """The continuation of a prompt, or of each prompt of a list. A list is computed as one batch.

    It ends before the model's end-of-text token, after `max_tokens` tokens, or where the model's context is full.
    Temperature 0 takes the most probable token each time. ValueError if a prompt is empty or fills the context.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    ids = [tokenizer.with_bos(tokenizer.encode(text)) for text in prompts]
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: there is nothing to generate")
    limit = min(max_tokens, generation.room(model, max(map(len, ids), default=0)))
    choose = generation.sampler(temperature, 0, 1.0, np.random.default_rng(seed))
    answers = generation.complete(model, ids, limit, tokenizer.stop_ids, choose) if ids else []
    texts = [tokenizer.decode(answer) for answer in answers]
    return texts[0] if isinstance(prompt, str) else texts
