"""The base and its adapters as the server has them, and how much may be asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from minilora.adapters.scaling import scaled
from minilora.data.prompts import end_of_turn
from minilora.data.tokenizer import Tokenizer
from minilora.formats.library import BASE
from minilora.model.generation import room
from minilora.model.model import Model
from minilora.serve.problem import Problem, wrong


@dataclass(frozen=True)
class Limits:
    """What one request may ask for at most."""

    max_tokens: int  # of an answer
    max_length: int  # tokens of prompt and answer together
    max_choices: int = 16  # answers to one request
    max_body: int = 2**22  # bytes


@dataclass(frozen=True)
class Served:
    name: str  # the base's, as the user gave it
    models: Mapping[str, Model]  # "base" first
    tokenizer: Tokenizer
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def chat_stop_ids(self) -> frozenset[int]:
        """What ends an answer in a conversation. ValueError without a chat template."""
        return self.tokenizer.stop_ids | end_of_turn(self.tokenizer)

    @cached_property
    def scaled(self) -> Callable[[str, float], Model]:
        """`scaled(name, factor)`: rows with the same adapter and scale share one Model, and so their thin products."""
        return lru_cache(256)(lambda name, factor: scaled(self.models[name], self.models[BASE], factor))

    def check_name(self, name: str) -> None:
        if name not in self.models:
            message = f"the model {name!r} does not exist: there are {', '.join(self.models)}"
            raise Problem(404, message, "model", "model_not_found")

    def model(self, name: str, factor: float) -> Model:
        """The base or an adapter, that changes `factor` times as much."""
        self.check_name(name)
        try:
            return self.scaled(name, factor)
        except ValueError as error:
            raise wrong("adapter_scale", f"adapter_scale {factor:g} with {name!r}: {error}") from error

    def room(self, model: Model, prompt: list[int], param: str) -> int:
        """The number of tokens that an answer to this prompt may have at most."""
        if not prompt:
            raise wrong(param, "the prompt is empty: the model needs at least one token to start from")
        try:
            left = min(room(model, len(prompt)), self.limits.max_length - len(prompt))
        except ValueError as error:
            raise Problem(400, str(error), param, "context_length_exceeded") from error
        if left < 1:
            message = f"the prompt has {len(prompt)} tokens, and with its answer may have {self.limits.max_length}"
            raise Problem(400, message, param, "context_length_exceeded")
        return left
