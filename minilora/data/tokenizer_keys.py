"""The keys of a tokenizer's files beside tokenizer.json, with the types of their values."""

from collections.abc import Mapping
from typing import Any, TypedDict

from minilora.data.chat_template import NamedTemplate
from minilora.keys import TokenId


class AddedToken(TypedDict):
    """A special token that is not written as a plain text."""

    content: str


class SpecialTokens(TypedDict, total=False):
    """`special_tokens_map.json`."""

    bos_token: str | AddedToken
    eos_token: str | AddedToken
    pad_token: str | AddedToken
    unk_token: str | AddedToken


class TokenizerKeys(SpecialTokens, total=False):
    """`tokenizer_config.json`."""

    add_bos_token: bool
    chat_template: str | list[NamedTemplate]


class GenerationKeys(TypedDict, total=False):
    """`generation_config.json`, and `config.json` as old releases have it."""

    eos_token_id: TokenId | list[TokenId]


def token_text(token: Any) -> str | None:
    """A special token's text, written as a string or as {"content": …}."""
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text


def token_ids(config: Mapping[str, Any]) -> list[int]:
    """The value of eos_token_id: none, one or several."""
    given = config.get("eos_token_id")
    return [] if given is None else given if isinstance(given, list) else [given]
