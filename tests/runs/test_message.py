"""The message between ranks holds the loss and every gradient as they are, to the last bit and in their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.message import Layout, Sum, checksum, packed, pieces, unpack

shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
arrays = st.tuples(shapes, st.sampled_from(["float32", "float64"]), st.integers(0, 5), st.integers(0, 99))


def array(shape: tuple[int, ...], dtype: str, turned: int, seed: int) -> np.ndarray:
    """Random numbers, and NaN, with the axes in an order of their own."""
    axes = np.random.default_rng(turned).permutation(len(shape))
    made = np.random.default_rng(seed).standard_normal([shape[axis] for axis in axes]).astype(dtype)
    made.reshape(-1)[:1] = np.nan
    return made.transpose(np.argsort(axes))


@given(drawn=st.dictionaries(st.text(min_size=1), arrays, max_size=4), loss=st.floats())
def test_what_is_unpacked_is_what_was_packed_and_lies_in_memory_as_it_did(
    drawn: dict[str, tuple[tuple[int, ...], str, int, int]], loss: float
) -> None:
    """In the same order of axes and names: the sum of an array, and the norm of all, round by these."""
    gradients = {name: array(*of_one) for name, of_one in drawn.items()}
    there, here = Sum(loss, gradients), Sum()
    buffer = packed(there)
    unpack(buffer.copy(), Layout(gradients), here)
    assert np.array_equal(here.loss, loss, equal_nan=True)
    assert list(here.gradients) == list(gradients)
    for name, g in gradients.items():
        found = here.gradients[name]
        assert found.dtype == g.dtype and found.shape == g.shape and found.tobytes() == g.tobytes()
        long = [axis for axis in range(g.ndim) if g.shape[axis] > 1]
        assert [found.strides[axis] for axis in long] == [g.strides[axis] for axis in long]
    assert packed(here).tobytes() == buffer.tobytes(), "passed on, it is the same"
    assert len(buffer) <= 64 + sum(64 + g.nbytes for g in gradients.values())


def test_what_is_added_to_a_sum_is_in_the_message_that_is_passed_on() -> None:
    gradients = {"a": np.ones((2, 3), np.float32)}
    here = Sum()
    unpack(packed(Sum(1.5, gradients)), Layout(gradients), here)
    here.loss += 0.25
    here.gradients["a"] += 2
    there = Sum()
    unpack(packed(here), Layout(gradients), there)
    assert there.loss == 1.75 and (there.gradients["a"] == 3).all()


@pytest.mark.parametrize("other", [{"b": np.ones(2)}, {"a": np.ones(3)}, {"a": np.ones(2, np.float32)}], ids=str)
def test_a_message_that_was_laid_out_in_another_way_is_refused(other: dict[str, np.ndarray]) -> None:
    with pytest.raises(RuntimeError, match="different names or shapes"):
        unpack(packed(Sum(0.0, {"a": np.ones(2)})), Layout(other), Sum())


def test_a_message_goes_in_pieces_that_mpi_can_count_and_a_checksum_sees_every_byte() -> None:
    buffer = np.broadcast_to(np.zeros(1, np.uint8), 2**31 + 5)
    assert [len(piece) for piece in pieces(buffer)] == [2**30, 2**30, 5]
    assert checksum([b"ab", b"c"]) == checksum([b"abc"]) != checksum([b"abd"])
