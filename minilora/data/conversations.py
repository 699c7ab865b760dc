"""Conversations as pieces of text of which some are trained: which part of a rendered chat is the assistant's."""

from collections.abc import Callable, Sequence
from typing import Any

from minilora.data.tokenizer import Tokenizer

Message = dict[str, Any]
Piece = tuple[str, bool]  # text, and whether it is trained

TEMPLATE_KEYS = ("tools", "chat_template_kwargs")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # ipython: Llama 3's tools
A_MESSAGE = 'a message is {"role": "user", "content": "…"}'
TRAIN_ON = ("all-turns", "last-turn", "everything")


def fault_of(value: Any) -> str:
    """What is wrong with a list of messages, naming the message; nothing if each has a role and a content.

    The content is a text; only a call of tools goes without. A turn of an unknown role would never be trained.
    """
    if not isinstance(value, list):
        return f"{type_name(value)}, not a list of messages"
    for number, message in enumerate(value, start=1):
        place = f"message {number}"
        if not isinstance(message, dict):
            return f"{place} is {type_name(message)}, not an object with role and content"
        if "role" not in message:
            return f"{place} has no role, only {', '.join(map(repr, message)) or 'nothing'}; {A_MESSAGE}"
        if message["role"] not in ROLES:
            return f"{place} has the role {message['role']!r}; the roles are {', '.join(ROLES)}: rename it"
        if not isinstance(message.get("content"), str) and not (
            message.get("content") is None and message.get("tool_calls")
        ):
            if "content" in message:
                return f"{place}: its content is {type_name(message['content'])}, not a text"
            return f"{place} has no content, only {', '.join(map(repr, message))}; {A_MESSAGE}"
    return ""


def type_name(value: Any) -> str:
    """What JSON calls the value: `a number`."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template beside the messages: `tools`, and the variables in `chat_template_kwargs`.

    Both are TRL's names. ValueError if they are not a list of objects, and an object.
    """
    tools, variables = (row.get(key) for key in TEMPLATE_KEYS)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("the value of tools must be a list of JSON objects, each the schema of a tool")
    if variables is not None and not isinstance(variables, dict):
        raise ValueError('the value of chat_template_kwargs must be a JSON object, as {"enable_thinking": false}')
    return {"tools": tools} | (variables or {})


def conversation_pieces(
    messages: Sequence[Message], first: int, tokenizer: Tokenizer, arguments: dict[str, Any], train_on: str
) -> list[Piece]:
    """The rendered conversation in pieces. Trained are the assistant's turns from message `first` on.

    With `train_on` "last-turn" only the last of them is; with "everything" the whole text. A turn is the assistant's
    words and the token that closes them, not the header before them. ValueError where a turn cannot be found.
    """

    def render(count: int, add_generation_prompt: bool = False) -> str:
        return tokenizer.chat(messages[:count], add_generation_prompt, **arguments)

    whole = render(len(messages))
    if train_on == "everything":
        return [(whole, True)]
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    pieces: list[Piece] = []
    done = 0
    for i in turns[-1:] if train_on == "last-turn" else turns:
        start, end = _turn(i, whole, render, tokenizer.special_tokens)
        pieces += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    return [*pieces, (whole[done:], False)]


def _turn(i: int, whole: str, render: Callable[..., str], special_tokens: tuple[str, ...]) -> tuple[int, int]:
    """The start and end of message `i` in the whole text.

    It begins where the messages before it and the generation prompt end, and ends where the messages up to it end;
    these are places in the whole text only if both renderings are prefixes of it.
    """
    try:
        before, after = render(i, add_generation_prompt=True), render(i + 1)
    except ValueError as error:
        if i > 0:
            raise
        raise ValueError(f"message 1 is an assistant's turn: begin with a system or user message ({error})") from error
    if not (whole.startswith(after) and after.startswith(before)):
        raise ValueError(
            f"message {i + 1}, an assistant's turn, cannot be found in the rendered conversation: the chat template "
            "writes the messages up to it differently when others follow. Begin with a system or user message; if the "
            "template rewrites earlier turns, train with --train-on last-turn"
        )
    # What the template puts after the closing token (a line break) comes after the model has stopped.
    closed = after.rstrip()
    return len(before), len(closed) if closed.endswith(special_tokens) and len(closed) >= len(before) else len(after)
