"""Rows to examples, which are tokens marked as trained or not.

One idea serves every shape of row: a row is a list of pieces (text, trained). Each piece is encoded by
itself, so the mask is exact to the token, and a prompt gives the very tokens that generation will see.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from minilora.data.conversations import TRAIN_ON, Piece, conversation_pieces, fault_of, template_arguments, type_name
from minilora.data.json_lines import chosen
from minilora.data.rows import Place, named, place_of
from minilora.data.store import Example, Examples
from minilora.data.tokenizer import Tokenizer, check_text

Row = dict[str, Any]
T = TypeVar("T")
TEXT_AT_ONCE = 2**19  # characters: enough for all cores, and little beside all rows

SHAPES = (("text",), ("prompt", "completion"), ("messages",), ("document",))
ACCEPTED_ROWS = (
    'a row is {"text": "…"}, {"prompt": "…", "completion": "…"} or '
    '{"messages": [{"role": "…", "content": "…"}, …]}; '
    "prompt and completion may also both be lists of messages"
)


class Encoded(NamedTuple):
    """Examples, and the rows left out: their numbers (from 1), and their places."""

    examples: Examples
    too_long: dict[int, Place]
    unlabelled: dict[int, Place]
    shapes: set[str]  # of all rows

    def kept(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that became examples."""
        mask = np.ones(len(rows), bool)
        mask[[number - 1 for number in (*self.too_long, *self.unlabelled)]] = False
        return chosen(rows, mask)


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
    prepared = _prepared(row, tokenizer, train_on)
    return _example(prepared, iter(tokenizer.encode_batch(prepared.texts)), tokenizer)


class _Prepared(NamedTuple):
    """A row as the pieces of text that are its tokens."""

    row: Row
    shape: str
    pieces: list[Piece]

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.pieces]


def _prepared(row: Row, tokenizer: Tokenizer, train_on: str) -> _Prepared:
    shape = row_shape(row)
    if shape == "messages":
        pieces = conversation_pieces(row["messages"], 0, tokenizer, template_arguments(row), train_on)
    elif shape == "prompt + completion as messages":
        messages, first = row["prompt"] + row["completion"], len(row["prompt"])
        pieces = conversation_pieces(messages, first, tokenizer, template_arguments(row), train_on)
    elif shape == "prompt + completion":
        pieces = [(row["prompt"], train_on == "everything"), (row["completion"], True)]
    else:
        pieces = [(row[shape], True)]
    prepared = _Prepared(row, shape, pieces)
    for text in prepared.texts:
        check_text(text)
    return prepared


def _example(row: _Prepared, ids_of_pieces: Iterator[list[int]], tokenizer: Tokenizer) -> Example:
    """The tokens of the row's pieces, which come next, and their mask; BOS and EOS where they belong."""
    tokens: list[int] = []
    trained: list[bool] = []
    for _, train in row.pieces:
        ids = next(ids_of_pieces)
        tokens += ids
        trained += [train] * len(ids)
    if "messages" in row.shape:
        return Example(tokens, trained)
    begun = tokenizer.with_bos(tokens)
    trained = [False] * (len(begun) - len(tokens)) + trained
    if row.shape != "document" and tokenizer.eos_id is not None and tokens[-1:] != [tokenizer.eos_id]:
        begun.append(tokenizer.eos_id)
        trained.append(True)
    return Example(begun, trained)


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int, train_on: str = TRAIN_ON[0]) -> Encoded:
    """Encode the rows of at most `max_length` tokens that have any to train; others are left out, not cut.

    Only documents are cut, into windows. ValueError if a row is wrong, or if none of the given rows is left.
    """
    if max_length < 2:
        raise ValueError(f"--max-length is {max_length}; it takes two tokens to predict one")
    encoded = Encoded(Examples(), {}, {}, set())
    with tqdm(
        total=len(rows), desc="to tokens", unit="row", dynamic_ncols=True, leave=False, delay=1, disable=None
    ) as bar:
        for number, (row, example) in enumerate(_all_encoded(rows, tokenizer, train_on), start=1):
            bar.update()
            encoded.shapes.add(row.shape)
            if not any(example.trained[1:]):
                encoded.unlabelled[number] = place_of(row.row, number)
            elif row.shape == "document":
                for window in _windows(example, max_length):
                    encoded.examples.append(window)
            elif len(example.tokens) > max_length:
                encoded.too_long[number] = place_of(row.row, number)
            else:
                encoded.examples.append(example)
    if rows and not encoded.examples:
        raise ValueError(
            f"none of {len(rows)} rows is left: {left_out(encoded, max_length)}. "
            "Raise --max-length, shorten the rows, or give them completions or assistant turns to learn"
        )
    return encoded


def _all_encoded(rows: Sequence[Row], tokenizer: Tokenizer, train_on: str) -> Iterator[tuple[_Prepared, Example]]:
    """Each row with its tokens, in order. While some rows become examples, the next ones' texts are encoded."""

    with ThreadPoolExecutor(1) as thread:
        begun = (
            (some, thread.submit(tokenizer.encode_batch, [text for row in some for text in row.texts]))
            for some in _some_at_once(rows, tokenizer, train_on)
        )
        for some, encoding in _one_ahead(begun):
            ids_of_pieces = iter(encoding.result())
            yield from ((row, _example(row, ids_of_pieces, tokenizer)) for row in some)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """All items, each given when the one after it has been made."""
    for before in islice(items, 1):
        for item in items:
            yield before
            before = item
        yield before


def _some_at_once(rows: Sequence[Row], tokenizer: Tokenizer, train_on: str) -> Iterator[list[_Prepared]]:
    """All rows in pieces, as many of them at once as have TEXT_AT_ONCE characters. ValueError names the row."""
    some: list[_Prepared] = []
    size = 0
    for number, row in enumerate(rows, start=1):
        try:
            some.append(_prepared(row, tokenizer, train_on))
        except ValueError as error:
            raise ValueError(f"{place_of(row, number)}: {error}") from error
        size += sum(map(len, some[-1].texts))
        if size >= TEXT_AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


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
