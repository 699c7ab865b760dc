"""Generation with a key/value cache: each step runs the model on one new token per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from minilora.backend import Array, HostArray, to_device, to_host
from minilora.model.decoding import Decoder
from minilora.model.model import Model, Past, forward
from minilora.model.names import HEAD

Texts = Sequence[Sequence[int]]


class Choose(Protocol):
    def __call__(self, logits: HostArray, texts: Texts = ()) -> HostArray:
        """The next token of each row (B,), from its logits (B, V) and the tokens of its text so far."""


def greedy(logits: HostArray, texts: Texts = ()) -> HostArray:
    """The most probable token of each row."""
    return np.asarray(logits.argmax(axis=-1))


def sampler(temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> Choose:
    """Draw from softmax(logits / temperature), cut to the `top_k` best tokens (0: all) and then to the fewest tokens
    whose probabilities reach `top_p` (1: all; Holtzman et al., 2019, arXiv:1904.09751). Temperature 0 is greedy."""
    if temperature == 0:
        return greedy

    def choose(logits: HostArray, texts: Texts = ()) -> HostArray:
        order = np.argsort(-logits, axis=-1, kind="stable")
        z = np.take_along_axis(logits.astype(np.float64), order, axis=-1)
        p = np.exp((z - z[:, :1]) / temperature)
        if top_k > 0:
            p[:, top_k:] = 0
        p /= p.sum(axis=-1, keepdims=True)
        p[p.cumsum(axis=-1) - p >= top_p] = 0  # those before it already reach top_p
        cumulative = p.cumsum(axis=-1)
        drawn = rng.random((len(p), 1)) * cumulative[:, -1:]
        rank = (cumulative <= drawn).sum(axis=-1, keepdims=True)
        return np.asarray(np.take_along_axis(order, rank, axis=-1)[:, 0])

    return choose


def penalised(choose: Choose, penalty: float) -> Choose:
    """Choose after the logit of each token that the text has already is made smaller.

    It is divided by the penalty, or multiplied where it is negative, as transformers does (Keskar et al., 2019,
    arXiv:1909.05858, section 4.1). A penalty of 1 changes nothing.
    """
    if penalty == 1:
        return choose

    def choose_anew(logits: HostArray, texts: Texts = ()) -> HostArray:
        logits = logits.copy()
        for row, text in zip(logits, texts, strict=True):
            said = np.unique(np.asarray(text, np.int64))
            row[said] = np.where(row[said] > 0, row[said] / penalty, row[said] * penalty)
        return choose(logits, texts)

    return choose_anew


def stream(model: Model, prompts: Sequence[Sequence[int]], choose: Choose = greedy) -> Iterator[HostArray]:
    """Yield the next token of every prompt (B,), without end. (docs: M12)

    Prompts of different lengths are padded on the left, so that all go on in the same column. Padding is segment 0 and
    is never seen; positions count from each prompt's own start.
    """
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("an empty prompt: generation needs at least one token to start from")
    tokens = np.zeros((len(prompts), longest), np.int64)
    segments = np.zeros_like(tokens)
    for b, prompt in enumerate(prompts):
        tokens[b, longest - len(prompt) :] = prompt
        segments[b, longest - len(prompt) :] = 1
    positions = np.maximum(segments.cumsum(axis=1) - 1, 0)
    hidden, past, _ = forward(model, to_device(tokens), to_device(positions), to_device(segments), keep=False)
    logits, decoder = last_logits(model, hidden, len(prompts)), Decoder(model, past)
    positions = positions[:, -1]
    texts = [list(prompt) for prompt in prompts]
    while True:
        tokens = choose(to_host(logits), texts)
        del logits  # before the next ones are made
        for text, token in zip(texts, tokens, strict=True):
            text.append(int(token))
        yield tokens
        positions = positions + 1
        logits = decoder.step(to_device(tokens), to_device(positions))


def read(model: Model, tokens: Sequence[int], start: int = 0, past: Past | None = None) -> tuple[Array, Past]:
    """Run the model on the tokens of one text from place `start` on, after their past.

    Returns their hidden states (T, D), and the past that includes them.
    """
    places = to_device(np.arange(start, start + len(tokens))[None])
    ones = to_device(np.ones((1, len(tokens)), np.int64))
    hidden, past, _ = forward(model, to_device(np.array([tokens])), places, ones, past, keep=False)
    return hidden, past


def last_logits(model: Model, hidden: Array, rows: int) -> Array:
    """Logits (B, V) after the last column of each row, from hidden states (B·T, D)."""
    last = hidden.reshape(rows, -1, hidden.shape[-1])[:, -1]
    logits, _ = model.sites[HEAD].forward(last)
    return logits


def room(model: Model, length: int) -> int:
    """The number of tokens that fit after a prompt of this length. ValueError if none does."""
    most = model.config.max_position_embeddings - model.virtual_tokens
    if length >= most:
        raise ValueError(f"the prompt has {length} tokens, the model sees {most}")
    return most - length


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: frozenset[int],
    choose: Choose = greedy,
) -> list[list[int]]:
    """The continuation of every prompt, up to `max_tokens` tokens, each ended before its first stop token."""
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _, tokens in zip(range(max_tokens), stream(model, prompts, choose), strict=False):
        for b in sorted(running):
            if int(tokens[b]) in stop_ids:
                running.remove(b)
            else:
                answers[b].append(int(tokens[b]))
        if not running:
            break
    return answers


class Seen(NamedTuple):
    """Tokens that the model has run on, and what it remembers of them."""

    tokens: list[int]
    past: Past | None


class Memory:
    """One text after the other, where each often continues the last, as in a conversation: what they have in common is
    computed once. (docs: M12)

    Keys and values depend on nothing that comes later. So those of the longest common beginning stay right, whatever
    the texts are; the rest is forgotten.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.seen = Seen([], None)

    def stream(self, prompt: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Yield the next token after the prompt, without end. May be left at any point."""
        if not prompt:
            raise ValueError("an empty prompt: generation needs at least one token to start from")
        self.keep(common_length(self.seen.tokens, prompt[:-1]))  # the last token is run again: its logits are needed
        start = len(self.seen.tokens)
        hidden, past = read(self.model, prompt[start:], start, self.seen.past)
        self.seen = Seen(list(prompt), past)  # at once: an interrupt finds both or neither
        logits, decoder = last_logits(self.model, hidden, 1), Decoder(self.model, past)
        while True:
            token = choose(to_host(logits), [self.seen.tokens])
            del logits
            yield int(token[0])
            logits = decoder.step(to_device(token), to_device(np.array([len(self.seen.tokens)])))
            self.seen = Seen([*self.seen.tokens, int(token[0])], decoder.past)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens, and what the method puts before them."""
        tokens, past = self.seen
        if count == 0 or past is None:
            self.seen = Seen([], None)
        elif count < len(tokens):
            end = self.model.virtual_tokens + count
            layers = [(k[:, :end], v[:, :end]) for k, v in past.layers]
            self.seen = Seen(tokens[:count], Past(layers, past.positions[:, :end], past.segments[:, :end]))


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
