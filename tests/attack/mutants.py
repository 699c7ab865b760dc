"""Files with a mistake in them, drawn by a seed, as a bad disk, a bad tool or an enemy leaves them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

JSON_KINDS = (".json", ".jsonl")
SURROGATE, RAW = "\ud83d", "\x00raw:"  # of what follows RAW in a text, the file has the bytes instead of the text
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**63, 10**12, 10**40, 10**400, -(10**12), 0.5, -0.0),
    *(1e-320, 1e308, 3.7, "", "0", "8", "true", "False", "nan", "q_proj", "all-linear", SURROGATE, "\0", "é" * 40),
    *([], {}, [[]], [None], [1, 2], ["q_proj", 3], {"": {}}, {"a": [{}]}, "../../x", "(a+)+$", "(", "x" * 10_000),
    *(RAW + literal for literal in ("NaN", "Infinity", "-Infinity", "1e999", "01", "'a'", "1" * 5000)),
    *(RAW + "[" * depth + "]" * depth for depth in (60, 900, 100_000)),
    *(RAW + '{"a":' * depth + "0" + "}" * depth for depth in (60, 900, 5_000)),
)
WORDS = (
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b".nan",
    b"&a *a",
    b"[[[[",
    b"{",
    b"}",
    b"'",
    b'"',
    b"\0",
    b"\xff",
    b"\xed\xa0\xbd",
)
COUNTS = (0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def mutant(data: bytes, kind: str, draw: random.Random) -> bytes:
    """The bytes of a file with one mistake, or a few. `kind` is the end of its name."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [bytes_changed, cut]
    if kind in JSON_KINDS:
        ways += [json_changed] * 6 + [words_changed]
    elif kind == ".safetensors":
        ways += [header_changed] * 3
    elif kind == ".gguf":
        ways += [start_changed] * 4
    else:
        ways += [words_changed] * 3 + [lines_changed] * 2
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice(ways)(data, draw)
    return data


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are others, are missing, or are too many."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(changed) + 1)
        size = draw.choice((1, 1, 2, 8, 100))
        change = draw.choice(("flip", "remove", "insert", "count", "zero"))
        if change == "flip" and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif change == "remove":
            del changed[place : place + size]
        elif change == "insert":
            changed[place:place] = draw.randbytes(size)
        elif change == "count":
            changed[place : place + 8] = draw.choice(COUNTS).to_bytes(8, "little")
        else:
            changed[place : place + size] = bytes(size)
    return bytes(changed)


def start_changed(data: bytes, draw: random.Random) -> bytes:
    """The same among the first bytes, where a file says what it holds."""
    size = draw.choice((64, 1000, 6000))
    return bytes_changed(data[:size], draw) + data[size:]


def cut(data: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return data[: draw.choice((0, 1, 7, 8, 9, draw.randrange(len(data) + 1), max(0, len(data) - 1)))]


def words_changed(data: bytes, draw: random.Random) -> bytes:
    """A word is another, one that means something."""
    words = [word.span() for word in re.finditer(rb"[\w.+-]+|[^\w\s]", data)]
    start, end = draw.choice(words) if words else (0, 0)
    value = draw.choice(VALUES)
    written = value[len(RAW) :] if isinstance(value, str) and value.startswith(RAW) else json.dumps(value)
    return data[:start] + draw.choice((*WORDS, written.encode())) + data[end:]


def lines_changed(data: bytes, draw: random.Random) -> bytes:
    """A line is there twice, or in another place, or not at all."""
    lines = data.split(b"\n")
    line = lines.pop(draw.randrange(len(lines)))
    for _ in range(draw.choice((0, 1, 2))):
        lines.insert(draw.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def header_changed(data: bytes, draw: random.Random) -> bytes:
    """The header of a safetensors file says something else of the same numbers."""
    size = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + size], data[8 + size :]
    if size > len(data):
        return bytes_changed(data, draw)
    changed = json_changed(header, draw)
    size = draw.choice((len(changed),) * 6 + COUNTS)
    return min(size, 2**64 - 1).to_bytes(8, "little") + changed + numbers


def json_changed(data: bytes, draw: random.Random) -> bytes:
    """A value of JSON is another, is missing, or is there twice. Of several lines of JSON, that of one line."""
    lines = data.split(b"\n")
    number = draw.randrange(len(lines))
    whole = _loaded(data)
    tree = _loaded(lines[number]) if whole is None else whole
    if not isinstance(tree, dict | list) or not tree:
        return words_changed(data, draw)
    parent, key = draw.choice(list(_places(tree)))
    change = draw.choice(("value", "value", "value", "remove", "twice", "rename", "number", "wrap"))
    if change == "remove":
        del parent[key]
    elif change == "twice":
        if isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[f"{RAW}{json.dumps(key)}: {json.dumps(draw.choice((1, None, 'x')))}, {json.dumps(key)}"] = (
                parent.pop(key)
            )
    elif change == "rename" and isinstance(parent, dict):
        parent[draw.choice((key + "x", "", SURROGATE, "q_proj", "(a+)+$", "("))] = parent.pop(key)
    elif change == "number" and isinstance(parent[key], int | float):
        parent[key] = draw.choice((parent[key] + 1, parent[key] - 1, parent[key] * 2, -parent[key], float(parent[key])))
    elif change == "wrap":
        parent[key] = draw.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
    else:
        parent[key] = draw.choice(VALUES)
    written = _written(tree)
    return written if whole is not None else b"\n".join([*lines[:number], written, *lines[number + 1 :]])


def _loaded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _places(tree: Any) -> Any:
    """Every container in the tree with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _written(tree: Any) -> bytes:
    text = json.dumps(tree)
    raw = re.compile(r'"\\u0000raw:((?:[^"\\]|\\.)*)"')
    return raw.sub(lambda found: json.loads(f'"{found[1]}"'), text).encode()
