"""Few-shot prompting: rows with their answers stand before each prompt, and nothing trains (Brown et al., 2020,
arXiv:2005.14165, section 2.4)."""

from collections.abc import Sequence

import numpy as np

from minilora.data.conversations import Message
from minilora.data.examples import Row, encode_row, row_shape
from minilora.data.rows import FileRow, place_of
from minilora.data.tokenizer import Tokenizer

SEPARATOR = "\n\n"  # between the rows that stand in one text


def few_shot_rows(
    rows: Sequence[Row], shown: Sequence[Row], count: int, tokenizer: Tokenizer, max_length: int, seed: int
) -> tuple[list[Row], float]:
    """Every row with up to `count` of `shown` before it, and how many these are on average.

    They are drawn anew for each row, without repetition. Where not all fit `max_length` tokens together with the row
    itself, the last drawn are left out. ValueError where rows have no answers to show, or there are too few.
    """
    if count > len(shown):
        raise ValueError(f"--few-shot {count}: there are only {len(shown)} training rows to show")
    rng = np.random.default_rng(seed)
    prompted: list[Row] = []
    total = 0
    for number, row in enumerate(rows, start=1):
        shots = [shown[i] for i in rng.choice(len(shown), count, replace=False)]
        try:
            while shots and len(encode_row(with_shots(row, shots), tokenizer).tokens) > max_length:
                shots.pop()
            prompted.append(FileRow(with_shots(row, shots), place_of(row, number)))
        except ValueError as error:
            raise ValueError(f"{place_of(row, number)}: {error}") from error
        total += len(shots)
    return prompted, total / len(rows)


def with_shots(row: Row, shots: Sequence[Row]) -> Row:
    """The row with the shots before its prompt: as text, or as turns of one conversation, which has the row's own
    system message and no other. What is trained or judged stays the row's own answer."""
    shapes = {row_shape(one) for one in (row, *shots)}
    if shapes == {"prompt + completion"}:
        before = "".join(shot["prompt"] + shot["completion"] + SEPARATOR for shot in shots)
        return {**row, "prompt": before + row["prompt"]}
    if not shapes <= {"messages", "prompt + completion as messages"}:
        raise ValueError("--few-shot needs prompts with answers, all of one shape; rows of plain text have neither")
    if not shots:
        return row
    system, prompt, completion = _conversation(row)
    turns = [message for shot in shots for part in _conversation(shot)[1:] for message in part]
    other_keys = {key: value for key, value in row.items() if key != "messages"}
    return {**other_keys, "prompt": [*system, *turns, *prompt], "completion": completion}


def _conversation(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """Its system message, if it has one, the rest of its prompt, and its completion; `messages` are all completion."""
    prompt, completion = row.get("prompt", []), row["messages"] if "messages" in row else row["completion"]
    first = (prompt or completion)[:1]
    if not first or first[0]["role"] != "system":
        return [], prompt, completion
    return (first, prompt[1:], completion) if prompt else (first, [], completion[1:])


def first_answer(text: str, right: str) -> str:
    """The text before the separator, if the right answer has none: the rows that the model adds are cut off."""
    return SEPARATOR.join(text.split(SEPARATOR)[: 1 + right.count(SEPARATOR)])
