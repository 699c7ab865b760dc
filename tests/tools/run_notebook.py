"""Run docs/notebook.ipynb from top to bottom, and keep what it shows: python tests/tools/run_notebook.py

To be done after a change of its cells, of tinysmol or of its task; test_notebook.py notices if it was forgotten. It
takes a minute or two, and `pip install -e '.[notebook]'`.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import nbformat
from matplotlib.font_manager import get_font_names
from nbclient import NotebookClient

from minilora.tasks.nl2sql.rows import nl2sql_rows

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
WEIGHTS = ROOT / "weights" / "tinysmol" / "model.safetensors"
DIGEST = "outputs_of"  # in the notebook's metadata: what its outputs were made from


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: Any) -> str:
    """A checksum of what decides the outputs: the cells' code, the rows of the task, and tinysmol's weights."""
    texts = [cell.source for cell in code_cells(notebook)], nl2sql_rows("train", 100), nl2sql_rows("test", 100)
    return f"{zlib.crc32(WEIGHTS.read_bytes(), zlib.crc32(json.dumps(texts).encode())):08x}"


def executed(parameters: str = "") -> Any:
    """The notebook, run in a process of its own; with `parameters`, these instead of its cell of that name."""
    notebook = read()
    for cell in notebook.cells:
        if parameters and "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(notebook, timeout=None, resources=where, record_timing=False, coalesce_streams=True)
    get_font_names()  # makes the list of fonts, else the notebook might be told that this takes a moment
    client.execute(env=environment)
    notebook.metadata.language_info = {"name": "python"}  # without this machine's version of it
    notebook.metadata[DIGEST] = digest(notebook)
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
