"""The quality of a model: exact match of generated answers, and drift from the base model."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minilora.backend import Array, HostArray, to_device, to_host, xp
from minilora.data.batches import Batch, pad
from minilora.data.examples import Example, Row
from minilora.data.prompts import PromptRow, encode_prompt, end_of_turn, question
from minilora.data.tokenizer import Tokenizer
from minilora.model.generation import complete
from minilora.model.model import Model
from minilora.model.names import HEAD
from minilora.ops.cross_entropy import IGNORE
from minilora.training.step import hidden_states

MOST_ANSWER_TOKENS = 128  # of a right answer
ROOM = 8  # tokens more, in which it may end: white space, a stop token, or the line break before the model's next row
CUT_OFF = "…"  # the last character of an answer that did not end
T = TypeVar("T")


def answers(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    batch_size: int = 64,
    on_batch: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """The greedy completion of each row's prompt. `on_batch` is called with the number of rows in each batch done.

    One that would go on is cut off, soon after the length of the longest right answer, and says so by its last
    character: it is not right, even if nothing but white space or special tokens had come after the right answer.
    """
    asked_of = [_question(row) for row in rows]
    prompts = [encode_prompt(asked, tokenizer) for asked, _ in asked_of]
    longest = max(len(tokenizer.encode(right)) for _, right in asked_of)  # no right answer is longer
    is_chat = any("messages" in asked for asked, _ in asked_of)
    stop_ids = tokenizer.stop_ids | (end_of_turn(tokenizer) if is_chat else frozenset())
    texts = [""] * len(rows)
    asked = [i for i in range(len(rows)) if prompts[i]]  # an empty prompt asks nothing
    order = sorted(asked, key=lambda i: len(prompts[i]))
    limit = min(longest, MOST_ANSWER_TOKENS) + ROOM
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        completions = complete(model, [prompts[i] for i in batch], limit, stop_ids)
        for i, tokens in zip(batch, completions, strict=True):
            texts[i] = tokenizer.decode(tokens) + (CUT_OFF if len(tokens) == limit else "")
        on_batch(len(batch))
    return texts


def exact_match(texts: Sequence[str], rows: Sequence[Row]) -> float:
    """The share of answers that equal the row's right one, apart from white space at the ends."""
    right = sum(answer.strip() == _question(row)[1].strip() for answer, row in zip(texts, rows, strict=True))
    return right / len(rows)


def can_be_matched(rows: Sequence[Row]) -> bool:
    """Whether the exact match is defined: every row asks something and has one right answer."""
    return bool(rows) and all(map(question, rows))


def _question(row: Row) -> tuple[PromptRow, str]:
    asked = question(row)
    if asked is None:
        raise ValueError(f"the row with the keys {sorted(row)} asks nothing that has one right answer")
    return asked


def drift(base: Model, adapted: Model, batches: Sequence[Batch], chunk: int = 512) -> float:
    """KL(base ‖ adapted) = Σ_v p_v (log p_v − log q_v), in nats, as the mean over all tokens of the batches. (docs: T9)

    p is the base's and q the adapted model's distribution of the next token. On text outside the task, the drift is an
    unwanted effect of fine-tuning.
    """
    drifts = [drift_of_tokens(base, adapted, batch, chunk) for batch in batches]
    return sum(float(of_batch.sum()) for of_batch in drifts) / sum(map(len, drifts))


def drift_of_tokens(base: Model, adapted: Model, batch: Batch, chunk: int = 512) -> HostArray:
    """KL(base ‖ adapted) of what follows each token of a batch, without padding: (tokens,) in float64."""
    real = xp.flatnonzero(to_device(batch.segments).reshape(-1))
    p_hidden, q_hidden = hidden_states(base, batch)[0][real], hidden_states(adapted, batch)[0][real]
    drifts = []
    for start in range(0, len(real), chunk):
        log_p = log_softmax(base.sites[HEAD].forward(p_hidden[start : start + chunk])[0])
        log_q = log_softmax(adapted.sites[HEAD].forward(q_hidden[start : start + chunk])[0])
        drifts.append(to_host((xp.exp(log_p) * (log_p - log_q)).sum(axis=-1)).astype(np.float64))
    return np.concatenate(drifts)


def losses_of_tokens(model: Model, batch: Batch, chunk: int = 512) -> HostArray:
    """−log p of each label of a batch, (B, T) in float64, in nats: NaN where there is no label."""
    hidden, labels = hidden_states(model, batch)
    labelled = xp.flatnonzero(labels != IGNORE)
    losses = np.full(labels.shape, np.nan)
    for start in range(0, len(labelled), chunk):
        rows = labelled[start : start + chunk]
        log_p = log_softmax(model.sites[HEAD].forward(hidden[rows])[0])
        losses[to_host(rows)] = -to_host(log_p[xp.arange(len(rows)), labels[rows]])
    return losses.reshape(batch.labels.shape)


def largest_logit_difference(
    model: Model, other: Model, batches: Sequence[Batch], chunk: int = 512
) -> tuple[float, float]:
    """The largest |difference| of two models' logits over all tokens of the batches, and `model`'s largest |logit|."""
    differences, largest = [0.0], [0.0]
    for batch in batches:
        real = xp.flatnonzero(to_device(batch.segments).reshape(-1))
        hidden, other_hidden = hidden_states(model, batch)[0][real], hidden_states(other, batch)[0][real]
        for start in range(0, len(real), chunk):
            logits = model.sites[HEAD].forward(hidden[start : start + chunk])[0]
            other_logits = other.sites[HEAD].forward(other_hidden[start : start + chunk])[0]
            differences.append(float(xp.abs(logits - other_logits).max()))
            largest.append(float(xp.abs(logits).max()))
    return float(np.max(differences)), float(np.max(largest))  # NaN if one is, which `max` would pass over


def log_softmax(logits: Array) -> Array:
    """log softmax(z) of each row."""
    z: Array = logits - logits.max(axis=-1, keepdims=True)
    z -= xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
    return z


def outside_text(tokenizer: Tokenizer, texts: int = 16, length: int = 128) -> list[Batch]:
    """Text outside any task that every Python has: the beginnings of the topics of its language reference."""
    topics = pydoc_data.topics.topics
    return _beginnings(tokenizer, [topics[name] for name in _spread(sorted(topics), texts)], length)


def python_source(tokenizer: Tokenizer, texts: int = 16, length: int = 128) -> list[Batch]:
    """Python that every Python has: what follows the middle of files of its standard library."""
    files = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.stat().st_size > 8000)
    sources = [path.read_text(encoding="utf-8") for path in _spread(files, texts)]
    return _beginnings(tokenizer, [source[source.index("\n", len(source) // 2) :] for source in sources], length)


def _spread(things: Sequence[T], count: int) -> Sequence[T]:
    """So many of the things, evenly spread."""
    return things[:: max(1, len(things) // count)][:count]


def _beginnings(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> list[Batch]:
    """The first tokens of each text, all to be predicted."""
    rows = [tokenizer.with_bos(tokenizer.encode(text))[:length] for text in texts]
    return [pad([Example(tokens, [True] * len(tokens)) for tokens in rows], tokenizer.pad_id)]
