"""LoRA on an embedding: y_n = E[t_n] + s B A[:, t_n], where a lookup takes the place of the product with x."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from support.kit import Implementation, agree, check_gradients
from support.kit_cases import Case, embedding_cases

NAMES = ("tokens", "E", "A", "B", "scale")


def forward(case: Case) -> tuple[object, ...]:
    return tuple(getattr(case, name) for name in NAMES)


@given(case=embedding_cases)
def test_an_embedded_token_is_its_row_of_E_with_s_times_B_A_added(implementation: Implementation, case: Case) -> None:
    y = implementation.embedding_forward(*forward(case))
    changed = case.E + case.scale * (case.B @ case.A).T
    agree("y", y, changed[case.tokens], implementation.exact, case.scale * 4 * len(case.A))


@given(case=embedding_cases)
@pytest.mark.parametrize("name", ["A", "B"])
def test_the_gradient_of_an_embeddings_adapter_is_its_derivative(
    implementation: Implementation, case: Case, name: str
) -> None:
    """A token that occurs twice adds up twice."""
    dA, dB = implementation.embedding_gradients(*forward(case), case.dy)
    arguments = dict(zip(NAMES, forward(case), strict=True))
    check_gradients(
        implementation, "embedding_forward", arguments, {name: {"A": dA, "B": dB}[name]}, case.dy, case.seed
    )


@given(case=embedding_cases)
def test_a_token_that_does_not_occur_has_no_gradient(implementation: Implementation, case: Case) -> None:
    dA, _ = implementation.embedding_gradients(*forward(case), case.dy)
    absent = np.setdiff1d(np.arange(len(case.E)), case.tokens)
    assert not dA[:, absent].any(), f"dA[:, {absent.tolist()}] is not zero"
