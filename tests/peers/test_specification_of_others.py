"""PEFT and transformers keep the laws for everybody that docs/specification-of-others.md says they keep."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from tools.specification_of_others import OTHERS, held_against, outcomes, results, versions


def statuses(run: dict[str, Any]) -> dict[str, str]:
    return {law: outcome[0] for law, outcome in outcomes(run).items()}


@pytest.mark.parametrize("name", ["peft_lora", "transformers_llama"])
def test_the_page_says_which_laws_peft_and_transformers_keep(name: str) -> None:
    """With the versions that are installed here, which may be later ones than the page's."""
    if versions(sys.executable, OTHERS[name].packages) is None:
        pytest.skip(f"needs {', '.join(OTHERS[name].packages)}")
    found = {"laws": held_against(name, sys.executable, "--hypothesis-profile=mutation")}
    assert statuses(found) == statuses(results()[name])
