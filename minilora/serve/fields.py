"""The fields of a request's body, each read once and checked. What is left over at the end is refused by its name."""

from __future__ import annotations

import json
import math
from typing import Any

from minilora.cli.parser import did_you_mean
from minilora.formats.finite import finite_fields
from minilora.serve.problem import Problem, wrong

IGNORED = {  # fields that change no answer
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
}
NEUTRAL: dict[str, list[Any]] = {  # fields that are not supported: the values with which they would change nothing
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "audio": [],
    "web_search_options": [],
    "reasoning_effort": [],
    "verbosity": [],
    "echo": [False],
    "suffix": [""],
    "best_of": [1],
    "min_p": [0],
}


class Fields:
    """A JSON object that is read field by field. A field that is null counts as absent."""

    def __init__(self, body: bytes) -> None:
        """Raises Problem unless the body is a JSON object."""
        try:
            given = json.loads(body, object_pairs_hook=finite_fields)
        except (ValueError, RecursionError) as error:
            raise Problem(400, f"the body is not JSON: {error}") from error
        if not isinstance(given, dict):
            raise Problem(400, "the body must be a JSON object")
        self.left = {name: value for name, value in given.items() if value is not None}
        self.read: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return self.left.pop(name, default)

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise wrong(name, f"{name} must be true or false, not {_shown(value)}")
        return value

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise wrong(name, f"{name} must be a string, not {_shown(value)}")
        return value

    def whole(self, name: str, default: int | None, low: float, high: float = math.inf) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.take(name, default)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise wrong(name, f"{name} must be a whole number{_range(low, high)}, not {_shown(value)}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.take(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise wrong(name, f"{name} must be a number{_range(low, high)}, not {_shown(value)}")
        return float(value)

    def end(self) -> None:
        """Raises Problem for a field that nobody has read, unless it changes no answer."""
        for name, value in self.left.items():
            if name in IGNORED or value in NEUTRAL.get(name, []):
                continue
            if name in NEUTRAL:
                raise Problem(400, f"{name} is not supported by this server", name, "unsupported_parameter")
            advice = did_you_mean(name, self.read)
            raise Problem(400, f"unknown field {name!r}{': ' + advice if advice else ''}", name, "unknown_parameter")


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    return f" of {low:g} or more" if math.isinf(high) else f" from {low:g} to {high:g}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
