"""Data sets: files to rows, and rows to examples, which are tokens marked as trained or not.

One idea serves every shape of row: a row is a list of pieces (text, trained). Each piece is encoded by
itself, so the mask is exact to the token, and a prompt gives the very tokens that generation will see.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.text.tokenizer import Tokenizer

Row = dict[str, Any]
Piece = tuple[str, bool]

SHAPES = (("text",), ("prompt", "completion"), ("messages",), ("document",))
ACCEPTED = (
    'a row is {"text": "…"}, {"prompt": "…", "completion": "…"} or '
    '{"messages": [{"role": "…", "content": "…"}, …]}; '
    "prompt and completion may also both be lists of messages"
)
SUFFIXES = (".jsonl", ".json", ".txt")
MOST_HELD_OUT = 500  # rows: more would make every evaluation slow and hardly more exact


class Example(NamedTuple):
    """Tokens, and for each whether it is to be predicted (the first never is: nothing precedes it)."""

    tokens: list[int]
    trained: list[bool]


class Dataset(NamedTuple):
    train: list[Row]
    valid: list[Row]
    test: list[Row]


class Encoded(NamedTuple):
    """Examples, and the numbers (from 1) of the rows left out."""

    examples: list[Example]
    too_long: list[int]
    unlabelled: list[int]

    def kept(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the rows that became examples."""
        left_out = {*self.too_long, *self.unlabelled}
        return [row for number, row in enumerate(rows, start=1) if number not in left_out]


# Rows to examples.


def row_shape(row: Row) -> str:
    """Which shape a row has, from its keys and their types; columns that no shape names are ignored."""
    fitting = [keys for keys in SHAPES if row.keys() >= set(keys)]
    if len(fitting) != 1:
        count = "several shapes" if fitting else "no shape"
        raise ValueError(f"the keys {sorted(row)} fit {count}: {ACCEPTED}")
    (keys,) = fitting
    if keys != ("messages",) and all(isinstance(row[key], str) for key in keys):
        return " + ".join(keys)
    if keys in (("messages",), ("prompt", "completion")) and all(_is_conversation(row[key]) for key in keys):
        return " + ".join(keys) + (" as messages" if len(keys) == 2 else "")
    raise ValueError(f"the values of {', '.join(keys)} have the wrong type (keys {sorted(row)}): {ACCEPTED}")


def encode_row(row: Row, tokenizer: Tokenizer) -> Example:
    """The tokens of a row and their mask, however long. ValueError if the row or its template won't do.

    Trained are: of a text, everything and EOS; of prompt and completion, the completion and EOS; of messages,
    the assistant's turns and what closes them; of a document everything, without EOS: it may be cut anywhere.
    """
    shape = row_shape(row)
    if shape in ("text", "document"):
        pieces = [(row[shape], True)]
    elif shape == "prompt + completion":
        pieces = [(row["prompt"], False), (row["completion"], True)]
    elif shape == "messages":
        pieces = _conversation(row["messages"], 0, tokenizer)
    else:
        pieces = _conversation(row["prompt"] + row["completion"], len(row["prompt"]), tokenizer)

    tokens: list[int] = []
    trained: list[bool] = []
    for text, train in pieces:
        ids = tokenizer.encode(text)
        tokens += ids
        trained += [train] * len(ids)
    eos = tokenizer.eos_id
    if shape in ("text", "prompt + completion") and eos is not None and tokens[-1:] != [eos]:
        tokens.append(eos)
        trained.append(True)
    begun = tokenizer.with_bos(tokens)
    return Example(begun, [False] * (len(begun) - len(tokens)) + trained)


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Encode the rows of at most `max_length` tokens that have any to train; others are left out, not cut.

    Only documents are cut, into windows. ValueError if a row is wrong, or if none of the given rows is left.
    """
    if max_length < 2:
        raise ValueError(f"--max-length is {max_length}; it takes two tokens to predict one")
    encoded = Encoded([], [], [])
    for number, row in enumerate(rows, start=1):
        try:
            example = encode_row(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if not any(example.trained[1:]):
            encoded.unlabelled.append(number)
        elif row_shape(row) == "document":
            encoded.examples.extend(_windows(example, max_length))
        elif len(example.tokens) > max_length:
            encoded.too_long.append(number)
        else:
            encoded.examples.append(example)
    if rows and not encoded.examples:
        raise ValueError(
            f"none of {len(rows)} rows is left: {_left_out(encoded, max_length)}. "
            "Raise --max-length, shorten the rows, or give them completions or assistant turns to learn"
        )
    return encoded


def report(encoded: Encoded, max_length: int, name: str) -> str:
    """What will be trained on and what was left out, for people."""
    total = sum(len(example.tokens) for example in encoded.examples)
    trained = sum(sum(example.trained[1:]) for example in encoded.examples)
    share = trained / max(total, 1)
    text = f"{name}: {len(encoded.examples):,} examples, {total:,} tokens, {share:.0%} of them trained"
    left_out = _left_out(encoded, max_length)
    return text + (f"; left out: {left_out}" if left_out else "")


def _left_out(encoded: Encoded, max_length: int) -> str:
    reasons = (
        (encoded.too_long, f"longer than --max-length {max_length}"),
        (encoded.unlabelled, "with nothing to train"),
    )
    parts = []
    for numbers, reason in reasons:
        if numbers:
            listed = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
            parts.append(f"{len(numbers):,} {reason} (row{'s' * (len(numbers) > 1)} {listed})")
    return ", ".join(parts)


def _windows(example: Example, length: int) -> Iterator[Example]:
    """Consecutive windows that share one token, so every token but the very first is predicted once."""
    for start in range(0, len(example.tokens) - 1, length - 1):
        here = slice(start, start + length)
        yield Example(example.tokens[here], example.trained[here])


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


def _conversation(messages: list[dict[str, Any]], first: int, tokenizer: Tokenizer) -> list[Piece]:
    """Pieces of the rendered conversation, the assistant's turns from message `first` on trained.

    A turn begins where the messages before it and the generation prompt end, and ends where the messages up
    to it end; these are places in the whole text only if each of those renderings is a prefix of the whole.
    """
    whole = tokenizer.chat(messages, add_generation_prompt=False)
    pieces: list[Piece] = []
    done = 0
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        before = tokenizer.chat(messages[:i], add_generation_prompt=True)
        after = tokenizer.chat(messages[: i + 1], add_generation_prompt=False)
        if not (whole.startswith(after) and after.startswith(before) and done <= len(before)):
            raise ValueError(
                f"message {i + 1}, an assistant's turn, cannot be found in the rendered conversation: "
                "the chat template writes the messages up to it differently when others follow. Begin with a "
                "system or user message; if the template rewrites earlier turns, make rows that end after "
                "one assistant's turn, as prompt and completion"
            )
        # What the template puts after the closing token (a line break) comes after the model has stopped.
        turn = whole[len(before) : len(after)]
        closed = turn.rstrip().endswith(tokenizer.special_tokens)
        end = len(before) + len(turn.rstrip() if closed else turn)
        pieces += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return [*pieces, (whole[done:], False)]


# Files to rows.


def load_dataset(path: Path, seed: int, valid_share: float = 0.1) -> Dataset:
    """A folder with train, and perhaps valid and test, files; or one file, of which a share is held out.

    Of rows, a seeded draw is held out (at least 1, at most 500); of a .txt, one long document, its end.
    """
    path = Path(path)
    if path.is_dir():
        train = _part(path, "train")
        if not train:
            raise FileNotFoundError(f"{path} has no training data: give it a train.jsonl or train.txt")
        return Dataset(train, _part(path, "valid", "validation", "dev"), _part(path, "test"))
    if not 0 <= valid_share < 1:
        raise ValueError(f"valid_share is {valid_share}; it must be at least 0 and less than 1")
    rows = read_rows(path)
    if valid_share == 0:
        return Dataset(rows, [], [])
    if path.suffix == ".txt":
        head, tail = _split_text(rows[0]["document"], 1 - valid_share)
        return Dataset([{"document": head}], [{"document": tail}], [])
    if len(rows) == 1:
        raise ValueError(
            f"{path} has a single row, and one must be held out; add rows, or give a folder with train.jsonl"
        )
    count = min(max(round(len(rows) * valid_share), 1), MOST_HELD_OUT, len(rows) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return Dataset(train, [rows[i] for i in sorted(held_out)], [])


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, or of a .json list, all of one shape; a .txt is one row, {"document": …}."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: data must be a folder or a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it first") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if path.suffix == ".txt":
        return [{"document": text}]
    rows: list[Row] = []
    shape = ""
    for place, row in _json_values(path, text):
        if type(row) is not dict:
            raise ValueError(f"{place}: a {type(row).__name__}, not a JSON object: {ACCEPTED}")
        try:
            this = row_shape(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        shape = shape or this
        if this != shape:
            raise ValueError(f"{place}: this row is {this}, those before {shape}; keep one shape in a file")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows: {ACCEPTED}")
    return rows


def _json_values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each value with the place that an error should name."""
    if path.suffix == ".json":
        values = _parse(f"{path}", text)
        if not isinstance(values, list):
            raise ValueError(f"{path}: must hold a JSON list of rows; one object a line belongs in a .jsonl")
        yield from ((f"{path}, row {number}", value) for number, value in enumerate(values, start=1))
    else:  # not splitlines(): JSON strings may contain U+2028 and its like
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(f"{path}, line {number}", line)


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{place}: not valid JSON ({error.msg}, {where})") from error


def _part(folder: Path, *names: str) -> list[Row]:
    files = [file for name in names for suffix in SUFFIXES if (file := folder / (name + suffix)).is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder} has {files[0].name} and {files[1].name}, which mean the same; keep one")
    return read_rows(files[0]) if files else []


def _split_text(text: str, share: float) -> tuple[str, str]:
    """Cut at the first line break after `share` of the text; there itself if nothing would follow."""
    target = int(len(text) * share)
    cut = text.find("\n", target) + 1
    if cut == 0 or not text[cut:].strip():
        cut = target
    return text[:cut], text[cut:]
