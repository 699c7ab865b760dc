"""Generation: cache and memory change nothing, rows do not see each other, draws follow the distribution asked for."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.method_laws import METHODS, adapted, moved
from support.strategies import TINY, VOCAB, configs, normal, random_adapter, random_weights, seeds

from minilora.adapters.mixed import continuing, mixed
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.methods.miss import MiSS
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.model import generation
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.decoding import ROOM, Decoder, DecoderLayer
from minilora.model.generation import Memory, complete, greedy, penalised, read, room, sampler, stream
from minilora.model.model import Model, forward
from minilora.model.names import HEAD
from minilora.model.rows import join, keep

some = settings(max_examples=50)
prompts_ = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=4)
NEVER: frozenset[int] = frozenset()


def adapted_model(config: Config, seed: int) -> Model:
    """A tiny model with an adapter whose dropout must not matter when generating."""
    base = base_model(config, random_weights(config, seed), np.float64)
    lora = LoRA(2, 4.0, 0.5, target_modules=("all-linear",))
    trainable = lora.start(base, np.random.default_rng(seed), np.float64)
    return lora.attach(base, random_adapter(trainable, seed))


def best_by_full_forward(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy continuation without any cache: the whole text so far through the model for each token."""
    text = list(prompt)
    for _ in range(count):
        positions = np.arange(len(text))[None]
        hidden, _, _ = forward(model, np.array([text]), positions, np.ones_like(positions))
        logits, _ = model.sites[HEAD].forward(hidden[-1:])
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the tokens in each forward of a generation and in each step of its decoder, as it goes."""
    seen: list[tuple[int, ...]] = []

    def recording(model: Model, tokens: np.ndarray, *args: Any, **options: Any) -> Any:
        seen.append(tokens.shape)
        return forward(model, tokens, *args, **options)

    class Recording(Decoder):
        def step(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            seen.append(tokens[:, None].shape)
            return super().step(tokens, positions)

    monkeypatch.setattr(generation, "forward", recording)
    monkeypatch.setattr(generation, "Decoder", Recording)
    return seen


# --- the cache, and the rows of a batch ---


@some
@given(config=configs(), seed=seeds, prompts=prompts_)
def test_with_the_cache_each_row_gets_what_full_forwards_give_it_alone(
    config: Config, seed: int, prompts: list[list[int]]
) -> None:
    """The key/value cache saves work and changes no token."""
    model = adapted_model(config, seed)
    expected = [best_by_full_forward(model, prompt, 8) for prompt in prompts]
    assert complete(model, prompts, 8, NEVER) == expected


def test_after_the_prompt_each_step_computes_one_new_token_for_each_row(shapes: list[tuple[int, ...]]) -> None:
    complete(adapted_model(TINY, 0), [[1, 2, 3, 4], [5]], 3, NEVER)
    assert shapes == [(2, 4), (2, 1), (2, 1)]


@some
@given(seed=seeds, prompts=prompts_, stops=st.frozensets(st.integers(0, VOCAB - 1)), limit=st.integers(1, 8))
def test_a_row_ends_before_its_first_stop_token_and_the_others_go_on(
    seed: int, prompts: list[list[int]], stops: frozenset[int], limit: int
) -> None:
    model = adapted_model(TINY, seed)
    expected = []
    for endless in complete(model, prompts, limit, NEVER):
        end = next((i for i, token in enumerate(endless) if token in stops), limit)
        expected.append(endless[:end])
    assert complete(model, prompts, limit, stops) == expected


def test_generation_ends_as_soon_as_every_row_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def scripted(*_: Any) -> Iterator[np.ndarray]:
        yield from (np.array(column) for column in ([3, 4], [9, 5], [7, 9]))
        raise AssertionError("nobody is waiting for another token")

    monkeypatch.setattr(generation, "stream", scripted)
    assert complete(adapted_model(TINY, 0), [[1], [2]], 10, frozenset([9])) == [[3], [4, 5]]
    assert complete(adapted_model(TINY, 0), [[1], [2]], 2, frozenset([9])) == [[3], [4, 5]]
    assert complete(adapted_model(TINY, 0), [[1], [2]], 0, NEVER) == [[], []]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="an empty prompt"):
        next(stream(adapted_model(TINY, 0), [[1], []]))


# --- one text after the other ---


@some
@given(
    config=configs(),
    seed=seeds,
    method=st.sampled_from([LoRA(2, 4.0, 0.5, target_modules=("all-linear",)), PrefixTuning(2), PromptTuning(3)]),
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=4),
    length=st.integers(1, 4),
)
def test_whatever_was_read_before_it_a_text_is_continued_as_it_is_alone(
    config: Config, seed: int, method: Any, texts: list[list[int]], length: int
) -> None:
    base = base_model(config, random_weights(config, seed), np.float64)
    model = method.attach(base, random_adapter(method.start(base, np.random.default_rng(seed), np.float64), seed))
    memory, answer = Memory(model), list[int]()
    for text in texts:
        for prompt in (text, text + answer + text):  # a new text, and one that goes on from what was said
            answer = list(islice(memory.stream(prompt), length))
            assert answer == complete(model, [prompt], length, NEVER)[0]


def test_only_what_is_new_is_computed(shapes: list[tuple[int, ...]]) -> None:
    memory = Memory(adapted_model(TINY, 0))
    first, second = islice(memory.stream([1, 2, 3, 4]), 2)
    next(memory.stream([1, 2, 3, 4, first, second, 5, 6]))  # the second has been said but not read
    next(memory.stream([1, 2, 3, 4, first]))  # its last token is read again, for the logits
    next(memory.stream([7, 2, 3]))
    assert shapes == [(1, 4), (1, 1), (1, 3), (1, 1), (1, 3)]


def test_an_interrupted_answer_leaves_a_memory_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(TINY, 0)
    memory, calls = Memory(model), []

    def failing(decoder: DecoderLayer, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * TINY.num_hidden_layers:
            raise KeyboardInterrupt
        return step(decoder, *args)

    step = DecoderLayer.step
    monkeypatch.setattr(DecoderLayer, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        list(memory.stream([1, 2, 3]))  # without end
    monkeypatch.undo()
    assert len(memory.seen.tokens) == 4 == memory.seen.past.positions.shape[1]
    prompt = [*memory.seen.tokens, 5]
    assert list(islice(memory.stream(prompt), 3)) == complete(model, [prompt], 3, NEVER)[0]


def test_a_memory_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="an empty prompt"):
        next(Memory(adapted_model(TINY, 0)).stream([]))


METHODS_HERE: dict[str, Method] = {
    **METHODS,
    "dora": DoRA(2, 4.0, target_modules=("all-linear",)),
    "miss": MiSS(2, target_modules=("all-linear",)),
    "prefix": PrefixTuning(3),
    "prompt": PromptTuning(3),
    "three linear maps": LoRA(2, 4.0, target_modules=("k_proj", "v_proj", "down_proj")),
}


def forward_of_texts(model: Model, texts: list[list[int]]) -> np.ndarray:
    """The logits (B, V) after the last token of each text, by a forward of each text alone."""
    logits = []
    for text in texts:
        positions = np.arange(len(text))[None]
        hidden, _, _ = forward(model, np.array([text]), positions, np.ones_like(positions))
        logits.append(generation.last_logits(model, hidden, 1)[0])
    return np.array(logits)


def assert_steps_are_forwards(model: Model, alone: Sequence[Model], texts: list[list[int]], seed: int) -> None:
    """Each row of the decoder's steps is the forward of its text so far by its own model."""
    drawn = np.random.default_rng([seed, 41]).integers(0, VOCAB, (len(texts), 3))
    steps = iter(drawn.T)
    logits: list[np.ndarray] = []

    def choose(found: np.ndarray, texts: Any = ()) -> np.ndarray:
        logits.append(found)
        return next(steps)

    list(islice(stream(model, texts, choose), 3))
    for count, found in enumerate(logits):
        so_far = [[*text, *row[:count]] for text, row in zip(texts, drawn.tolist(), strict=True)]
        expected = [forward_of_texts(own, [text])[0] for own, text in zip(alone, so_far, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS_HERE)
@settings(max_examples=15)
@given(config=configs(), seed=seeds, prompts=prompts_)
def test_a_step_of_the_decoder_is_a_forward_of_the_text_so_far_whatever_the_method(
    name: str, config: Config, seed: int, prompts: list[list[int]]
) -> None:
    _, model, _ = adapted(config, METHODS_HERE[name], seed)
    assert_steps_are_forwards(model, [model] * len(prompts), prompts, seed)


@some
@given(config=configs(), seed=seeds, prompts=prompts_, chosen=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_rows_with_different_adapters_are_decoded_together_as_each_is_alone(
    config: Config, seed: int, prompts: list[list[int]], chosen: list[int]
) -> None:
    base = base_model(config, random_weights(config, seed), np.float64)
    models = [base]
    for method in (
        LoRA(2, 4.0),
        LoRA(3, 1.0, target_modules=("all-linear",)),
        LoRA(1, 2.0, target_modules=("o_proj",)),
    ):
        trainable = method.start(base, np.random.default_rng(seed), np.float64)
        models.append(method.attach(base, random_adapter(trainable, seed + method.rank)))
    alone = [models[i] for i in chosen[: len(prompts)]]
    assert_steps_are_forwards(mixed(alone), alone, prompts, seed)


# --- drawing ---


class Grid:
    """A generator whose draws are spread evenly over [0, 1): what is drawn n times has probability n / rows."""

    def __init__(self, first: float = 0.5) -> None:
        self.first = first

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        return ((np.arange(shape[0]) + self.first) / shape[0]).reshape(shape)


def shares(logits: np.ndarray, temperature: float, top_k: int, top_p: float, rng: Any, draws: int) -> np.ndarray:
    """How often each token is drawn."""
    drawn = sampler(temperature, top_k, top_p, rng)(np.tile(logits, (draws, 1)))
    return np.bincount(drawn, minlength=len(logits)) / draws


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """What sampling should follow, step by step: softmax, the k best, the fewest of these that reach p."""
    p = np.exp(logits / temperature)
    best_first = sorted(range(len(p)), key=lambda token: -p[token])[: top_k or len(p)]
    p[[token for token in range(len(p)) if token not in best_first]] = 0
    p /= p.sum()
    reached, kept = 0.0, []
    for token in best_first:
        if reached < top_p:
            kept.append(token)
            reached += p[token]
    p[[token for token in range(len(p)) if token not in kept]] = 0
    return p / p.sum()


integers = st.lists(st.integers(-3, 3), min_size=1, max_size=8).map(lambda z: np.array([z], np.float32))  # with ties


@given(logits=integers, seed=seeds, temperature=st.floats(0.1, 3))
def test_temperature_zero_and_the_single_best_token_are_greedy(
    logits: np.ndarray, seed: int, temperature: float
) -> None:
    best = greedy(logits)
    assert best == [list(logits[0]).index(logits.max())]
    for asked in ((0.0, 0, 1.0), (temperature, 1, 1.0), (temperature, 0, 1e-9)):
        assert sampler(*asked, np.random.default_rng(seed))(logits) == best
    if (logits == logits.max()).sum() == 1:
        assert sampler(0.01, 0, 1.0, np.random.default_rng(seed))(logits) == best


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        (0, 0.5, [1, 0, 0, 0]),
        (0, 0.51, [2 / 3, 1 / 3, 0, 0]),
        (0, 0.75, [2 / 3, 1 / 3, 0, 0]),
        (0, 0.76, [4 / 7, 2 / 7, 1 / 7, 0]),
        (0, 0.9, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        (2, 1.0, [2 / 3, 1 / 3, 0, 0]),
        (3, 0.8, [2 / 3, 1 / 3, 0, 0]),  # of the three best, 4/7 + 2/7 ≥ 0.8
        (9, 1.0, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
    ],
)
def test_the_cut_falls_exactly_where_the_probabilities_reach_p(top_k: int, top_p: float, expected: list[float]) -> None:
    logits = np.log(2) * np.array([-2.0, -1.0, -3.0, -3.0])
    order = [1, 0, 2, 3]
    np.testing.assert_allclose(shares(logits, 1.0, top_k, top_p, Grid(), 168)[order], expected, atol=1e-12)


def test_eight_even_draws_from_zero_on_divide_into_halves_quarters_and_eighths() -> None:
    logits = np.log(2) * np.array([-1.0, -2.0, -3.0, -3.0])
    assert shares(logits, 1.0, 0, 1.0, Grid(first=0.0), 8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 8]


@given(
    seed=seeds,
    vocab=st.integers(1, 8),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.05, 1, exclude_max=True) | st.just(1.0),
)
@example(seed=0, vocab=5, temperature=1.0, top_k=0, top_p=1.0)
def test_draws_follow_the_distribution_that_was_asked_for(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float
) -> None:
    """Temperature, then the k best, then the fewest that reach p."""
    logits = normal(seed, vocab)
    found = shares(logits, temperature, top_k, top_p, Grid(), 1000)
    np.testing.assert_allclose(found, distribution(logits, temperature, top_k, top_p), atol=1.01 / 1000)


def test_real_draws_come_near_the_softmax() -> None:
    logits = normal(0, 6)
    found = shares(logits, 0.8, 0, 1.0, np.random.default_rng(0), 40_000)
    np.testing.assert_allclose(found, distribution(logits, 0.8, 0, 1.0), atol=0.01)


@given(logits=integers, top_p=st.floats(0.1, 1), draw=st.sampled_from([0.0, np.nextafter(1.0, 0.0)]))
def test_the_rarest_draw_still_gives_a_token_that_was_not_cut(logits: np.ndarray, top_p: float, draw: float) -> None:
    class Extreme:
        def random(self, shape: tuple[int, int]) -> np.ndarray:
            return np.full(shape, draw)

    (token,) = sampler(1.0, 0, top_p, Extreme())(logits)
    assert distribution(logits[0].astype(np.float64), 1.0, 0, top_p)[token] > 0


@some
@given(seed=seeds, prompts=prompts_)
def test_the_seed_decides_what_is_drawn(seed: int, prompts: list[list[int]]) -> None:
    model = adapted_model(TINY, seed)

    def draw(seed: int) -> list[tuple[int, ...]]:
        choose = sampler(2.0, 0, 1.0, np.random.default_rng(seed))
        return [tuple(tokens) for tokens in islice(stream(model, prompts, choose), 30)]

    assert draw(seed) == draw(seed) != draw(seed + 1)


# --- Repetition ---


def test_the_penalty_with_a_pencil() -> None:
    """A positive logit is divided, a negative one multiplied, once however often the token was said."""
    seen = []

    def look(logits: np.ndarray, texts: object = ()) -> np.ndarray:
        seen.append(logits)
        return greedy(logits)

    logits = np.array([[4.0, 3.0, -1.0, 2.0], [4.0, 3.0, -1.0, 2.0]])
    assert penalised(look, 2.0)(logits, [[0, 2, 0], []]).tolist() == [1, 0]
    assert seen[0].tolist() == [[2.0, 3.0, -2.0, 2.0], [4.0, 3.0, -1.0, 2.0]]
    assert logits[0].tolist() == [4.0, 3.0, -1.0, 2.0]
    assert penalised(look, 1.0) is look


@given(config=configs(), seed=seeds, penalty=st.sampled_from([1.5, 100.0, 0.5]))
def test_the_penalty_sees_the_prompt_and_the_answer_so_far(config: Config, seed: int, penalty: float) -> None:
    """In a batch and in a conversation's memory alike."""
    model = base_model(config, random_weights(config, seed), np.dtype(np.float64))
    prompts = [[1, 2, 3], [4, 1]]
    seen: list[list[int]] = []

    def look(logits: np.ndarray, texts: Sequence[Sequence[int]] = ()) -> np.ndarray:
        seen.append(list(texts[0]))
        return penalised(greedy, penalty)(logits, texts)

    answers = complete(model, prompts, 4, frozenset(), look)
    assert seen == [[*prompts[0], *answers[0][:n]] for n in range(4)]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(islice(Memory(model).stream(prompt, penalised(greedy, penalty)), 4)) == answer


@pytest.mark.parametrize("method", [None, PrefixTuning(3), PromptTuning(3)], ids=["words alone", "prefix", "prompt"])
def test_a_prompt_leaves_room_for_what_the_model_sees_beyond_it_and_one_as_long_leaves_none(method: Any) -> None:
    """Virtual tokens take their places too. Without room for a single token there is an error, and no empty answer."""
    config = replace(TINY, max_position_embeddings=16)
    model = base_model(config, random_weights(config, 0), np.float64)
    if method:
        model = method.attach(model, method.start(model, np.random.default_rng(0), np.float64))
    most = 16 - (3 if method else 0)
    assert [room(model, length) for length in (1, most - 1)] == [most - 1, 1]
    for length in (most, most + 1):
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens, the model sees {most}"):
            room(model, length)


# --- rows that come and go ---


@some
@given(config=configs(), seed=seeds, data=st.data())
def test_rows_that_join_and_leave_between_tokens_are_continued_as_each_text_is_computed_alone(
    config: Config, seed: int, data: st.DataObject
) -> None:
    """Each by a model of its own and any method's, whose virtual tokens come first or whose head is another's."""
    base = base_model(config, random_weights(config, seed), np.float64)
    drawn = data.draw(st.lists(st.sampled_from(sorted(METHODS_HERE)), min_size=1, max_size=3))
    models = [base]
    for i, name in enumerate(drawn):
        trainable = METHODS_HERE[name].start(base, np.random.default_rng(i), np.float64)
        models.append(METHODS_HERE[name].attach(base, moved(trainable, seed + i)))
    rows: list[tuple[Model, list[int]]] = []
    past = None
    for _ in range(data.draw(st.integers(1, 5))):
        joining = st.tuples(st.sampled_from(models), prompts_.map(lambda prompts: prompts[0]))
        new = data.draw(st.lists(joining, max_size=2))
        rows += [(model, list(prompt)) for model, prompt in new]
        pasts = ([past] if past else []) + [read(model, prompt)[1] for model, prompt in new]
        if not rows:
            continue
        decoder = Decoder(continuing([model for model, _ in rows]), join(pasts))
        for _ in range(data.draw(st.sampled_from((1, 2, 3, ROOM + 2)))):
            tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(rows), max_size=len(rows)))
            for (_, text), token in zip(rows, tokens, strict=True):
                text.append(token)
            found = decoder.step(np.array(tokens), decoder.positions[:, -1] + 1)
            expected = [forward_of_texts(model, [text])[0] for model, text in rows]
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        staying = [b for b in range(len(rows)) if data.draw(st.booleans())]
        rows = [rows[b] for b in staying]
        past = keep(decoder.past, staying) if staying else None
        if past:
            longest = max(model.virtual_tokens + len(text) for model, text in rows)
            assert past.positions.shape[1] == longest, "no room is wasted"


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_the_past_of_a_decoder_is_that_of_a_forward(name: str) -> None:
    """Positions and segments to the last bit, virtual tokens included."""
    _, model, _ = adapted(TINY, METHODS_HERE[name], 0)
    _, whole = read(model, [1, 2, 3, 4])
    _, past = read(model, [1, 2])
    decoder = Decoder(model, past)
    for position, token in ((2, 3), (3, 4)):
        decoder.step(np.array([token]), np.array([position]))
    np.testing.assert_array_equal(decoder.past.positions, whole.positions)
    np.testing.assert_array_equal(decoder.past.segments, whole.segments)
    for found, expected in zip(decoder.past.layers, whole.layers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_decoder_of_different_adapters_copies_none_of_their_numbers() -> None:
    """A row that joins or leaves makes a new one."""
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    method = LoRA(400, 4.0, target_modules=("all-linear",))
    adapters = [method.start(base, np.random.default_rng(i), np.float64) for i in range(3)]
    models = [method.attach(base, adapter) for adapter in adapters]
    past = join([read(model, [1, 2])[1] for model in models])
    tracemalloc.start()
    Decoder(continuing(models), past)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(array.nbytes for array in adapters[0].values()) / 4


def test_a_prompt_may_be_read_in_parts() -> None:
    model = adapted_model(TINY, 0)
    whole, _ = read(model, [1, 2, 3, 4, 5])
    _, past = read(model, [1, 2])
    rest, past = read(model, [3, 4, 5], 2, past)
    np.testing.assert_allclose(rest, whole[2:], rtol=1e-12)
    assert past.positions.tolist() == [[0, 1, 2, 3, 4]]
