"""Work side by side on several cores: its order, its errors, and how many cores it takes."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import backend
from minilora.backend import cores, use_module
from minilora.training.parts import number_of_parts, side_by_side


@given(items=st.lists(st.integers(), min_size=1, max_size=5))
def test_results_come_in_the_order_of_the_items(items: list[int]) -> None:
    assert list(side_by_side(lambda item: -item, items)) == [-item for item in items]


def test_items_are_worked_on_at_the_same_time_with_products_on_one_core_each() -> None:
    barrier = threading.Barrier(2, timeout=20)  # nobody passes it alone

    def work(item: int) -> tuple[int, int]:
        barrier.wait()
        return item, cores()

    before = cores()
    assert list(side_by_side(work, [1, 2])) == [(1, 1), (2, 1)]
    assert cores() == before
    assert list(side_by_side(lambda item: cores(), [1])) == [before]


def test_what_goes_wrong_side_by_side_is_raised_and_the_cores_are_given_back() -> None:
    def work(item: int) -> None:
        raise ArithmeticError(str(item))

    before = cores()
    with pytest.raises(ArithmeticError, match="1"):
        list(side_by_side(work, [1, 2]))
    assert cores() == before


def test_nothing_goes_side_by_side_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_blas", lambda: pytest.fail("asked"))
    previous = use_module(object())
    try:
        assert number_of_parts(8) == 1
    finally:
        use_module(previous)


def test_a_batch_is_divided_among_the_cores_unless_most_of_them_would_get_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minilora.training.parts.cores", lambda: 4)
    assert [number_of_parts(rows) for rows in (1, 2, 3, 8)] == [1, 2, 3, 4]
