"""What the laws of `specification/laws` draw: small arrays of quarters, whose products have no rounding to speak of.

So the arithmetic of a counterexample can be followed with a pencil. This file needs NumPy and Hypothesis alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

seeds = st.integers(0, 2**16)
shares = st.sampled_from([0.5, 0.25, 0.1, 0.75])  # of inputs that are dropped
scales = st.sampled_from([2.0, 1.0, 0.5, 16.0, 0.25, 3.0])


def quarters(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Multiples of ¼ from −2 to 2, without 0: no factor hides another."""
    return np.asarray(rng.integers(1, 9, shape) * rng.choice([-1, 1], shape) / 4)


def shown(value: Any) -> str:
    """On one line, arrays as lists."""
    if isinstance(value, np.ndarray):
        return f"{value.tolist()}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(part)}' for key, part in value.items())}}}"
    return f"{value!r}"


class Case:
    """Named values, printed whole: Hypothesis shows the smallest case that breaks a law."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:  # for type checkers: the names are those of `values`
        raise AttributeError(name)

    def __repr__(self) -> str:
        return ", ".join(f"{name} = {shown(value)}" for name, value in vars(self).items() if name != "seed")


def drawn(make: Callable[..., Case], *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
    """Cases made of drawn parts. (`st.builds` would do the same, but show the parts instead of the case.)"""

    @st.composite
    def one(draw: st.DrawFn) -> Case:
        return make(*map(draw, parts))

    return one()


class Sizes(NamedTuple):
    N: int
    n_in: int
    n_out: int
    r: int


sizes = st.builds(Sizes, st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))


def linear_case(size: Sizes, scale: float, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    N, n_in, n_out, r = size
    x, W, A, B = (quarters(rng, *shape) for shape in ((N, n_in), (n_out, n_in), (r, n_in), (n_out, r)))
    return Case(x=x, W=W, A=A, B=B, scale=scale, dy=quarters(rng, N, n_out), seed=seed)


linear_cases = drawn(linear_case, sizes, scales, seeds)


def dora_case(size: Sizes, scale: float, seed: int) -> Case:
    """A change that is small beside W, so that no row of W + s B A is near zero, and lengths of either sign."""
    case = linear_case(size, scale, seed)
    case.W = np.abs(case.W) + 1
    case.B = np.abs(case.B) / 8
    case.A = np.abs(case.A) / 4
    m = quarters(np.random.default_rng([seed, 1]), size.n_out)
    return Case(
        **{"x": case.x, "W": case.W, "A": case.A, "B": case.B, "m": m, "scale": scale, "dy": case.dy}, seed=seed
    )


dora_cases = drawn(dora_case, sizes, st.sampled_from([1.0, 0.5, 2.0]), seeds)


def embedding_case(size: Sizes, scale: float, seed: int) -> Case:
    """More tokens than words: some words occur twice."""
    rng = np.random.default_rng(seed)
    N, V, D, r = size
    E, A, B = (quarters(rng, *shape) for shape in ((V, D), (r, V), (D, r)))
    tokens = rng.integers(0, V, N + 2)
    return Case(tokens=tokens, E=E, A=A, B=B, scale=scale, dy=quarters(rng, N + 2, D), seed=seed)


embedding_cases = drawn(embedding_case, sizes, scales, seeds)


def attention_case(T: int, heads: tuple[int, int], d: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    H, K = heads
    q, k, v, dy = (quarters(rng, T, n, d) for n in (H, K, K, H))
    return Case(q=q, k=k, v=v, dy=dy, seed=seed)


attention_cases = drawn(
    attention_case,
    st.integers(1, 5),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 2)]),
    st.integers(1, 4),
    seeds,
)


def labels_of(rng: np.random.Generator, N: int, V: int) -> np.ndarray:
    """Labels, at least one of them there, about a third of them −100."""
    labels = np.where(rng.random(N) < 0.35, -100, rng.integers(0, V, N))
    if (labels == -100).all():
        labels[-1] = rng.integers(V)
    return labels


def cross_entropy_case(N: int, V: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    return Case(logits=quarters(rng, N, V), labels=labels_of(rng, N, V), seed=seed)


cross_entropy_cases = drawn(cross_entropy_case, st.integers(1, 6), st.integers(2, 5), seeds)


def micro_batch_case(lengths: list[int], size: Sizes, scale: float, seed: int) -> Case:
    """Micro-batches of unequal lengths and shares of labels; the outputs of the map are the logits."""
    rng = np.random.default_rng(seed)
    case = linear_case(size._replace(n_out=size.n_out + 1), scale, seed)
    V = len(case.W)
    batches = [(quarters(rng, n, size.n_in), labels_of(rng, n, V)) for n in lengths]
    return Case(micro_batches=batches, W=case.W / 2, A=case.A / 2, B=case.B / 2, scale=scale, seed=seed)


micro_batch_cases = drawn(
    micro_batch_case,
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    sizes,
    st.sampled_from([1.0, 0.5, 2.0]),
    seeds,
)
