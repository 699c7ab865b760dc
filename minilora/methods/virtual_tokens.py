"""The common part of prefix and prompt tuning: virtual tokens stand before every example and start as real words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from minilora.backend import Array, to_device
from minilora.keys import Count, checked, stated
from minilora.methods import fields
from minilora.methods.method import Method
from minilora.methods.setting import setting
from minilora.model.config import Config

if TYPE_CHECKING:  # from Python 3.11 on
    from typing import Self

EMBEDDINGS = "prompt_embeddings"  # the one array that trains, under PEFT's name for it
FIELDS_OF_THE_START = {  # PEFT's fields that do not change what finished virtual tokens compute
    *("init_weights", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("prefix_projection", "encoder_hidden_size"),  # PEFT saves what the projection gave, and not the projection
}


class VirtualTokensKeys(TypedDict, total=False):
    """PEFT's fields that are read."""

    num_virtual_tokens: Count
    token_dim: Count
    num_attention_heads: Count
    num_layers: Count
    num_transformer_submodules: Count


def check_room(config: Config, count: int) -> None:
    """ValueError unless `count` virtual tokens leave the model two positions: it takes two tokens to predict one."""
    most = config.max_position_embeddings - 2
    if not 1 <= count <= most:
        raise ValueError(
            f"num_virtual_tokens {count} must be from 1 to {most}: they come before every example, and the model was "
            f"made for {config.max_position_embeddings} tokens in all"
        )


def starting_words(config: Config, count: int, text: tuple[int, ...], rng: np.random.Generator) -> Array:
    """The `count` tokens (count,) as which virtual tokens start: those of a text, repeated or cut to fit as PEFT does;
    without one, drawn evenly from the vocabulary. ValueError where the model has no room for them."""
    check_room(config, count)
    return to_device(np.resize(text, count) if text else rng.integers(config.vocab_size, size=count))


@dataclass(frozen=True)
class VirtualTokens(Method):
    """How many virtual tokens, and what they start as."""

    num_virtual_tokens: int = setting(
        20, "for prefix and prompt: the number of virtual tokens before every example", at_least=1, capacity=True
    )
    text: tuple[int, ...] = ()  # `init_text` as token ids
    init_text: str = setting(
        "",
        "for prefix and prompt: the text that virtual tokens start as (default: random)",
        aliases=("prompt_tuning_init_text",),
        metavar="TEXT",
    )

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def for_model(self, config: Config, encode: Callable[[str], list[int]]) -> Self:
        return replace(self, text=tuple(encode(self.init_text)) or self.text)

    def fields(self, config: Config) -> dict[str, Any]:
        return self._geometry(config)

    @classmethod
    def from_fields(cls, place: object, raw: Mapping[str, Any], config: Config) -> Self:
        raw = stated(checked(place, raw, VirtualTokensKeys))
        if "num_virtual_tokens" not in raw:
            raise ValueError(f"{place}: 'num_virtual_tokens' is missing")
        method = cls(num_virtual_tokens=raw["num_virtual_tokens"])
        check_room(config, method.num_virtual_tokens)
        geometry = method._geometry(config)
        fields.refuse_unknown(place, raw, geometry.keys() | FIELDS_OF_THE_START)
        for field, value in geometry.items():
            if raw.get(field, value) != value:  # PEFT fills in what is null
                raise ValueError(f"{place}: {field} is {raw[field]!r}, but with this base model it is {value}")
        return method

    def _geometry(self, config: Config) -> dict[str, int]:
        """The fields by which PEFT cuts the tensor."""
        heads, width = self._heads_and_width(config)
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": width,
            "num_attention_heads": heads,
            "num_layers": config.num_hidden_layers,
            "num_transformer_submodules": 1,
        }

    def _heads_and_width(self, config: Config) -> tuple[int, int]:
        """The heads that read the tokens, and the width of all together."""
        return config.num_attention_heads, config.hidden_size
