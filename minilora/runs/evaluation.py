"""The quality of a model: exact match of generated answers, and drift from the base model."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from minilora.backend import Array, HostArray, to_device, to_host, xp
from minilora.data.batches import Batch, pad
from minilora.data.examples import Row
from minilora.data.prompts import PromptRow, encode_prompt, end_of_turn, question
from minilora.data.store import Example
from minilora.data.tokenizer import Tokenizer
from minilora.model.generation import complete
from minilora.model.model import LOGITS_AT_ONCE, Model
from minilora.model.names import HEAD
from minilora.ops.cross_entropy import IGNORE
from minilora.training.ranks import world
from minilora.training.step import hidden_states

MOST_ANSWER_TOKENS = 128  # of a right answer
ROOM = 8  # tokens more, in which it may end: white space, a stop token, or the line break before the model's next row
CUT_OFF = "…"  # the last character of an answer that did not end
TEXTS, LENGTH = 16, 128  # of other text: that many beginnings of so many tokens
AT_THE_SAME_TIME = 3  # arrays (chunk, V): both models' logits, and a temporary
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
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def completed(batch: list[int]) -> list[list[int]]:
        return complete(model, [prompts[i] for i in batch], limit, stop_ids)

    for batch, completions in zip(batches, world().share(completed, batches), strict=True):
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


class Difference(NamedTuple):
    """How another model differs from a model, over all tokens of some text."""

    kl: float  # KL(model ‖ other), in nats per token
    logit: float  # the largest |difference| of their logits


def drift(
    base: Model, adapted: Model, batches: Sequence[Batch], chunk: int = LOGITS_AT_ONCE // AT_THE_SAME_TIME
) -> float:
    """KL(base ‖ adapted) = Σ_v p_v (log p_v − log q_v), in nats, as the mean over all tokens of the batches. (docs: T9)

    p is the base's and q the adapted model's distribution of the next token. On text outside the task, the drift is an
    unwanted effect of fine-tuning. At the most, AT_THE_SAME_TIME arrays (chunk, V) are in memory.
    """
    with tqdm(total=_tokens(batches), desc="drift", unit="token", dynamic_ncols=True, leave=False, disable=None) as bar:
        total = 0.0
        for logits, other_logits in _logits((base, adapted), batches, chunk):
            total += float(_divergences(logits, other_logits).sum())
            bar.update(len(logits))
            del logits, other_logits  # before the next ones are made
    return total / _tokens(batches)


def drift_of_tokens(base: Model, adapted: Model, batch: Batch, chunk: int = LOGITS_AT_ONCE) -> HostArray:
    """KL(base ‖ adapted) of what follows each token of a batch, without padding: (tokens,) in float64."""
    drifts = [_divergences(*pair) for pair in _logits((base, adapted), [batch], chunk)]
    return np.concatenate([to_host(of_chunk).astype(np.float64) for of_chunk in drifts])


def losses_of_tokens(model: Model, batch: Batch, chunk: int = LOGITS_AT_ONCE) -> HostArray:
    """−log p of each label of a batch, (B, T) in float64, in nats: NaN where there is no label."""
    hidden, labels = hidden_states(model, batch), batch.labels.reshape(-1)
    labelled = np.flatnonzero(labels != IGNORE)
    losses = np.full(labels.shape, np.nan)
    for start in range(0, len(labelled), chunk):
        rows = labelled[start : start + chunk]
        log_p = log_softmax(model.sites[HEAD].forward(hidden[to_device(rows)])[0])
        losses[rows] = -to_host(log_p[xp.arange(len(rows)), to_device(labels[rows])])
    return losses.reshape(batch.labels.shape)


def differences(
    model: Model, others: Sequence[Model], batches: Sequence[Batch], chunk: int = LOGITS_AT_ONCE // AT_THE_SAME_TIME
) -> tuple[list[Difference], float]:
    """How each of the other models differs from `model`, and `model`'s largest |logit|. Each model runs once."""
    kl, logit, largest = np.zeros(len(others)), np.zeros(len(others)), 0.0
    for logits, *others_logits in _logits((model, *others), batches, chunk):
        largest = np.maximum(largest, float(xp.abs(logits).max()))  # NaN if one is, which `max` would pass over
        for i, other_logits in enumerate(others_logits):
            logit[i] = np.maximum(logit[i], float(xp.abs(logits - other_logits).max()))
            kl[i] += float(_divergences(logits.copy(), other_logits).sum())
    return [Difference(*pair) for pair in zip((kl / _tokens(batches)).tolist(), logit.tolist(), strict=True)], float(
        largest
    )


def _logits(models: Sequence[Model], batches: Sequence[Batch], chunk: int) -> Iterator[list[Array]]:
    """The logits of each model at all tokens of the batches, `chunk` tokens at a time: arrays (chunk, V)."""
    for batch in batches:
        real = to_device(np.flatnonzero(batch.segments))
        hidden = [hidden_states(model, batch)[real] for model in models]
        for start in range(0, len(real), chunk):
            here = slice(start, start + chunk)
            yield [model.sites[HEAD].forward(of_model[here])[0] for model, of_model in zip(models, hidden, strict=True)]


def _divergences(logits: Array, other_logits: Array) -> Array:
    """Σ_v p_nv (log p_nv − log q_nv) of logits (N, V): (N,). Both arrays are overwritten."""
    log_p, log_q = log_softmax(logits), log_softmax(other_logits)
    # (exp(log_p) * (log_p - log_q)).sum(axis=-1)
    difference = xp.subtract(log_p, log_q, out=log_q)
    difference *= xp.exp(log_p, out=log_p)
    divergences: Array = difference.sum(axis=-1)
    return divergences


def log_softmax(logits: Array) -> Array:
    """log softmax(z) of each row, in the place of the logits."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= xp.log(xp.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(np.count_nonzero(batch.segments)) for batch in batches)


def outside_text(
    tokenizer: Tokenizer, texts: int = TEXTS, length: int = LENGTH, at_once: int | None = None
) -> list[Batch]:
    """Text outside any task that every Python has: the beginnings of the topics of its language reference.

    A batch has `at_once` of them, or all.
    """
    topics = pydoc_data.topics.topics
    return _beginnings(tokenizer, [topics[name] for name in _spread(sorted(topics), texts)], length, at_once or texts)


def python_source(tokenizer: Tokenizer, texts: int = 16, length: int = 128) -> list[Batch]:
    """Python that every Python has: what follows the middle of files of its standard library."""
    files = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.stat().st_size > 8000)
    sources = [path.read_text(encoding="utf-8") for path in _spread(files, texts)]
    return _beginnings(tokenizer, [source[source.index("\n", len(source) // 2) :] for source in sources], length, texts)


def _spread(things: Sequence[T], count: int) -> Sequence[T]:
    """So many of the things, evenly spread."""
    return things[:: max(1, len(things) // count)][:count]


def _beginnings(tokenizer: Tokenizer, texts: Sequence[str], length: int, at_once: int) -> list[Batch]:
    """The first tokens of each text, all to be predicted."""
    rows = [tokenizer.with_bos(tokenizer.encode(text))[:length] for text in texts]
    examples = [Example(tokens, [True] * len(tokens)) for tokens in rows]
    return [pad(examples[i : i + at_once], tokenizer.pad_id) for i in range(0, len(examples), at_once)]
