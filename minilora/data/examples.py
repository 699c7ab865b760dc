"""Rows to examples, which are tokens marked as trained or not.

One idea serves every shape of row: a row is a list of pieces (text, trained). Each piece is encoded by
itself, so the mask is exact to the token, and a prompt gives the very tokens that generation will see.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from minilora.data.conversations import TRAIN_ON, Piece, conversation_pieces, fault_of, template_arguments, type_name
from minilora.data.rows import Place, named, place_of
from minilora.data.tokenizer import Tokenizer

Row = dict[str, Any]

SHAPES = (("text",), ("prompt", "completion"), ("messages",), ("document",))
ACCEPTED_ROWS = (
    'a row is {"text": "…"}, {"prompt": "…", "completion": "…"} or '
    '{"messages": [{"role": "…", "content": "…"}, …]}; '
    "prompt and completion may also both be lists of messages"
)


class Example(NamedTuple):
    """Tokens, and for each whether it is to be predicted (the first never is: nothing precedes it)."""

    tokens: list[int]
    trained: list[bool]


class Encoded(NamedTuple):
    """Examples, and the rows left out: their numbers (from 1), and their places."""

    examples: list[Example]
    too_long: dict[int, Place]
    unlabelled: dict[int, Place]

    def kept(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that became examples."""
        left_out = {*self.too_long, *self.unlabelled}
        return [row for number, row in enumerate(rows, start=1) if number not in left_out]


def row_shape(row: Row) -> str:
    """The shape of a row, from its keys and their types; columns that no shape names are ignored."""
    fitting = [keys for keys in SHAPES if row.keys() >= set(keys)]
    if len(fitting) != 1:
        count = "several shapes" if fitting else "no shape"
        raise ValueError(
            f"the keys {sorted(row)} fit {count}: {ACCEPTED_ROWS}. Keys of other names are told by --prompt-feature "
            "and --completion-feature, --chat-feature or --text-feature; rows of ShareGPT and Alpaca are known"
        )
    (keys,) = fitting
    if keys != ("messages",) and all(isinstance(row[key], str) for key in keys):
        return " + ".join(keys)
    if keys in (("messages",), ("prompt", "completion")) and not any(isinstance(row[key], str) for key in keys):
        for key in keys:
            if fault := fault_of(row[key]):
                raise ValueError(f"the value of {key}: {fault} (keys {sorted(row)}): {ACCEPTED_ROWS}")
        return " + ".join(keys) + (" as messages" if len(keys) == 2 else "")
    types = ", ".join(f"{key} is {type_name(row[key])}" for key in keys)
    raise ValueError(f"the values have the wrong type, for {types} (keys {sorted(row)}): {ACCEPTED_ROWS}")


def encode_row(row: Row, tokenizer: Tokenizer, train_on: str = TRAIN_ON[0]) -> Example:
    """The tokens of a row and their mask, however long. ValueError if the row or its template won't do.

    The trained tokens are: in a text, all and EOS; in prompt and completion, the completion and EOS; in messages,
    the assistant's turns and what closes them; of a document everything, without EOS: it may be cut anywhere.
    With `train_on` "last-turn", of messages only the last turn; with "everything", the prompts too.
    A chat template writes the whole text; to every other one BOS is added where the tokenizer adds it.
    """
    shape = row_shape(row)
    if shape == "messages":
        pieces = conversation_pieces(row["messages"], 0, tokenizer, template_arguments(row), train_on)
        return _encode(pieces, tokenizer)
    if shape == "prompt + completion as messages":
        messages, first = row["prompt"] + row["completion"], len(row["prompt"])
        return _encode(conversation_pieces(messages, first, tokenizer, template_arguments(row), train_on), tokenizer)
    if shape == "prompt + completion":
        pieces = [(row["prompt"], train_on == "everything"), (row["completion"], True)]
    else:
        pieces = [(row[shape], True)]

    tokens, trained = _encode(pieces, tokenizer)
    begun = tokenizer.with_bos(tokens)
    example = Example(begun, [False] * (len(begun) - len(tokens)) + trained)
    if shape != "document" and tokenizer.eos_id is not None and tokens[-1:] != [tokenizer.eos_id]:
        example.tokens.append(tokenizer.eos_id)
        example.trained.append(True)
    return example


def _encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Example:
    example = Example([], [])
    for text, train in pieces:
        ids = tokenizer.encode(text)
        example.tokens.extend(ids)
        example.trained.extend([train] * len(ids))
    return example


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int, train_on: str = TRAIN_ON[0]) -> Encoded:
    """Encode the rows of at most `max_length` tokens that have any to train; others are left out, not cut.

    Only documents are cut, into windows. ValueError if a row is wrong, or if none of the given rows is left.
    """
    if max_length < 2:
        raise ValueError(f"--max-length is {max_length}; it takes two tokens to predict one")
    encoded = Encoded([], {}, {})
    for number, row in enumerate(rows, start=1):
        try:
            example = encode_row(row, tokenizer, train_on)
        except ValueError as error:
            raise ValueError(f"{place_of(row, number)}: {error}") from error
        if not any(example.trained[1:]):
            encoded.unlabelled[number] = place_of(row, number)
        elif row_shape(row) == "document":
            encoded.examples.extend(_windows(example, max_length))
        elif len(example.tokens) > max_length:
            encoded.too_long[number] = place_of(row, number)
        else:
            encoded.examples.append(example)
    if rows and not encoded.examples:
        raise ValueError(
            f"none of {len(rows)} rows is left: {left_out(encoded, max_length)}. "
            "Raise --max-length, shorten the rows, or give them completions or assistant turns to learn"
        )
    return encoded


def left_out(encoded: Encoded, max_length: int) -> str:
    """A sentence on the rows that did not become examples, and why; empty if all did."""
    reasons = (
        (encoded.too_long, f"longer than --max-length {max_length}"),
        (encoded.unlabelled, "with nothing to train"),
    )
    parts = []
    for rows, reason in reasons:
        if rows:
            parts.append(f"{len(rows):,} {reason} ({named([*rows.values()])})")
    return ", ".join(parts)


def _windows(example: Example, length: int) -> Iterator[Example]:
    """Consecutive windows that share one token, so every token but the very first is predicted once."""
    for start in range(0, len(example.tokens) - 1, length - 1):
        here = slice(start, start + length)
        yield Example(example.tokens[here], example.trained[here])
