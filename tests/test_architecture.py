"""The house keeps its order: a floor imports only from floors above it, and some rooms do not know each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minilora

ROOT = Path(minilora.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

FLOORS = [  # from the top; `commands` are all other files beside these, each a command line or its helper
    "backend",
    "ops",
    "frozen",
    "lora",
    "model",
    "methods",
    "formats",
    "text",
    "training",
    "commands",
]
ROOMS_OF_A_FLOOR = {
    "nf4": "frozen",
    "mixed_precision": "frozen",
    "side_by_side": "backend",
}  # files that share a floor with another
STRANGERS = {  # a room → those it does not know, although they are above it
    "model": {"lora"},  # the model is written once, for any method
    "text": {"lora", "model", "methods"},
}
PEER = Path("benchmarks/peft_side.py")  # the one file that runs PyTorch, in a process of its own
FOREIGN = {"torch", "jax", "tensorflow", "transformers", "peft", "mlx", "pickle", "dill", "joblib"}


def floor(module: str) -> str:
    """`model/block.py` and `minilora.model.block` are of the floor `model`; `train.py` is of the floor `commands`."""
    room = module.replace("/", ".").removeprefix("minilora.").removesuffix(".py").split(".")[0]
    room = ROOMS_OF_A_FLOOR.get(room, room)
    return room if room in FLOORS else "commands"


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which room it is from"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> Iterator[str]:
    return (name for name in imports(path) if name.startswith("minilora."))


each_file = pytest.mark.parametrize("path", FILES, ids=str)


@each_file
def test_a_floor_imports_only_from_floors_above_it(path: Path) -> None:
    here = floor(path.as_posix())
    wrong = [name for name in own_imports(path) if FLOORS.index(floor(name)) > FLOORS.index(here)]
    assert wrong == [], f"{path} is of the floor {here!r}, above what it imports"


@each_file
def test_the_model_knows_no_method_and_text_knows_no_model(path: Path) -> None:
    here = floor(path.as_posix())
    assert [name for name in own_imports(path) if floor(name) in STRANGERS.get(here, set())] == []


@each_file
def test_no_framework_and_no_pickle_is_imported(path: Path) -> None:
    allowed = {"torch", "transformers", "peft"} if path == PEER else set()
    assert (FOREIGN - allowed).isdisjoint(name.split(".")[0] for name in imports(path))


@each_file
def test_the_peer_of_the_benchmark_stays_in_its_own_process(path: Path) -> None:
    """Nothing imports it; and it imports nothing of minilora that computes or tunes the process."""
    assert [name for name in own_imports(path) if name.startswith("minilora.benchmarks.peft_side")] == []
    if path == PEER:
        rooms = {name.split(".")[2] for name in own_imports(path) if name.startswith("minilora.benchmarks.")}
        assert rooms == {"job", "worker"} and all(name.startswith("minilora.benchmarks.") for name in own_imports(path))
        for room in rooms:
            assert {name.split(".")[1] for name in own_imports(Path(f"benchmarks/{room}.py"))} <= {"benchmarks"}


@each_file
def test_only_the_backend_names_cupy_in_its_code(path: Path) -> None:
    if path.as_posix() != "backend.py":
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "cupy" not in names | {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "ops"], ids=str)
def test_operations_do_not_know_each_other(path: Path) -> None:
    assert [name for name in own_imports(path) if floor(name) == "ops"] == []


def test_every_forward_of_an_operation_has_its_backward_in_the_same_file() -> None:
    for path in (ROOT / "ops").glob("*.py"):
        if path.stem != "__init__":
            functions = {
                node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)
            }
            assert {path.stem, f"{path.stem}_backward"} <= functions
