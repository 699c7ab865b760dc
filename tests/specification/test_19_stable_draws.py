"""What a seed decides stays decided: an adapter that is read back, or a run that is resumed, must meet the same draws.

Whole numbers and masks are compared exactly. Where numbers are real, a few are written down to six digits, so that a
processor may round otherwise. And what must not be the same, the masks of any two places or times, differs pairwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import TINY

from minilora.backend import random_generator
from minilora.data.batches import Batch, collate
from minilora.data.examples import Example
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.methods.miss import MiSS
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.methods.targets import projections
from minilora.model.base import base_model
from minilora.model.generation import sampler
from minilora.model.model import Model, head_loss
from minilora.model.names import EMBED, HEAD, parameter_shapes
from minilora.model.sites import part_seed
from minilora.training.flat import Flat
from minilora.training.loop import Plan, take_step
from minilora.training.optimizers import SGD
from minilora.training.order import Order
from minilora.training.parts import on_all_cores
from minilora.training.state import State

ALL = ("all-linear",)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def base() -> Model:
    """Weights without any draw: sines, each array going on where the one before it ended."""
    weights, start = {}, 1
    for name, shape in parameter_shapes(TINY).items():
        size = int(np.prod(shape))
        weights[name] = np.sin(np.arange(start, start + size, dtype=np.float64)).reshape(shape)
        start += size
    return base_model(TINY, weights, np.float64)


def digest(*arrays: Any) -> str:
    """A short hash of whole numbers, which no processor changes."""
    text = ";".join(",".join(str(int(n)) for n in np.ravel(array)) for array in arrays)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- Golden values ---


def test_the_places_of_a_random_subset_are_those_of_its_seed_for_ever() -> None:
    """A folder holds the values alone: at other places they would be another adapter."""
    for seed, first, last, all_of_them in PLACES:
        sites: dict[str, Any] = dict(RandomSubset(0.05, seed).attach(base(), subset_values(seed)).sites)
        chosen = [sites[module].chosen for module in projections(TINY)]
        flat = [np.stack(places).T.tolist() for places in chosen]
        assert (flat[0][:3], flat[-1][:3]) == (first, last)
        assert digest(*(number for places in chosen for number in places)) == all_of_them


def subset_values(seed: int) -> dict[str, np.ndarray]:
    return RandomSubset(0.05, seed).start(base(), np.random.default_rng(0))


PLACES = [
    (0, [[3, 5], [5, 3], [5, 5]], [[0, 1], [2, 1], [3, 0]], "d9aef88f186b5dec"),
    (1, [[3, 0], [4, 7], [6, 4]], [[1, 1], [5, 3], [6, 4]], "21ae3e11f8604e36"),
]


@pytest.mark.parametrize(
    ("seeds", "first"),
    [
        ((0, 0), [987, 800, 144, 88]),
        ((0, 1), [252, 653, 148, 714]),
        ((7, 0), [907, 447, 282, 988]),
        ((2**62, 3), [468, 984, 207, 47]),
        ((5 << 32 | 1, 0), [493, 883, 844, 882]),
    ],
)
def test_the_generator_of_seeds_draws_the_same_for_ever(seeds: tuple[int, ...], first: list[int]) -> None:
    assert random_generator(*seeds).integers(1000, size=4).tolist() == first


STARTS: dict[str, tuple[Method, dict[str, list[float]]]] = {
    "kaiming": (
        LoRA(2, target_modules=ALL),
        {
            f"{Q}.lora_A.weight": [0.2156696, 0.217747, 0.01083681],
            f"{DOWN}.lora_A.weight": [-0.2157032, -0.06224799, 0.07677988],
        },
    ),
    "gaussian": (
        LoRA(2, init="gaussian", target_modules=ALL),
        {
            f"{Q}.lora_A.weight": [-0.4009657, -0.6621795, -0.1241808],
            f"{DOWN}.lora_A.weight": [0.3333417, 0.3976495, -0.3496942],
        },
    ),
    "orthogonal": (
        LoRA(2, init="orthogonal", target_modules=ALL),
        {
            f"{Q}.lora_A.weight": [-0.1085194, -0.01047956, 0.05279093],
            f"{Q}.lora_B.weight": [0.02834942, -0.09153705, -0.04733514],
            f"{DOWN}.lora_B.weight": [-0.1445859, -0.07259459, 0.009891422],
        },
    ),
    "embedding": (
        LoRA(2, target_modules=("embed_tokens", "q_proj")),
        {
            f"{EMBED}.lora_embedding_B": [-0.8019314, -1.324359, -0.2483616],
            f"{Q}.lora_A.weight": [-0.07608139, -0.004933471, 0.1249382],
        },
    ),
    "DoRA": (
        DoRA(2, target_modules=ALL),
        {
            f"{Q}.lora_A.weight": [0.2156696, 0.217747, 0.01083681],
            f"{Q}.lora_magnitude_vector": [1.847499, 2.138312, 1.868277],
            f"{DOWN}.lora_A.weight": [-0.2157032, -0.06224799, 0.07677988],
        },
    ),
    "bottleneck": (
        Bottleneck(3),
        {
            "model.layers.0.self_attn.o_proj.adapter_down.weight": [-0.008019314, -0.01324359, -0.002483616],
            f"{DOWN}.adapter_down.weight": [0.001030231, -0.008649727, 0.00895783],
        },
    ),
    "prefix": (PrefixTuning(3), {"prompt_embeddings": [-1.36632, -0.1047607, 1.396806]}),
    "prompt": (PromptTuning(3), {"prompt_embeddings": [0.4361648, 0.9928726, 0.636738]}),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_that_of_its_seed_for_ever(name: str) -> None:
    method, expected = STARTS[name]
    start = method.start(base(), np.random.default_rng(5), np.float64)
    found = {module: np.ravel(start[module])[:3].tolist() for module in expected}
    assert found == {module: pytest.approx(numbers, rel=1e-5, abs=1e-9) for module, numbers in expected.items()}


def test_pissa_and_miss_start_without_a_draw() -> None:
    """Their start follows from the weights alone, so it can be made again at any time."""
    for method in (LoRA(2, init="pissa", target_modules=ALL), MiSS(2, target_modules=ALL)):
        rng = np.random.default_rng(5)
        start, other = method.start(base(), rng, np.float64), method.start(base(), np.random.default_rng(6), np.float64)
        assert all(np.array_equal(start[name], other[name]) for name in start)
        assert rng.bit_generator.state == np.random.default_rng(5).bit_generator.state


def test_the_words_of_virtual_tokens_are_drawn_once_and_evenly_from_the_whole_vocabulary() -> None:
    rng = np.random.default_rng(5)
    start = PromptTuning(9).start(base(), rng, np.float64)["prompt_embeddings"]
    words = np.random.default_rng(5).integers(TINY.vocab_size, size=9)
    embedding: Any = base().sites[EMBED]
    assert np.array_equal(start, embedding.weight.rows(words))
    given = PromptTuning(5, text=(3, 1)).start(base(), rng, np.float64)["prompt_embeddings"]
    assert np.array_equal(given, embedding.weight.rows([3, 1, 3, 1, 3]))


def test_the_order_of_the_rows_is_that_of_the_seed_for_ever() -> None:
    order, rng = Order(7), np.random.default_rng(5)
    assert [order.take(3, rng) for _ in range(4)] == ORDER


ORDER = [[1, 4, 2], [3, 6, 5], [0], [0, 1, 3]]


def test_the_tokens_that_a_seed_samples_are_the_same_for_ever() -> None:
    """One number for each row of a batch, also where a row has a single token to choose from."""
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]))
    for temperature, top_k, top_p, expected in SAMPLED:
        choose = sampler(temperature, top_k, top_p, np.random.default_rng(5))
        assert [choose(logits).tolist() for _ in range(6)] == expected


SAMPLED = [
    (1.0, 0, 1.0, [[1, 2], [2, 0], [3, 0], [2, 0], [3, 3], [2, 0]]),
    (1.0, 2, 1.0, [[2, 0], [3, 0], [3, 0], [3, 0], [3, 1], [2, 0]]),
    (2.0, 0, 0.6, [[2, 1], [3, 0], [3, 0], [3, 0], [3, 1], [2, 0]]),
]


# --- Masks ---


def masks(model: Model, seed: int | None, rows: int = 24) -> dict[str, bytes]:
    """What each linear map that has dropout keeps of its inputs, by a seed: a bit for each."""
    found = {}
    for name, site in model.sites.items():
        if (place := getattr(site, "base", None)) is not None and hasattr(place, "weight") and name != EMBED:
            _, cache = site.forward(np.ones((rows, place.weight.shape[1])), seed)
            found[name] = np.packbits(cache.mask > 0).tobytes()
    return found


DROPPING: dict[str, Method] = {
    "LoRA": LoRA(2, dropout=0.5, target_modules=(*ALL, "lm_head")),
    "DoRA": DoRA(2, dropout=0.5, target_modules=(*ALL, "lm_head")),
    "MiSS": MiSS(2, dropout=0.5, target_modules=(*ALL, "lm_head")),
}


def dropping(name: str) -> Model:
    model = base()
    return DROPPING[name].attach(model, DROPPING[name].start(model, np.random.default_rng(0), np.float64))


MASKS = {"q": "8664", "down": "65ec", "head": "e192"}


@pytest.mark.parametrize("name", DROPPING)
def test_the_masks_of_a_seed_are_the_same_for_ever_in_every_method(name: str) -> None:
    """A site's key is its place among the adapted modules, by which three methods draw alike."""
    found = masks(dropping(name), 11, rows=2)
    assert {place: found[module].hex() for place, module in (("q", Q), ("down", DOWN), ("head", HEAD))} == MASKS


@pytest.mark.parametrize("name", DROPPING)
def test_no_two_sites_micro_batches_parts_nor_steps_drop_the_same(name: str) -> None:
    """Of 24 tokens: equal masks of that many inputs are no chance. The seeds are those of two steps of a run."""
    model = dropping(name)
    seeds = [part_seed(first + i, part) for (first,) in SEEDS[:2] for i in range(2) for part in range(2)]
    drawn = [mask for seed in seeds for mask in masks(model, seed).values()]
    assert len(drawn) == 8 * 15
    assert all(a[: len(b)] != b[: len(a)] for a, b in combinations(drawn, 2))
    assert masks(model, seeds[0]) == masks(model, seeds[0])


def seeds_of_a_step(first: int, micro_batches: int, rows: int, chunks: int) -> Iterator[int]:
    """The seeds by which the sites of a step draw: of each part of each micro-batch, and of each chunk of the head."""
    batch = collate([[Example([1, 2], [True, True])] for _ in range(rows)], 0)
    found: list[int | None] = []

    def work(part: Batch, seed: int | None) -> None:
        found.append(seed)
        found.extend(part_seed(seed, 256 * chunk) for chunk in range(1, chunks))

    list(on_all_cores(work, [batch] * micro_batches, range(first, first + micro_batches)))
    for seed in found:
        assert seed is not None
        yield seed


@given(st.integers(0, 2**62 - 1), st.integers(1, 4), st.integers(1, 8), st.integers(1, 4))
def test_no_two_parts_micro_batches_or_chunks_of_a_step_have_the_same_seed(
    first: int, micro_batches: int, rows: int, chunks: int
) -> None:
    """The next micro-batch has the next number: a part must not count on from its own batch's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.training.parts.number_of_parts", lambda examples: examples)
        seeds = list(seeds_of_a_step(first, micro_batches, rows, chunks))
    assert len(seeds) == len(set(seeds)) == micro_batches * rows * chunks


def test_the_parts_and_chunks_of_a_batch_have_these_seeds_for_ever() -> None:
    """A run that is resumed on as many cores draws as it would have."""
    assert [part_seed(5, part) for part in (0, 1, 2, 256)] == [5, 21474836481, 21474836482, 21474836736]
    assert part_seed(part_seed(5, 1), 256) == (5 << 64 | 1 << 32 | 256)


def test_each_chunk_of_the_head_drops_by_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = dropping("LoRA"), []
    site = model.sites[HEAD]
    forward = site.forward
    monkeypatch.setattr(site, "forward", lambda x, seed=None: drawn.append((len(x), seed)) or forward(x, seed))  # type: ignore[func-returns-value]
    hidden = np.ones((7, TINY.hidden_size))
    head_loss(model, hidden, np.zeros(7, int), 1.0, chunk=3, seed=5)
    assert drawn == [(3, 5), (3, 5 << 32 | 3), (1, 5 << 32 | 6)]


def steps(count: int, micro_batches: int) -> list[list[int]]:
    """The seeds of the micro-batches of some steps of a run."""
    model = dropping("LoRA")
    batch = collate([[Example([1, 2, 3], [True] * 3)]], 0)
    state = State(Flat({}, {}), SGD({}), Order(1), np.random.default_rng(5))
    found: list[list[int]] = []

    def compute(model: Model, batches: list[Batch], seeds: Any, *_: Any) -> tuple[float, dict[str, Any]]:
        found.append(list(seeds))
        return 1.0, {"one": np.ones(1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.training.loop.loss_and_gradients", compute)
        patch.setattr(SGD, "update", lambda *_: None)
        for _ in range(count):
            take_step(model, state, [batch] * micro_batches, Plan(steps=count))
    return found


def test_a_step_draws_one_number_and_its_micro_batches_count_on_from_it() -> None:
    """As many draws whatever the number of micro-batches: so the order of the rows does not depend on it."""
    first = np.random.default_rng(5).integers(2**62, size=3).tolist()
    assert steps(3, 1) == [[seed] for seed in first] == SEEDS
    assert steps(3, 4) == [[seed, seed + 1, seed + 2, seed + 3] for seed in first]


SEEDS = [[3712420728229738858], [3725969243744970365], [2376519684796296048]]
