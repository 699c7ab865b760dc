"""Prefix and prompt tuning: exact gradients, the base after reading words at the start, layouts that change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.complex_step import Arrays, check_gradients
from support.models import assert_same, loss_and_gradients_in_chunks, loss_only
from support.strategies import TINY, VOCAB, batches, configs, examples, normal, rows, seeds
from support.virtual_tokens import BOTH, Tuned, VirtualTokens, base, each_method, methods

from minilora.adapters.merging import merged_parameters
from minilora.data.batches import Batch, collate, pad
from minilora.data.examples import Example
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import LearnedPrefix, PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.virtual_tokens import EMBEDDINGS
from minilora.model.config import Config
from minilora.model.generation import Memory, complete
from minilora.model.model import Model, backward, forward
from minilora.model.names import HEAD
from minilora.ops.attention import EVERYONE, QueryBlock, attention, visible_keys
from minilora.runs.run import default_max_length
from minilora.training.step import loss_and_gradients

FIRST, SECOND = "first.", "second."
few, some = settings(max_examples=20), settings(max_examples=40)


tuned = st.builds(Tuned, configs(), methods, seeds)


# --- Exact gradients ---


@given(tuned, batches(), st.sampled_from([1, 1024]), st.booleans())
def test_the_gradient_of_a_prefix_and_of_a_prompt_is_exact_packed_padded_or_checkpointed(
    case: Tuned, batch: Batch, chunk: int, checkpointing: bool
) -> None:
    _, gradients = loss_and_gradients_in_chunks(case.model(), batch, None, chunk, checkpointing)
    check_gradients(lambda moved: loss_only(case.model(moved), batch, None), case.trainable, gradients)


@few
@given(configs(), batches(), st.sampled_from([Full(), LoRA(2, target_modules=("all-linear",))]), seeds)
def test_prefix_prompt_and_trained_sites_in_one_model_all_have_exact_gradients(
    config: Config, batch: Batch, sites: Full | LoRA, seed: int
) -> None:
    """The two share a name, so each is told apart here by a prefix of its own."""
    started = sites.start(base(config, seed), np.random.default_rng(seed), np.float64)
    trainable = {name: normal(seed, *p.shape, stream=1) for name, p in started.items()}
    first, second = Tuned(config, PrefixTuning(2), seed), Tuned(config, PromptTuning(1), seed + 1)
    trainable |= {FIRST + EMBEDDINGS: first.trainable[EMBEDDINGS], SECOND + EMBEDDINGS: second.trainable[EMBEDDINGS]}

    def attached(moved: Arrays) -> Model:
        adapted = sites.attach(base(config, seed, moved[FIRST + EMBEDDINGS].dtype), moved)
        with_prefix = first.method.attach(adapted, {EMBEDDINGS: moved[FIRST + EMBEDDINGS]})
        whole = second.method.attach(with_prefix, {EMBEDDINGS: moved[SECOND + EMBEDDINGS]})
        return replace(whole, prefix=Renamed(whole.prefix, FIRST), prompt=Renamed(whole.prompt, SECOND))

    _, gradients = loss_and_gradients_in_chunks(attached(trainable), batch, None, 1024)
    check_gradients(lambda moved: loss_only(attached(moved), batch, None), trainable, gradients)


class Renamed:
    """A prefix or a prompt whose gradient has a name of its own."""

    def __init__(self, before: Any, name: str) -> None:
        self.length, self.forward, self.before, self.name = before.length, before.forward, before, name

    def backward(self, gradient: Any) -> dict[str, np.ndarray]:
        return {self.name + key: value for key, value in self.before.backward(gradient).items()}


@some
@given(tuned, batches())
def test_virtual_tokens_alone_train_and_nothing_of_the_base_does(case: Tuned, batch: Batch) -> None:
    """The gradients' only name is that of the virtual tokens."""
    tuned_model, plain = case.model(), base(case.config, case.seed)
    assert loss_and_gradients(tuned_model, [batch])[1].keys() == {EMBEDDINGS}
    assert all(not site.trains for site in tuned_model.sites.values())
    assert tuned_model.sites.keys() == plain.sites.keys()


@some
@given(tuned, st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=4))
def test_virtual_tokens_inside_a_given_past_are_constants(case: Tuned, tokens: list[int]) -> None:
    """They were computed before, and the step has no way back into them."""
    row, positions = np.array([tokens]), np.arange(len(tokens))[None]
    one, rest = ([a[:, :1], a[:, 1:]] for a in (row, positions))
    _, past, _ = forward(case.model(), one[0], rest[0], np.ones_like(one[0]))
    hidden, _, cache = forward(case.model(), one[1], rest[1], np.ones_like(one[1]), past)
    assert backward(case.model(), hidden, cache) == {}
    whole, _, _ = forward(case.model(), row, positions, np.ones_like(row))
    np.testing.assert_allclose(hidden, whole[1:], rtol=1e-10, atol=1e-12)


# --- The start ---


def hidden_states(of: Model, tokens: Sequence[int], dtype: Any = np.int64) -> np.ndarray:
    row = np.array([tokens], dtype)
    return np.asarray(forward(of, row, np.arange(len(tokens))[None], np.ones_like(row))[0])


words = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)


@some
@given(configs(), st.sampled_from(BOTH), words, st.lists(words, min_size=1, max_size=3), seeds)
def test_at_the_start_every_example_gets_what_the_base_gives_it_after_reading_the_words(
    config: Config, method: type[VirtualTokens], text: list[int], texts: list[list[int]], seed: int
) -> None:
    """Each alone, and all packed into one row: none sees another, all see the words."""
    plain, started = base(config, seed), method(len(text), tuple(text))
    tuned_model = started.attach(plain, started.start(plain, np.random.default_rng(seed), np.float64))
    expected = [hidden_states(plain, text + tokens)[len(text) :] for tokens in texts]
    packed = collate([[Example(tokens, [True] * len(tokens)) for tokens in texts]], 0)
    together, _, _ = forward(tuned_model, packed.tokens, packed.positions, packed.segments)
    np.testing.assert_allclose(together, np.concatenate(expected), rtol=1e-9, atol=1e-11)
    for tokens, right in zip(texts, expected, strict=True):
        np.testing.assert_allclose(hidden_states(tuned_model, tokens), right, rtol=1e-9, atol=1e-11)


@some
@given(configs(), words, words, words, seeds)
def test_a_prompt_beside_a_prefix_stands_behind_it(
    config: Config, first: list[int], second: list[int], tokens: list[int], seed: int
) -> None:
    plain, rng = base(config, seed), np.random.default_rng(seed)
    prefix, prompt = PrefixTuning(len(first), tuple(first)), PromptTuning(len(second), tuple(second))
    with_prefix = prefix.attach(plain, prefix.start(plain, rng, np.float64))
    both = prompt.attach(with_prefix, prompt.start(plain, rng, np.float64))
    expected = hidden_states(plain, first + second + tokens)[len(first + second) :]
    np.testing.assert_allclose(hidden_states(both, tokens), expected, rtol=1e-9, atol=1e-11)


@given(st.sampled_from(BOTH), st.integers(1, 7), words, seeds)
def test_a_text_is_repeated_or_cut_to_the_number_of_virtual_tokens_as_peft_does(
    method: type[VirtualTokens], count: int, text: list[int], seed: int
) -> None:
    rng, repeated = np.random.default_rng(seed), (text * count)[:count]
    one, other = (method(count, tuple(t)).start(base(TINY, seed), rng)[EMBEDDINGS] for t in (text, repeated))
    assert one.tobytes() == other.tobytes()


@each_method
def test_without_a_text_the_seed_draws_the_words(method: type[VirtualTokens]) -> None:
    def start(seed: int) -> bytes:
        return method(4).start(base(TINY, 0), np.random.default_rng(seed))[EMBEDDINGS].tobytes()

    assert start(1) == start(1) != start(2)


@some
@given(configs(), st.integers(1, 3), words, seeds)
def test_a_prefix_of_zeros_still_changes_the_output(config: Config, count: int, tokens: list[int], seed: int) -> None:
    """Its keys take a share of the softmax, which the text's own keys lose."""
    plain = base(config, seed)
    zero = PrefixTuning(count).start(plain, np.random.default_rng(0), np.float64)[EMBEDDINGS] * 0
    silent = replace(plain, prefix=LearnedPrefix(zero, config))
    assert not np.allclose(hidden_states(silent, tokens), hidden_states(plain, tokens), rtol=1e-6)


@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_a_prefix_draws_each_output_of_attention_towards_its_own_by_its_share_of_the_weights(
    seed: int, time: int, count: int
) -> None:
    """y' = (1 − λ) y + λ y_P, where λ is the part of the softmax's sum that the prefix has."""
    q, k, v = (normal(seed, 1, time, 2, 4, stream=i) for i in range(3))
    k_p, v_p = (normal(seed, 1, count, 2, 4, stream=i) for i in (3, 4))
    causal, everything = np.tril(np.ones((1, time, time), bool)), np.ones((1, time, count), bool)
    y, y_p = attend(q, k, v, causal), attend(q, k_p, v_p, everything)
    own = (np.exp(np.einsum("bthd,bshd->bths", q, k) / 2) * causal[:, :, None]).sum(-1)[..., None]
    of_prefix = np.exp(np.einsum("bthd,bshd->bths", q, k_p) / 2).sum(-1)[..., None]
    share = of_prefix / (own + of_prefix)
    both = [np.concatenate(pair, axis=axis) for pair, axis in (((k_p, k), 1), ((v_p, v), 1), ((everything, causal), 2))]
    np.testing.assert_allclose(attend(q, *both), (1 - share) * y + share * y_p, rtol=1e-10, atol=1e-12)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Attention where `visible` says who sees whom."""
    everywhere = [slice(0, length) for length in visible.shape[1:]]
    return attention(q, k, v, [QueryBlock(*everywhere, visible)])[0]


# --- Layouts that change nothing ---


@given(st.lists(st.tuples(st.sampled_from([EVERYONE, 0, 1, 2]), st.integers(0, 3)), min_size=1, max_size=6))
def test_virtual_tokens_are_seen_from_every_segment_and_see_no_segment(
    tokens: list[tuple[int, int]],
) -> None:
    segments, positions = (np.array([column]) for column in zip(*tokens, strict=True))
    visible = visible_keys(positions, segments, positions, segments)
    for t, (segment, position) in enumerate(tokens):
        assert visible[0, t].tolist() == [s in (segment, EVERYONE) and p <= position for s, p in tokens]


@some
@given(tuned, st.lists(examples(), min_size=1, max_size=4))
def test_packed_end_to_end_each_example_sees_the_virtual_tokens_and_no_other_example(
    case: Tuned, drawn: list[Example]
) -> None:
    drawn = [*drawn, Example([1, 2, 3], [False, True, True])]
    assert_same(
        loss_and_gradients(case.model(), [collate([drawn], 0)]),
        loss_and_gradients(case.model(), [pad([example], 0) for example in drawn]),
    )


@some
@given(tuned, rows(), st.booleans())
def test_padding_before_or_behind_and_checkpointing_change_nothing(
    case: Tuned, drawn: list[list[Example]], checkpointing: bool
) -> None:
    left, right = ([collate(drawn, 0, left)] for left in (True, False))
    assert_same(loss_and_gradients(case.model(), left), loss_and_gradients(case.model(), right, None, checkpointing))


@some
@given(tuned, batches())
def test_a_layer_run_again_gives_the_same_bytes(case: Tuned, batch: Batch) -> None:
    results = [loss_and_gradients(case.model(), [batch], None, checkpointing) for checkpointing in (False, True)]
    (loss, gradients), (loss_again, gradients_again) = results
    assert (loss, gradients[EMBEDDINGS].tobytes()) == (loss_again, gradients_again[EMBEDDINGS].tobytes())


# --- Generation ---


def best_by_full_forward(of: Model, prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        logits, _ = of.sites[HEAD].forward(hidden_states(of, text)[-1:])
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


@few
@given(tuned, st.lists(words, min_size=1, max_size=4))
def test_generation_with_the_cache_gives_each_row_what_full_forwards_give_it_alone(
    case: Tuned, prompts: list[list[int]]
) -> None:
    """Rows of different lengths are padded on the left, between the virtual tokens and their first word."""
    expected = [best_by_full_forward(case.model(), prompt, 6) for prompt in prompts]
    assert complete(case.model(), prompts, 6, frozenset()) == expected


@few
@given(tuned, st.lists(words, min_size=1, max_size=3))
def test_a_memory_of_texts_goes_on_behind_the_virtual_tokens(case: Tuned, prompts: list[list[int]]) -> None:
    memory = Memory(case.model())
    for prompt in prompts:
        tokens = [token for _, token in zip(range(4), memory.stream(prompt), strict=False)]
        assert tokens == best_by_full_forward(case.model(), prompt, 4)


# --- Limits ---


@each_method
def test_virtual_tokens_take_room_from_the_text_and_must_leave_some(method: type[VirtualTokens]) -> None:
    plain, most = base(TINY, 0), TINY.max_position_embeddings - 2
    trainable = method(most).start(plain, np.random.default_rng(0))
    assert default_max_length(plain) == TINY.max_position_embeddings
    assert default_max_length(method(most).attach(plain, trainable)) == 2
    with pytest.raises(ValueError, match="--num-virtual-tokens 0 is less than 1"):
        method(0)
    for count in (most + 1,):
        with pytest.raises(ValueError, match=f"num_virtual_tokens {count} must be from 1 to 62"):
            method(count).start(plain, np.random.default_rng(0))


@each_method
def test_virtual_tokens_cannot_be_merged(method: type[VirtualTokens]) -> None:
    plain = base(TINY, 0)
    tuned_model = method(2).attach(plain, method(2).start(plain, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"virtual tokens .* cannot be merged"):
        list(merged_parameters(plain, tuned_model))
