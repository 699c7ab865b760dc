"""A row of a file, which knows its place there; and rows in the shapes of ShareGPT and Alpaca, read as our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minilora.data.conversations import type_name


class Place(NamedTuple):
    """Where a row stands: `rows.jsonl, line 3`; `rows.json, row 3` in a list; `row 3` if it is in no file."""

    file: str
    unit: str  # "line" or "row"
    number: int

    def __str__(self) -> str:
        return named([self])


class FileRow(dict[str, Any]):
    """A row that knows its place. For all else it is the dictionary that it holds."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: Place) -> None:
        super().__init__(values)
        self.place = place


def place_of(row: Mapping[str, Any], number: int) -> Place:
    """Where a row stands. One that is in no file is told by its number in its part."""
    return row.place if isinstance(row, FileRow) else Place("", "row", number)


def named(places: Sequence[Place], most: int = 10) -> str:
    """Places of one file in words: `rows.jsonl, lines 3, 9`."""
    file, unit, _ = places[0]
    numbers = ", ".join(str(place.number) for place in places[:most]) + (", …" if len(places) > most else "")
    return (f"{file}, " if file else "") + unit + "s" * (len(places) > 1) + f" {numbers}"


# --- Other tools' shapes ---

SHAREGPT_ROLES = {  # "from" → "role"
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"},
    **{"bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool"},
}
ALPACA = (  # the prompt that Alpaca was trained with: https://github.com/tatsu-lab/stanford_alpaca
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def as_ours(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ShareGPT or Alpaca in our shape, any other as it is. ValueError, naming it, for a role that we lack."""
    if "conversations" in row and "messages" not in row:
        messages = row["conversations"]
        system = row.get("system")
        if isinstance(system, str) and system and isinstance(messages, list):
            messages = [{"role": "system", "content": system}, *messages]
        others = {key: value for key, value in row.items() if key not in ("conversations", "system")}
        row = {**others, "messages": messages}
    if isinstance(row.get("messages"), list):
        return {**row, "messages": [_message(n, message) for n, message in enumerate(row["messages"], start=1)]}
    if {"instruction", "output"} <= row.keys() and not {"prompt", "completion", "text"} & row.keys():
        return {"prompt": _alpaca_prompt(row), "completion": row["output"]}
    return row


def _message(number: int, message: Any) -> Any:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys() or "role" in message:
        return message
    role = message["from"]
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise ValueError(f"message {number} is from {role!r}; known are {known}: rename it, or leave the row out")
    return {"role": SHAREGPT_ROLES[role], "content": message["value"]}


def _alpaca_prompt(row: Mapping[str, Any]) -> str:
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"the value of {key} is {type_name(row[key])}, not a text")
    given = row.get("input", "")
    return ALPACA.format(
        paired=", paired with an input that provides further context" if given else "",
        instruction=row["instruction"],
        input=f"### Input:\n{given}\n\n" if given else "",
    )
