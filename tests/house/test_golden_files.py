"""The files of tests/golden/ stay few and small, are what their page says, and are read with NumPy alone."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from golden.read_golden import header_and_arrays, read_json
from safetensors.numpy import load_file
from support.golden import CASES, GOLDEN, LAWS, MODELS, has_twin, tensor_files
from tools import golden_json

READER = GOLDEN / "read_golden.py"
PAGE = (GOLDEN / "README.md").read_text(encoding="utf-8")

each_file = pytest.mark.parametrize("path", tensor_files(), ids=lambda path: str(path.relative_to(GOLDEN)))
each_twin = pytest.mark.parametrize("path", [*filter(has_twin, tensor_files())], ids=lambda path: path.stem)
Entry = tuple[tuple[int, ...], str]  # shape and dtype


def entries(path: Path) -> dict[str, Entry]:
    header, _ = header_and_arrays(path)
    return {name: (tuple(e["shape"]), e["dtype"]) for name, e in header.items() if name != "__metadata__"}


def test_the_golden_files_stay_small_and_each_folder_is_a_case() -> None:
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(sizes) < 750_000
    assert {path.name for path in MODELS.iterdir()} == set(CASES)


# --- The page ---


class Section(NamedTuple):
    """A section of the page about some laws: their names, the sizes, and the rows of its table."""

    laws: list[str]
    sizes: dict[str, int]
    rows: list[tuple[str, str, str, str]]


def sections() -> Iterator[Section]:
    for text in re.split(r"^##+ .*$", PAGE, flags=re.M):
        if about := re.search(r"^Files? (`.*`): (.*)\.$", text, flags=re.M):
            sizes = {name: int(size) for name, size in re.findall(r"(\w+) = (\d+)", about[2])}
            rows = re.findall(r"^\| `(\S+)` \| \((.*)\) \| (\w+) \| (.*?) ?\|$", text, flags=re.M)
            yield Section(re.findall(r"`(\w+)`", about[1]), sizes, rows)


def described() -> dict[str, dict[str, Entry]]:
    """What the page says is in the file of each law."""
    laws: dict[str, dict[str, Entry]] = {}
    for section in sections():
        for law in section.laws:
            laws[law] = {}
            for name, shape, dtype, words in section.rows:
                only = re.match(r"only in ((?:`\w+`(?:, )?)+)", words)
                if only is None or law in re.findall(r"`(\w+)`", only[1]):
                    axes = [axis for axis in shape.split(", ") if axis]
                    laws[law][name] = tuple(section.sizes[a] if a in section.sizes else int(a) for a in axes), dtype
    return laws


def test_the_page_names_every_law_and_every_tensor_with_its_shape_and_dtype() -> None:
    assert described() == {path.stem: entries(path) for path in LAWS.glob("*.safetensors")}


@pytest.mark.parametrize("case", CASES)
def test_a_models_gradients_and_trained_arrays_are_those_of_its_weights_or_of_its_adapter(case: str) -> None:
    """And its other tensors are what the page says."""
    folder = MODELS / case
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert entries(folder / "batch.safetensors") == dict.fromkeys(
        ("tokens", "labels", "positions", "segments"), ((3, 9), "I64")
    )
    adapter = entries(folder / "adapter" / "adapter_model.safetensors")
    trains = {
        "full": entries(folder / "weights.safetensors"),
        "lora": {name.removeprefix("base_model.model."): entry for name, entry in adapter.items()},
    }
    for kind, parameters in trains.items():
        expected: dict[str, Entry] = {"logits": ((3, 9, config["vocab_size"]), "F64")}
        expected |= {"loss": ((), "F64"), "losses": ((5,), "F64")}
        for name, (shape, dtype) in parameters.items():
            assert dtype == "F32"
            expected |= {f"{part}.{name}": (shape, "F64") for part in ("gradient", "trained")}
        assert entries(folder / f"{kind}.safetensors") == expected


# --- Reading ---


@each_file
def test_the_reader_in_40_lines_reads_what_the_package_of_safetensors_reads(path: Path) -> None:
    _, arrays = header_and_arrays(path)
    theirs = load_file(path)
    assert arrays.keys() == theirs.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, theirs[name], strict=True)


@each_twin
def test_a_twin_in_json_holds_the_same_numbers_to_the_last_bit(path: Path) -> None:
    arrays, theirs = read_json(path.with_suffix(".json")), load_file(path)
    assert arrays.keys() == theirs.keys()
    for name, array in arrays.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            theirs[name].dtype, theirs[name].shape, theirs[name].tobytes()
        ), name  # fmt: skip


@each_twin
def test_a_twin_in_json_is_what_its_tool_writes(path: Path) -> None:
    assert path.with_suffix(".json").read_text(encoding="utf-8") == golden_json.twin(path)


def test_the_reader_has_at_most_40_lines_and_needs_only_numpy() -> None:
    text = READER.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "json", "numpy", "pathlib", "typing"}


def run_reader(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)


def test_the_reader_as_a_script_recomputes_lora_and_fails_where_a_number_is_wrong(tmp_path: Path) -> None:
    done = run_reader(READER)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"lora_linear: s, y, merged, dx, dA, dB within \d\.\de-1[4-7]\n", done.stdout)

    (tmp_path / "laws").mkdir()
    (tmp_path / READER.name).write_bytes(READER.read_bytes())
    raw = bytearray((LAWS / "lora_linear.safetensors").read_bytes())
    first, _ = header_and_arrays(LAWS / "lora_linear.safetensors")[0]["dA"]["data_offsets"]
    raw[8 + int.from_bytes(raw[:8], "little") + first + 6] ^= 1  # an upper digit of the first number
    (tmp_path / "laws" / "lora_linear.safetensors").write_bytes(raw)
    assert run_reader(tmp_path / READER.name).returncode == 1
