"""Write the golden files again as JSON, for languages without a reader of safetensors.

    python tests/tools/golden_json.py

Beside X.safetensors stands X.json with the same names, in the form of a header of safetensors, but with the numbers
themselves in the place of their offsets: {"x": {"dtype": "F64", "shape": [5, 6], "data": [0.25, …]}}, row after row.
Every number has as many digits as float64 needs to be read back exactly. Only golden/laws and one whole model have
twins: all of them would be three times as large.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden.read_golden import header_and_arrays
from support.golden import has_twin, tensor_files

from minilora.formats.files import write_text


def twin(path: Path) -> str:
    """The text of the JSON file beside a file of tensors, one tensor a line."""
    header, arrays = header_and_arrays(path)
    entries = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    for name, array in arrays.items():
        entries[name] = {key: header[name][key] for key in ("dtype", "shape")} | {"data": array.ravel().tolist()}
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}\n"


if __name__ == "__main__":
    for path in filter(has_twin, tensor_files()):
        write_text(path.with_suffix(".json"), twin(path))
