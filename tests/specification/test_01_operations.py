"""The operations of a transformer, one section each: what must hold of their forwards and backwards, for all inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.complex_step import check_backward, check_gradients
from support.strategies import LLAMA3, YARN, normal, seeds, sizes

from minilora.ops import attention as attention_module
from minilora.ops.attention import (
    EVERYONE,
    QueryBlock,
    attention,
    attention_backward,
    plain_attention,
    query_blocks,
    visible_keys,
)
from minilora.ops.cross_entropy import IGNORE, cross_entropy, cross_entropy_backward
from minilora.ops.embedding import embedding, embedding_backward
from minilora.ops.linear import linear, linear_backward
from minilora.ops.rmsnorm import rmsnorm, rmsnorm_backward
from minilora.ops.rope import rope, rope_amplitude, rope_angles, rope_backward, rope_frequencies
from minilora.ops.swiglu import sigmoid, swiglu, swiglu_backward


def rounding(scale: float = 1.0) -> Any:
    """Equal up to the rounding of float64."""
    return {"rtol": 1e-12, "atol": 1e-12 * scale}


factors = st.floats(1, 32)


# --- The check itself ---


def test_the_complex_step_accepts_a_right_gradient_and_names_one_that_is_off_by_a_millionth() -> None:
    inputs = {"x": normal(0, 3), "y": normal(0, 3, stream=1)}

    def loss(arrays: Any) -> Any:
        return (arrays["x"] * arrays["x"] * np.exp(arrays["y"])).sum()

    dx, dy = 2 * inputs["x"] * np.exp(inputs["y"]), inputs["x"] ** 2 * np.exp(inputs["y"])
    check_gradients(loss, inputs, {"x": dx, "y": dy})
    with pytest.raises(AssertionError, match="the gradient of y is wrong"):
        check_gradients(loss, inputs, {"x": dx, "y": dy * (1 + 1e-6)})
    with pytest.raises(AssertionError, match="dx has the shape"):
        check_gradients(loss, inputs, {"x": dx[:1], "y": dy})


# --- All operations ---


@dataclass
class Case:
    """An operation at drawn inputs: y, cache = forward(**inputs), and then gradients = backward(dy, cache)."""

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[[Any, Any], Any]
    inputs: dict[str, np.ndarray]
    visible: np.ndarray | None = None  # for attention: which keys each query may see (B, T, S)

    def __repr__(self) -> str:
        return ", ".join(f"{name} {x.shape}" for name, x in self.inputs.items())


@st.composite
def linear_case(draw: st.DrawFn) -> Case:
    n, inner, outer, seed = draw(sizes), draw(sizes), draw(sizes), draw(seeds)
    inputs = {
        "x": normal(seed, n, inner),
        "W": normal(seed, outer, inner, stream=1),
        "b": normal(seed, outer, stream=2),
    }
    return Case(linear, linear_backward, inputs)


@st.composite
def rmsnorm_case(draw: st.DrawFn) -> Case:
    n, width, seed, eps = draw(sizes), draw(sizes), draw(seeds), draw(st.sampled_from([1e-5, 0.1]))
    inputs = {"x": draw(scales) * normal(seed, n, width), "gain": normal(seed, width, stream=1)}
    return Case(lambda x, gain: rmsnorm(x, gain, eps), rmsnorm_backward, inputs)


@st.composite
def rope_case(draw: st.DrawFn, amplitude: float = 1.0) -> Case:
    batch, time, heads, d, seed = draw(sizes), draw(sizes), draw(sizes), 2 * draw(sizes), draw(seeds)
    positions = np.random.default_rng(seed).integers(0, 1000, (batch, time))
    frequencies = rope_frequencies(d, 10000.0)
    return Case(
        lambda x: (rope(x, *rope_angles(positions, frequencies, x.real.dtype, amplitude)), x.real.dtype),
        lambda dy, dtype: rope_backward(dy, *rope_angles(positions, frequencies, dtype, amplitude)),
        {"x": normal(seed, batch, time, heads, d)},
    )


@st.composite
def attention_case(draw: st.DrawFn) -> Case:
    """Several segments in a row, keys of the past and some for everyone before them, groups of queries that share a
    key."""
    batch, time, past, d, seed = draw(sizes), draw(sizes), draw(st.integers(0, 2)), draw(sizes), draw(seeds)
    key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    segments = draw(st.lists(st.integers(EVERYONE, 2), min_size=past + time, max_size=past + time).map(sorted))
    rows = np.array([segments] * batch)
    inputs = {
        "q": draw(scales) * normal(seed, batch, time, key_heads * group, d),
        "k": normal(seed, batch, past + time, key_heads, d, stream=1),
        "v": normal(seed, batch, past + time, key_heads, d, stream=2),
    }
    visible = visible_keys(*places(rows, past))
    return Case(lambda q, k, v: attention(q, k, v, causal(rows, past)), attention_backward, inputs, visible)


@st.composite
def swiglu_case(draw: st.DrawFn) -> Case:
    n, width, seed, scale = draw(sizes), draw(sizes), draw(seeds), draw(scales)
    inputs = {"gate": scale * normal(seed, n, width), "up": normal(seed, n, width, stream=1)}
    return Case(swiglu, swiglu_backward, inputs)


@st.composite
def embedding_case(draw: st.DrawFn) -> Case:
    vocab, width, seed = draw(sizes), draw(sizes), draw(seeds)
    tokens = np.array(draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=8)))
    return Case(lambda E: embedding(tokens, E), embedding_backward, {"E": normal(seed, vocab, width)})


@st.composite
def cross_entropy_case(draw: st.DrawFn) -> Case:
    vocab, seed = draw(sizes), draw(seeds)
    labels = np.array(draw(st.lists(st.sampled_from([IGNORE, *range(vocab)]), min_size=1, max_size=5)))
    inputs = {"logits": draw(scales) * normal(seed, len(labels), vocab)}
    return Case(lambda logits: cross_entropy(logits, labels), cross_entropy_backward, inputs)


scales = st.sampled_from([0.01, 1.0, 10.0])
OPERATIONS = {
    "linear": linear_case(),
    "rmsnorm": rmsnorm_case(),
    "rope": rope_case(),
    "rope that stretches": rope_case(1.3),
    "attention": attention_case(),
    "swiglu": swiglu_case(),
    "embedding": embedding_case(),
    "cross_entropy": cross_entropy_case(),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


def places(segments: np.ndarray, past: int = 0) -> tuple[np.ndarray, ...]:
    """Positions and segments of queries and keys, where segments (B, S) stand in a row and the first `past` have no
    query."""
    positions = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    return positions[:, past:], segments[:, past:], positions, segments


def causal(segments: np.ndarray, past: int = 0) -> list[QueryBlock]:
    """Which keys those queries may see."""
    return query_blocks(*places(segments, past))


@every_operation
@given(data=st.data(), seed=seeds)
def test_every_backward_is_the_exact_derivative_of_its_forward(operation: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(OPERATIONS[operation])
    check_backward(case.forward, case.backward, case.inputs, seed)


@every_operation
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@given(data=st.data())
def test_the_dtype_that_goes_in_comes_out(operation: str, dtype: str, data: st.DataObject) -> None:
    """float32 stays float32, so that no hidden conversion costs memory; complex128 stays complex, so that the check
    works."""
    case = data.draw(OPERATIONS[operation])
    y, cache = case.forward(**{name: x.astype(dtype) for name, x in case.inputs.items()})
    gradients = case.backward(y, cache)
    assert {a.dtype for a in (y, *(gradients if isinstance(gradients, tuple) else [gradients]))} == {np.dtype(dtype)}


@every_operation
@given(data=st.data())
def test_nothing_that_an_operation_is_given_is_written_to(operation: str, data: st.DataObject) -> None:
    """So two forwards never clobber each other, and a backward may be repeated."""
    case = data.draw(OPERATIONS[operation])
    given_bytes = {name: x.tobytes() for name, x in case.inputs.items()}
    y, cache = case.forward(**case.inputs)
    dy = normal(0, *y.shape, stream=5)
    dy_bytes = dy.tobytes()
    first, second = case.backward(dy, cache), case.backward(dy, cache)
    assert {name: x.tobytes() for name, x in case.inputs.items()} == given_bytes
    assert dy.tobytes() == dy_bytes
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


# --- Linear: y = x Wᵀ + b ---


@given(linear_case())
def test_linear_is_the_sum_over_inputs_plus_the_bias(case: Case) -> None:
    """The definition, written out in plain Python."""
    x, W, b = case.inputs.values()
    y, _ = linear(x, W, b)
    expected = [[sum(row * W[o]) + b[o] for o in range(len(W))] for row in x]
    np.testing.assert_allclose(y, expected, **rounding())
    np.testing.assert_allclose(linear(x, W)[0], y - b, **rounding())


# --- RMSNorm: y = g ⊙ x / √(mean(x²) + ε) ---


@given(rmsnorm_case(), st.sampled_from([0.0, 1e-5, 0.1]))
def test_rmsnorm_divides_each_row_by_its_root_mean_square(case: Case, eps: float) -> None:
    x, gain = case.inputs.values()
    y, _ = rmsnorm(x, gain, eps)
    for row, out in zip(x, y, strict=True):
        rms = math.sqrt(sum(value**2 for value in row) / len(row) + eps)
        np.testing.assert_allclose(out, gain * row / rms, **rounding())


@given(rmsnorm_case(), st.sampled_from([1e-3, 0.5, 1e4]))
def test_rmsnorm_does_not_see_the_scale_of_its_input_when_eps_is_zero(case: Case, scale: float) -> None:
    """x and c·x have the same direction, and only the direction is left."""
    x, gain = case.inputs.values()
    np.testing.assert_allclose(rmsnorm(scale * x, gain, 0.0)[0], rmsnorm(x, gain, 0.0)[0], **rounding())


@given(rmsnorm_case(), seeds)
def test_rmsnorm_passes_no_gradient_along_its_input_when_eps_is_zero(case: Case, seed: int) -> None:
    """The output does not change along x, so the gradient is orthogonal to it: Σ x·dx = 0."""
    x, gain = case.inputs.values()
    y, cache = rmsnorm(x, gain, 0.0)
    dx, _ = rmsnorm_backward(normal(seed, *y.shape, stream=5), cache)
    np.testing.assert_allclose((x * dx).sum(axis=-1), 0, atol=1e-11)


# --- RoPE: pairs of features, turned by position · frequency ---


@given(rope_case())
def test_rope_is_orthogonal(case: Case) -> None:
    """Lengths and inner products of tokens at one position stay what they were."""
    x = case.inputs["x"]
    y, _ = case.forward(x)
    np.testing.assert_allclose(y @ y.swapaxes(-1, -2), x @ x.swapaxes(-1, -2), **rounding(10))


@given(seeds, sizes, st.integers(0, 500), st.integers(0, 500), st.integers(0, 5000))
def test_rope_lets_a_query_and_a_key_see_only_the_difference_of_their_positions(
    seed: int, half: int, m: int, n: int, shift: int
) -> None:
    """Two rotations, by m and by n, leave the angle m − n between them."""
    q, k = normal(seed, 2, 1, 1, 1, 2 * half)

    def score(query_at: int, key_at: int) -> float:
        turned = [
            rope(x, *rope_angles(np.array([[at]]), rope_frequencies(2 * half, 10000.0), float))
            for x, at in ((q, query_at), (k, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(m + shift, n + shift) == pytest.approx(score(m, n), abs=1e-10)


@given(rope_case())
def test_the_backward_of_rope_is_the_rotation_by_the_opposite_angle(case: Case) -> None:
    """The transpose of a rotation is its inverse."""
    x = case.inputs["x"]
    y, cache = case.forward(x)
    np.testing.assert_allclose(case.backward(y, cache), x, **rounding(10))


@given(seeds, sizes, st.integers(0, 8000))
def test_rope_pairs_feature_i_with_feature_i_plus_half_and_multiplies_by_a_unit_complex_number(
    seed: int, half: int, position: int
) -> None:
    x = normal(seed, 1, 1, 1, 2 * half)
    y = rope(x, *rope_angles(np.array([[position]]), rope_frequencies(2 * half, 10000.0), float))
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / (2 * half))
        turned = complex(x[..., i].item(), x[..., i + half].item()) * complex(math.cos(angle), math.sin(angle))
        np.testing.assert_allclose(y[0, 0, 0, [i, i + half]], [turned.real, turned.imag], **rounding())


def test_rope_angles_are_exact_in_float32_at_large_positions() -> None:
    """An angle formed in float32 would be off by 5e-4 here."""
    cos, sin = rope_angles(np.array([[8191]]), rope_frequencies(64, 10000.0), np.float32)
    angles = 8191 * 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(angles), atol=1e-7)


@given(sizes, st.sampled_from([1e4, 1e5]), st.floats(1, 32))
def test_linear_scaling_of_rope_divides_every_position(half: int, theta: float, factor: float) -> None:
    scaled = rope_frequencies(2 * half, theta, {"factor": factor})
    np.testing.assert_allclose(scaled * factor, rope_frequencies(2 * half, theta), **rounding())


@given(st.integers(1, 64), st.sampled_from([1e2, 1e4, 5e5]), st.sampled_from([16.0, 8192.0]), st.floats(1, 32))
def test_llama3_scaling_of_rope_keeps_short_waves_stretches_long_ones_and_interpolates_between(
    half: int, theta: float, context: float, factor: float
) -> None:
    scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": context}
    expected = [llama3_as_released(theta ** (-2 * i / (2 * half)), context, factor) for i in range(half)]
    np.testing.assert_allclose(rope_frequencies(2 * half, theta, scaling), expected, **rounding())


def llama3_as_released(frequency: float, context: float, factor: float) -> float:
    """Step by step as in the code that Meta released with Llama 3.1."""
    low, high = 1.0, 4.0
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@given(st.integers(1, 64), st.sampled_from([1e2, 1e4, 5e5]), st.sampled_from([2.0, 16.0, 8192.0, 2.0**20]), factors)
@example(8, 2.5, 26.0, 4.0)  # the ramp would end beyond the last feature
def test_yarn_keeps_pairs_that_turn_often_stretches_those_that_hardly_turn_and_fades_from_one_to_the_other(
    half: int, theta: float, context: float, factor: float
) -> None:
    for truncate in (0.0, 1.0):
        scaling = {**YARN, "factor": factor, "original_max_position_embeddings": context, "truncate": truncate}
        found = rope_frequencies(2 * half, theta, scaling)
        np.testing.assert_allclose(found, yarn_by_hand(half, theta, scaling), **rounding())


def yarn_by_hand(half: int, theta: float, scaling: dict[str, float]) -> list[float]:
    """Pair by pair. Where a number of turns falls is found by interpolating between the turns of the pairs."""

    def turns(i: float) -> float:
        return float(scaling["original_max_position_embeddings"] * theta ** (-i / half) / (2 * math.pi))

    def pair(wanted: float) -> float:
        return math.log(turns(0) / wanted) / math.log(turns(0) / turns(1))

    first, last = pair(scaling["beta_fast"]), pair(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    found = []
    for i in range(half):
        frequency = theta ** (-i / half)
        way = (i - first) / ((last - first) or 0.001)
        kept = 1 - min(max(way, 0), 1)
        found.append(frequency * kept + frequency / scaling["factor"] * (1 - kept))
    return found


def test_only_yarn_stretches_what_it_turns() -> None:
    assert rope_amplitude(None) == rope_amplitude({"factor": 2.0}) == rope_amplitude(LLAMA3) == 1.0
    assert rope_amplitude(YARN) == YARN["attention_factor"] != 1.0
    cos, sin = rope_angles(np.array([[3, 5]]), rope_frequencies(6, 100.0), float, 1.2)
    np.testing.assert_allclose(cos**2 + sin**2, 1.44)


# --- Attention: y = softmax(q kᵀ/√d) v over the visible keys ---


@given(attention_case())
def test_attention_is_the_mean_of_the_visible_values_weighted_by_the_softmax_of_the_scores(case: Case) -> None:
    """Query by query, key by key, from the definition; query head h reads key head h // G."""
    q, k, v = case.inputs.values()
    y, _ = case.forward(q, k, v)
    (B, T, H, d), G = q.shape, q.shape[2] // k.shape[2]
    assert case.visible is not None
    for b, t, h in np.ndindex(B, T, H):
        seen = np.flatnonzero(case.visible[b, t])
        scores = [float(q[b, t, h] @ k[b, s, h // G]) / math.sqrt(d) for s in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        mean = sum(w * v[b, s, h // G] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        np.testing.assert_allclose(y[b, t, h], mean, **rounding())


@given(attention_case(), st.integers(1, 3), seeds)
def test_plain_attention_is_the_fast_one_and_has_its_gradients(case: Case, queries: int, seed: int) -> None:
    """The gradients of the plain formula, by the complex step, are those of the fast one's backward."""
    visible = case.visible
    assert visible is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "QUERIES_AT_ONCE", queries)
        y, cache = case.forward(**case.inputs)
    np.testing.assert_allclose(plain_attention(**case.inputs, visible=visible), y, **rounding())
    check_backward(lambda q, k, v: (plain_attention(q, k, v, visible), cache), attention_backward, case.inputs, seed)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@given(attention_case())
def test_plain_attention_keeps_the_dtype(dtype: str, case: Case) -> None:
    q, k, v = (x.astype(dtype) for x in case.inputs.values())
    assert plain_attention(q, k, v, case.visible).dtype == np.dtype(dtype)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6))
def test_a_query_sees_the_keys_of_its_own_segment_that_do_not_come_after_it(tokens: list[tuple[int, int]]) -> None:
    """This is the causal mask, and each query sees at least itself."""
    segments, positions = (np.array([column]) for column in zip(*tokens, strict=True))
    visible = visible_keys(positions, segments, positions, segments)
    for t, (segment, position) in enumerate(tokens):
        assert visible[0, t].tolist() == [s == segment and p <= position for s, p in tokens]
        assert visible[0, t, t]


@given(attention_case())
def test_attention_rows_sum_to_one(case: Case) -> None:
    """The weights of a query are probabilities, also when only their logarithms were kept."""
    _, cache = case.forward(**case.inputs)
    for block, block_cache in zip(cache.blocks, cache.caches, strict=True):
        k = cache.k[:, block.keys].transpose(0, 2, 1, 3)
        P = np.exp(attention_module._scores(block_cache.q, k, block.visible) - block_cache.log_z)
        np.testing.assert_allclose(P.sum(axis=-1), 1, **rounding())


@given(attention_case(), st.integers(1, 3))
def test_attention_in_blocks_of_queries_equals_attention_at_once(case: Case, queries: int) -> None:
    """The block size is a matter of memory and speed; results do not depend on it."""
    whole, whole_cache = case.forward(**case.inputs)
    dy = normal(0, *whole.shape, stream=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "QUERIES_AT_ONCE", queries)
        y, cache = case.forward(**case.inputs)
        gradients = attention_backward(dy, cache)
    T = y.shape[1]
    assert [block.queries.stop for block in cache.blocks] == [
        min(end, T) for end in range(queries, T + queries, queries)
    ]
    assert case.visible is not None
    for block in cache.blocks:
        visible = case.visible[:, block.queries]
        assert np.array_equal(visible[:, :, block.keys], block.visible)
        assert block.visible.any(axis=(0, 1)).all() and block.visible.sum() == visible.sum()
    np.testing.assert_allclose(y, whole, **rounding())
    for ours, theirs in zip(gradients, attention_backward(dy, whole_cache), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * max(1, abs(theirs).max()))


@given(seeds, st.integers(2, 6), st.data())
def test_changing_the_future_changes_no_byte_of_the_past(seed: int, time: int, data: st.DataObject) -> None:
    """Causality: a model that saw the answer in training would learn nothing of it."""
    now = data.draw(st.integers(1, time - 1), label="the first token of the future")
    q, k, v, dy = normal(seed, 4, 1, time, 2, 4)
    k2, v2 = k.copy(), v.copy()
    k2[:, now:], v2[:, now:] = normal(seed, 2, 1, time - now, 2, 4, stream=1)
    visible = causal(np.ones((1, time), int))
    y, cache = attention(q, k, v, visible)
    assert y[:, :now].tobytes() == attention(q, k2, v2, visible)[0][:, :now].tobytes()
    dy[:, now:] = 0  # and backwards: a loss on the past has no gradient in the future
    for gradient in attention_backward(dy, cache):
        assert not gradient[:, now:].any()


@given(seeds, sizes, sizes)
def test_segments_do_not_see_each_other(seed: int, first: int, second: int) -> None:
    """Examples packed into one row must not read one another."""
    q, k, v, dy = normal(seed, 4, 1, first + second, 2, 4)
    together, cache = attention(q, k, v, causal(np.array([[1] * first + [2] * second])))
    gradients = attention_backward(dy, cache)
    for part in (np.s_[:, :first], np.s_[:, first:]):
        q1, k1, v1 = q[part], k[part], v[part]
        alone, cache1 = attention(q1, k1, v1, causal(np.ones(q1.shape[:2], int)))
        np.testing.assert_allclose(together[part], alone, **rounding())
        for gradient, alone_gradient in zip(gradients, attention_backward(dy[part], cache1), strict=True):
            np.testing.assert_allclose(gradient[part], alone_gradient, **rounding())


@given(attention_case(), seeds)
def test_adding_the_same_to_all_scores_of_a_query_changes_nothing(case: Case, seed: int) -> None:
    """Softmax does not see a shift. Moving every key by the same vector shifts each query's scores by one number."""
    q, k, v = case.inputs.values()
    shift = normal(seed, k.shape[0], 1, *k.shape[2:], stream=5)
    np.testing.assert_allclose(case.forward(q, k + shift, v)[0], case.forward(q, k, v)[0], rtol=1e-10, atol=1e-10)


@given(attention_case(), seeds)
def test_grouped_queries_are_multi_head_attention_with_repeated_keys(case: Case, seed: int) -> None:
    """And backwards: a shared key's gradient is the sum of those of its copies."""
    q, k, v = case.inputs.values()
    B, S, K, d = k.shape
    G = q.shape[2] // K
    grouped, grouped_cache = case.forward(q, k, v)
    repeated, repeated_cache = case.forward(q, k.repeat(G, axis=2), v.repeat(G, axis=2))
    np.testing.assert_allclose(grouped, repeated, **rounding())
    dy = normal(seed, *grouped.shape, stream=5)
    (dq, dk, dv), (dq1, dk1, dv1) = attention_backward(dy, grouped_cache), attention_backward(dy, repeated_cache)
    np.testing.assert_allclose(dq, dq1, **rounding(100))
    np.testing.assert_allclose(dk, dk1.reshape(B, S, K, G, d).sum(axis=3), **rounding(100))
    np.testing.assert_allclose(dv, dv1.reshape(B, S, K, G, d).sum(axis=3), **rounding(100))


def test_huge_scores_do_not_overflow() -> None:
    """The largest score is subtracted before the exponential."""
    q, k, v = 1e200 * normal(0, 1, 3, 2, 4), normal(1, 1, 3, 2, 4), normal(2, 1, 3, 2, 4)
    y, _ = attention(q, k, v, causal(np.ones((1, 3), int)))
    assert np.isfinite(y).all()


# --- SwiGLU: y = silu(gate) ⊙ up ---


@given(swiglu_case())
def test_swiglu_is_the_gate_times_its_sigmoid_times_up(case: Case) -> None:
    gate, up = case.inputs.values()
    y, _ = swiglu(gate, up)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, **rounding())


@given(st.floats(-1e300, 1e300))
def test_the_sigmoid_stays_between_0_and_1_and_mirrors_itself(x: float) -> None:
    s, mirrored = sigmoid(np.array([x, -x]))
    assert 0 <= s <= 1
    assert s + mirrored == pytest.approx(1, abs=1e-15)


# --- Embedding: x = E[token] ---


@given(embedding_case())
def test_embedding_copies_the_row_of_each_token(case: Case) -> None:
    x, cache = case.forward(**case.inputs)
    assert [row.tobytes() for row in x] == [case.inputs["E"][token].tobytes() for token in cache.tokens]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), seeds)
def test_the_gradient_of_an_embedding_adds_up_where_a_token_repeats_and_is_zero_where_it_is_absent(
    tokens: list[int], seed: int
) -> None:
    dx = normal(seed, len(tokens), 3)
    _, cache = embedding(np.array(tokens), np.zeros((5, 3)))
    dE = embedding_backward(dx, cache)
    for token in range(5):
        expected = sum((row for t, row in zip(tokens, dx, strict=True) if t == token), np.zeros(3))
        np.testing.assert_allclose(dE[token], expected, **rounding())


# --- Cross-entropy: Σ −log softmax(z)[label] over the labelled rows ---


@given(cross_entropy_case())
def test_cross_entropy_is_minus_the_log_of_the_labels_probability_summed_over_labelled_rows(case: Case) -> None:
    loss, cache = case.forward(**case.inputs)
    expected = sum(
        math.log(sum(math.exp(z - row[label]) for z in row))
        for row, label in zip(case.inputs["logits"].tolist(), cache.labels.tolist(), strict=True)
        if label != IGNORE
    )
    assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(cross_entropy_case(), st.floats(-1e3, 1e3))
def test_cross_entropy_does_not_see_a_shift_of_a_rows_logits(case: Case, shift: float) -> None:
    """Softmax divides a common factor away."""
    logits = case.inputs["logits"]
    assert float(case.forward(logits + shift)[0]) == pytest.approx(float(case.forward(logits)[0]), abs=1e-10)


@given(cross_entropy_case(), st.floats(0.1, 2))
def test_logits_probabilities_and_gradient_may_be_one_array_after_the_other_in_the_same_place(
    case: Case, dloss: float
) -> None:
    logits = case.inputs["logits"].copy()
    apart, cache = case.forward(logits)
    expected = cross_entropy_backward(dloss, cache)
    together, cache = cross_entropy(logits, cache.labels, overwrite=True)
    dlogits = cross_entropy_backward(dloss, cache, overwrite=True)
    assert together == apart and np.array_equal(dlogits, expected)
    assert np.shares_memory(dlogits, logits)


@given(st.integers(1, 50), st.floats(-100, 100))
def test_uniform_logits_have_the_loss_log_V(vocab: int, logit: float) -> None:
    """A model that knows nothing pays the logarithm of the size of its vocabulary."""
    loss, _ = cross_entropy(np.full((1, vocab), logit), np.array([vocab - 1]))
    assert float(loss) == pytest.approx(math.log(vocab), abs=1e-14)


@given(cross_entropy_case())
def test_the_gradient_of_the_logits_sums_to_zero_over_the_vocabulary(case: Case) -> None:
    """The gradient is p minus one at the label, and both sum to one."""
    _, cache = case.forward(**case.inputs)
    np.testing.assert_allclose(cross_entropy_backward(1.0, cache).sum(axis=-1), 0, atol=1e-14)


@given(cross_entropy_case())
def test_rows_without_a_label_have_no_loss_and_a_gradient_of_exactly_zero(case: Case) -> None:
    """Prompts and padding teach nothing."""
    logits = case.inputs["logits"]
    loss, cache = case.forward(logits)
    unlabelled = cache.labels == IGNORE
    assert not cross_entropy_backward(1.0, cache)[unlabelled].any()
    if not unlabelled.all():
        labelled_loss, _ = cross_entropy(logits[~unlabelled], cache.labels[~unlabelled])
        assert float(loss) == pytest.approx(float(labelled_loss), rel=1e-14)


@given(cross_entropy_case(), st.floats(-4, 4))
def test_the_gradient_of_the_logits_is_proportional_to_that_of_the_loss(case: Case, dloss: float) -> None:
    _, cache = case.forward(**case.inputs)
    np.testing.assert_allclose(
        cross_entropy_backward(dloss, cache), dloss * cross_entropy_backward(1.0, cache), **rounding()
    )


def test_huge_logits_do_not_overflow() -> None:
    """The largest logit is subtracted before the exponential."""
    loss, cache = cross_entropy(np.array([[1e300, 0.0, -1e300], [-1e300, 0.0, 5.0]]), np.array([0, 2]))
    assert float(loss) == pytest.approx(math.log1p(math.exp(-5)))
    assert np.isfinite(cross_entropy_backward(1.0, cache)).all()
