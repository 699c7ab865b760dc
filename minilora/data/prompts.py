"""Prompts to be continued: one JSON object a line, and the tokens that the model starts from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.data.conversations import fault_of, template_arguments
from minilora.data.tokenizer import Tokenizer
from minilora.formats.files import read_text

PromptRow = dict[str, Any]
ACCEPTED_PROMPTS = (
    '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}, and perhaps "adapter": "NAME"'
)


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of a .jsonl file. Keys that mean nothing here stay as they are. ValueError naming file and line."""
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                prompts.append(_check(json.loads(line)))
            except (ValueError, RecursionError) as error:  # wrong JSON, or a wrong shape
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts: each line is {ACCEPTED_PROMPTS}")
    return prompts


def _check(row: Any) -> PromptRow:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f"not a prompt: a line is {ACCEPTED_PROMPTS}")
    if not isinstance(row.get("adapter", ""), str):
        raise ValueError(f"adapter is {row['adapter']!r}, expected a name")
    if "prompt" in row and isinstance(row["prompt"], str):
        return row
    messages = conversation(row)
    if not messages or not isinstance(messages, list):
        raise ValueError(f"the prompt is neither a text nor a list of messages: a line is {ACCEPTED_PROMPTS}")
    if fault := fault_of(messages):
        raise ValueError(f"{fault}: a line is {ACCEPTED_PROMPTS}")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's already: end with the one to be answered")
    return row


def conversation(row: PromptRow) -> Any:
    """The messages for the chat template; a text if the prompt is a text."""
    return row["prompt"] if "prompt" in row else row["messages"]


def as_messages(text: str, system: str = "") -> list[Mapping[str, str]]:
    """A user's message, perhaps after a system message."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def encode_prompt(row: PromptRow, tokenizer: Tokenizer) -> list[int]:
    """The tokens to continue. A chat template writes a conversation whole; to a text BOS is added where it belongs."""
    prompt = conversation(row)
    if isinstance(prompt, str):
        return tokenizer.with_bos(tokenizer.encode(prompt))
    return tokenizer.encode(tokenizer.chat(prompt, add_generation_prompt=True, **template_arguments(row)))


def end_of_turn(tokenizer: Tokenizer) -> frozenset[int]:
    """The special token with which the chat template closes the assistant's turn, if it does so with one.

    A base model's own end is another token, as a rule: without this one, a model taught to chat would go on by itself,
    with the user's next turn. ValueError if there is no template.
    """
    words = "the-words-of-an-answer"
    messages: Sequence[Mapping[str, str]] = [*as_messages("a question"), {"role": "assistant", "content": words}]
    closing = tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=False).rpartition(words)[2])
    return frozenset(token for token in closing[:1] if tokenizer.piece(token) in tokenizer.special_tokens)
