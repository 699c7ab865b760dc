"""docs/notebook.ipynb runs from top to bottom, what it says is so, and its own cells made what it shows."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
pytest.importorskip("ipykernel", reason="pip install -e '.[notebook]'")

from support.pages import anchors
from tools.run_notebook import DIGEST, NOTEBOOK, code_cells, digest, executed, read

from minilora.book.equations import LINK, file_of, table

PARAMETERS = "STEPS, QUESTIONS = 3, 4"


@pytest.fixture(scope="module")
def ran() -> Any:
    """The notebook after a run of few steps. A cell that fails, fails here."""
    return executed(PARAMETERS)


def kinds(cell: Any) -> list[str]:
    """What a cell shows: text, values, pictures."""
    return [", ".join(sorted(output.get("data", {output.get("name", "error"): 0}))) for output in cell.outputs]


def texts(notebook: Any) -> list[str]:
    """All that the notebook prints and answers, cell by cell."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs]


def test_every_cell_runs_and_whatever_is_claimed_to_be_equal_is_equal(ran: Any) -> None:
    assert [cell.execution_count for cell in code_cells(ran)] == [*range(1, len(code_cells(ran)) + 1)]
    assert PARAMETERS in code_cells(ran)[0].source, "it was to be a short run"
    claims = re.findall(r"^\[?(?:True|False).*$|: +(?:True|False)$", "\n".join(texts(ran)), flags=re.M)
    assert len(claims) >= 7 and not any("False" in claim for claim in claims)


def test_its_figures_bear_out_its_words(ran: Any) -> None:
    said = "\n".join(texts(ran))
    (by_backward,) = re.findall(r"by the backward: +(\S+)", said)
    (by_complex_step,) = re.findall(r"by the complex step: +(\S+)", said)
    assert float(by_backward) == pytest.approx(float(by_complex_step), rel=1e-12)
    assert "the largest gradient of any A: 0.0\n" in said and "A has moved by 0.0 and B by 0.0" not in said
    assert "the largest rank of any ΔW: 8\n" in said and "assignment destination is read-only" in said
    before, after = re.findall(r"loss on the test rows: +(\S+) before, (\S+) after", said)[0]
    assert float(after) < float(before)


def test_the_stored_outputs_were_made_by_these_cells_with_these_weights(ran: Any) -> None:
    stored = read()
    assert stored.metadata[DIGEST] == digest(stored), "run again: python tests/tools/run_notebook.py"
    for cell, fresh in zip(code_cells(stored), code_cells(ran), strict=True):
        assert (cell.execution_count, kinds(cell)) == (fresh.execution_count, kinds(fresh)), cell.source
    assert sum("image/png" in kind for cell in code_cells(stored) for kind in kinds(cell)) >= 5


def test_its_links_lead_somewhere_and_its_numbers_are_those_of_equations() -> None:
    words = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    for _, target in LINK.findall(words):
        if not target.startswith("https://"):
            path, _, anchor = file_of(NOTEBOOK, target), *target.partition("#")[1:]
            assert path.exists() and (not anchor or anchor in anchors(path)), target
    named = set(re.findall(r"\b[LOMTCS]\d+\b", words))
    assert named and named <= {row.equation for row in table()}
