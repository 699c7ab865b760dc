"""The operations of a Llama: RMSNorm, RoPE, attention, SwiGLU and cross-entropy, each with its gradient."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.kit import Implementation, agree, check_gradients, convention
from support.kit_cases import Case, attention_cases, cross_entropy_cases, quarters, seeds

counts = st.integers(1, 5)


def gradients_agree(
    implementation: Implementation, function: str, arguments: dict[str, np.ndarray], rest: tuple[float, ...], seed: int
) -> None:
    """The gradients of all array arguments of FUNCTION_forward, as FUNCTION_gradients has them."""
    y = getattr(implementation, f"{function}_forward")(*arguments.values(), *rest)
    dy = quarters(np.random.default_rng([seed, 3]), *y.shape)
    found = getattr(implementation, f"{function}_gradients")(*arguments.values(), *rest, dy)
    named = dict(zip(arguments, found, strict=True))
    extra = {f"rest{i}": value for i, value in enumerate(rest)}
    check_gradients(implementation, f"{function}_forward", arguments | extra, named, dy, seed)


# --- RMSNorm ---


@given(N=counts, D=st.integers(1, 6), eps=st.sampled_from([1e-5, 0.5]), seed=seeds)
def test_rmsnorm_divides_each_row_by_the_root_of_its_mean_square_plus_eps(
    implementation: Implementation, N: int, D: int, eps: float, seed: int
) -> None:
    """eps stands under the root, beside the mean and not the sum, and keeps a row of zeros from dividing by zero."""
    rng = np.random.default_rng(seed)
    x, gain = quarters(rng, N, D), quarters(rng, D)
    x[0] = 0
    expected = gain * x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)
    agree("y", implementation.rmsnorm_forward(x, gain, eps), expected, implementation.exact)


@given(N=counts, D=st.integers(1, 6), eps=st.sampled_from([1e-5, 0.5]), seed=seeds)
def test_the_gradients_of_rmsnorm_are_its_derivatives(
    implementation: Implementation, N: int, D: int, eps: float, seed: int
) -> None:
    """The gain's is summed over rows; x's also goes through the root."""
    rng = np.random.default_rng(seed)
    x = quarters(rng, N, D)
    x += np.sign(x)  # far from zero, where the step is small beside every row
    gradients_agree(implementation, "rmsnorm", {"x": x, "gain": quarters(rng, D)}, (eps,), seed)


# --- RoPE ---

rope_sizes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 4, 8]))


def turned(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Features j and j + d/2 of each head, a point in the plane, turned by position · θ^(−2j/d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@given(size=rope_sizes, theta=st.sampled_from([10000.0, 10.0]), start=st.integers(0, 40), seed=seeds)
def test_rope_keeps_lengths_and_leaves_position_zero_alone(
    implementation: Implementation, size: tuple[int, int, int], theta: float, start: int, seed: int
) -> None:
    x, positions = quarters(np.random.default_rng(seed), *size), start + np.arange(size[0])
    y = implementation.rope_forward(x, positions, theta)
    agree("‖y‖²", (y * y).sum(axis=-1), (x * x).sum(axis=-1), implementation.exact)
    agree("y at position 0", implementation.rope_forward(x, 0 * positions, theta), x, implementation.exact)


@given(d=st.sampled_from([2, 4, 8]), m=st.integers(0, 30), n=st.integers(0, 30), by=st.integers(1, 30), seed=seeds)
def test_a_query_and_a_key_see_only_the_difference_of_their_positions(
    implementation: Implementation, d: int, m: int, n: int, by: int, seed: int
) -> None:
    """Whichever features are paired."""
    q, k = quarters(np.random.default_rng(seed), 2, 1, 1, d)

    def met(m: int, n: int) -> float:
        turned_q, turned_k = (
            implementation.rope_forward(x, np.array([position]), 100.0) for x, position in ((q, m), (k, n))
        )
        return float((turned_q * turned_k).sum())

    agree("q · k", met(m + by, n + by), met(m, n), 10 * implementation.exact, 4 * d)


@convention
@given(size=rope_sizes, theta=st.sampled_from([10000.0, 10.0]), start=st.integers(0, 40), seed=seeds)
def test_rope_turns_features_j_and_j_plus_d_half_as_transformers_does(
    implementation: Implementation, size: tuple[int, int, int], theta: float, start: int, seed: int
) -> None:
    """An implementation that pairs neighbours computes the same model once the rows of q and k are put in its order."""
    x, positions = quarters(np.random.default_rng(seed), *size), start + np.arange(size[0])
    agree("y", implementation.rope_forward(x, positions, theta), turned(x, positions, theta), implementation.exact)


@given(size=rope_sizes, theta=st.sampled_from([10000.0, 10.0]), start=st.integers(0, 40), seed=seeds)
def test_the_gradient_of_rope_is_the_rotation_back(
    implementation: Implementation, size: tuple[int, int, int], theta: float, start: int, seed: int
) -> None:
    dy, positions = quarters(np.random.default_rng(seed), *size), start + np.arange(size[0])
    dx = implementation.rope_gradients(positions, theta, dy)
    agree("dx turned", implementation.rope_forward(dx, positions, theta), dy, implementation.exact)


# --- Attention ---


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Head by head and query by query, as the formula is written."""
    y = np.empty_like(q)
    T, H, d = q.shape
    for t in range(T):
        for h in range(H):
            kv = h // (H // k.shape[1])
            scores = k[: t + 1, kv] @ q[t, h] / math.sqrt(d)
            p = np.exp(scores - scores.max())
            y[t, h] = (p / p.sum()) @ v[: t + 1, kv]
    return y


@given(case=attention_cases)
def test_attention_is_the_softmax_of_scaled_scores_over_the_past(implementation: Implementation, case: Case) -> None:
    """Scores are divided by √d, no query sees its future, and neighbouring query heads share a key head."""
    y = implementation.attention_forward(case.q, case.k, case.v)
    agree("y", y, attended(case.q, case.k, case.v), implementation.exact)


@given(case=attention_cases)
def test_no_output_depends_on_what_comes_later(implementation: Implementation, case: Case) -> None:
    y = implementation.attention_forward(case.q, case.k, case.v)
    k, v = case.k.copy(), case.v.copy()
    k[-1], v[-1] = 5, 7
    changed = implementation.attention_forward(case.q, k, v)
    agree("y before the last token", changed[:-1], y[:-1], implementation.exact)


@given(case=attention_cases)
def test_equal_values_are_their_own_mean_however_large_the_scores(implementation: Implementation, case: Case) -> None:
    """The weights of each query sum to one; scores of 10⁴ make no nan."""
    y = implementation.attention_forward(200 * case.q, 200 * case.k, np.ones_like(case.v))
    agree("y", y, np.ones_like(case.q), implementation.exact)


@given(case=attention_cases)
def test_the_gradients_of_attention_are_its_derivatives(implementation: Implementation, case: Case) -> None:
    """A key head's gradient is the sum over the query heads that read it."""
    arguments = {"q": case.q / 2, "k": case.k / 2, "v": case.v}
    gradients_agree(implementation, "attention", arguments, (), case.seed)


# --- SwiGLU ---


@given(N=counts, F=counts, seed=seeds)
def test_swiglu_is_the_gate_times_its_sigmoid_times_up(
    implementation: Implementation, N: int, F: int, seed: int
) -> None:
    """Also where exp(−gate) would overflow."""
    gate, up = quarters(np.random.default_rng(seed), 2, N, F)
    agree("y", implementation.swiglu_forward(gate, up), gate / (1 + np.exp(-gate)) * up, implementation.exact)
    y = implementation.swiglu_forward(np.array([[-1e4, 1e4]]), np.array([[1.0, 1.0]]))
    agree("y at a gate of ∓10⁴", y, np.array([[0.0, 1e4]]), implementation.exact)


@given(N=counts, F=counts, seed=seeds)
def test_the_gradients_of_swiglu_are_its_derivatives(implementation: Implementation, N: int, F: int, seed: int) -> None:
    gate, up = quarters(np.random.default_rng(seed), 2, N, F)
    gradients_agree(implementation, "swiglu", {"gate": gate, "up": up}, (), seed)


# --- Cross-entropy ---


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    z = logits - logits.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    rows = np.flatnonzero(labels != -100)
    return float(-log_p[rows, labels[rows]].mean())


@given(case=cross_entropy_cases)
def test_the_loss_is_the_mean_over_the_labelled_rows(implementation: Implementation, case: Case) -> None:
    """A label of −100 takes no part, neither above the fraction bar nor below it."""
    loss = implementation.cross_entropy_forward(case.logits, case.labels)
    agree("the loss", loss, mean_loss(case.logits, case.labels), implementation.exact)


@given(case=cross_entropy_cases, shift=st.sampled_from([1000.0, -1000.0]))
def test_the_loss_does_not_see_a_shift_of_all_logits(implementation: Implementation, case: Case, shift: float) -> None:
    """Nor does it overflow: exp(1000) is more than a float holds."""
    loss = implementation.cross_entropy_forward(case.logits + shift, case.labels)
    agree("the loss", loss, mean_loss(case.logits, case.labels), implementation.exact)


@given(case=cross_entropy_cases)
def test_the_gradient_of_the_loss_is_softmax_less_one_at_the_label(implementation: Implementation, case: Case) -> None:
    """Divided by the number of labelled rows; zero in a row without a label."""
    p = np.exp(case.logits) / np.exp(case.logits).sum(axis=1, keepdims=True)
    rows = np.flatnonzero(case.labels != -100)
    expected = np.zeros_like(p)
    expected[rows] = p[rows]
    expected[rows, case.labels[rows]] -= 1
    found = implementation.cross_entropy_gradients(case.logits, case.labels)
    agree("dlogits", found, expected / len(rows), implementation.exact)
