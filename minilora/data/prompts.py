"""Prompts to be continued: one JSON object a line, and the tokens that the model starts from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.data.conversations import TEMPLATE_KEYS, fault_of, template_arguments
from minilora.data.examples import Row
from minilora.data.tokenizer import Tokenizer
from minilora.formats.files import parsed_json, read_text

PromptRow = dict[str, Any]
ACCEPTED_PROMPTS = (
    '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}, and perhaps "adapter": "NAME"'
)


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of a .jsonl file. Keys that mean nothing here stay as they are. ValueError naming file and line."""
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            row = parsed_json(place, line)
            try:
                prompts.append(_check(row))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
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


def question(row: Row) -> tuple[PromptRow, str] | None:
    """What a row asks, and its one right answer as text. None if it asks nothing, as a plain text.

    A conversation whose last turn is the assistant's asks for that turn.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt}, completion
    both = prompt + completion if isinstance(prompt, list) and isinstance(completion, list) else []
    messages = row.get("messages", both)
    if fault_of(messages) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None
    if not isinstance(messages[-1].get("content"), str):  # a call of tools
        return None
    others = {key: row[key] for key in TEMPLATE_KEYS if key in row}
    return {"messages": messages[:-1], **others}, messages[-1]["content"]


def last_words(row: PromptRow) -> str:
    """What is to be answered: the text of a prompt, or the last message."""
    asked = conversation(row)
    return asked if isinstance(asked, str) else str(asked[-1].get("content") or "")


def as_messages(text: str, system: str = "") -> list[Mapping[str, str]]:
    """A user's message, perhaps after a system message."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def encode_prompt(row: PromptRow, tokenizer: Tokenizer) -> list[int]:
    """The tokens to continue. A chat template writes a conversation whole; to a text BOS is added where it belongs."""
    prompt = conversation(row)
    if isinstance(prompt, str):
        return tokenizer.with_bos(tokenizer.encode(prompt))
    ids = tokenizer.encode(tokenizer.chat(prompt, add_generation_prompt=True, **template_arguments(row)))
    if not ids:
        raise ValueError(f"{tokenizer.folder}: the chat template writes nothing for the messages")
    return ids


def end_of_turn(tokenizer: Tokenizer) -> frozenset[int]:
    """The special token with which the chat template closes the assistant's turn, if it does so with one.

    A base model's own end is another token, as a rule: without this one, a model taught to chat would go on by itself,
    with the user's next turn. ValueError if there is no template.
    """
    words = "the-words-of-an-answer"
    messages: Sequence[Mapping[str, str]] = [*as_messages("a question"), {"role": "assistant", "content": words}]
    closing = tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=False).rpartition(words)[2])
    return frozenset(token for token in closing[:1] if tokenizer.piece(token) in tokenizer.special_tokens)
