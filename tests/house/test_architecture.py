"""The house keeps its order: a room imports only from rooms before it, and commands do not know each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import minilora
from minilora.methods.method import known_methods

ROOT = Path(minilora.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

ROOMS = (  # from the ground: a room imports only from itself and from rooms before it
    *("backend", "ops", "frozen", "lora", "keys", "model", "methods", "adapters", "formats", "figures"),
    *("data", "tasks", "training", "counting", "runs", "pages", "cli"),
)
COMMANDS = {  # the rooms above all others, which do not know each other
    *("train", "generate", "chat", "serve", "evaluate", "merge", "combine", "convert", "random_checkpoint", "report"),
    *("plan", "benchmark", "compare", "pretrain", "rows", "book"),
}
STRANGERS = {  # a room → rooms before it that it does not know all the same
    "model": {"lora"},  # the model is written once, for any method
    "figures": {"lora", "model", "methods", "adapters"},
    "data": {"lora", "model", "methods", "adapters"},
    "tasks": {*ROOMS} - {"tasks"},  # the standard library only
}
PEER = Path("benchmark/peft_side.py")  # the one file that runs PyTorch, in a process of its own
FOREIGN = {"torch", "jax", "tensorflow", "transformers", "peft", "mlx", "pickle", "dill", "joblib"}


def room(module: str) -> str:
    """`model/block.py` and `minilora.model.block` are in the room `model`."""
    return module.replace("/", ".").removeprefix("minilora.").removesuffix(".py").split(".")[0]


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


def test_every_file_is_in_a_room_with_a_place_in_the_order() -> None:
    assert {room(path.as_posix()) for path in FILES} <= {*ROOMS, *COMMANDS, "__init__", "__main__"}


@each_file
def test_a_room_imports_only_from_rooms_before_it_and_no_command_imports_another(path: Path) -> None:
    here = room(path.as_posix())
    before = {*ROOMS[: ROOMS.index(here)]} if here in ROOMS else {*ROOMS}
    known = (before | {here}) - STRANGERS.get(here, set())
    assert [name for name in own_imports(path) if room(name) not in known] == []


@each_file
def test_no_framework_and_no_pickle_is_imported(path: Path) -> None:
    allowed = {"torch", "transformers", "peft"} if path == PEER else set()
    assert (FOREIGN - allowed).isdisjoint(name.split(".")[0] for name in imports(path))


@each_file
def test_the_peer_of_the_benchmark_stays_in_its_own_process(path: Path) -> None:
    """Nothing imports it; and it imports nothing of minilora that computes or tunes the process."""
    assert [name for name in own_imports(path) if name.startswith("minilora.benchmark.peft_side")] == []
    if path == PEER:
        rooms = {name.split(".")[2] for name in own_imports(path) if name.startswith("minilora.benchmark.")}
        assert rooms == {"job", "worker"} and all(name.startswith("minilora.benchmark.") for name in own_imports(path))
        for room in rooms:
            assert {name.split(".")[1] for name in own_imports(Path(f"benchmark/{room}.py"))} <= {"benchmark"}


@each_file
def test_only_the_backend_names_cupy_in_its_code(path: Path) -> None:
    if path.as_posix() != "backend.py":
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "cupy" not in names | {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "ops"], ids=str)
def test_operations_do_not_know_each_other(path: Path) -> None:
    assert [name for name in own_imports(path) if room(name) == "ops"] == []


def test_every_forward_of_an_operation_has_its_backward_in_the_same_file() -> None:
    for path in (ROOT / "ops").glob("*.py"):
        if path.stem != "__init__":
            functions = {
                node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)
            }
            assert {path.stem, f"{path.stem}_backward"} <= functions


def test_every_method_is_found_and_says_all_that_is_to_be_known_of_it() -> None:
    for name, method in known_methods().items():
        assert name in method.names
        assert method.freezes_base == bool(method.peft_type), "what freezes the base leaves an adapter"
        assert {"shapes", "start", "attach"} <= {part for cls in method.__mro__[:-2] for part in vars(cls)}


OUTSIDE = [path for path in FILES if room(path.as_posix()) != "methods"]


@pytest.mark.parametrize("path", OUTSIDE, ids=str)
def test_no_file_outside_methods_asks_which_method_it_has_or_lists_methods(path: Path) -> None:
    classes, names = {method.__name__ for method in known_methods().values()}, {*known_methods()} - {"prompt", "random"}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            assert asked.isdisjoint(classes), f"line {node.lineno} asks for {asked & classes}"
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            entries = node.keys if isinstance(node, ast.Dict) else node.elts
            listed = {entry.value for entry in entries if isinstance(entry, ast.Constant)} & names
            assert len(listed) < 3, f"line {node.lineno} lists {listed}"


# --- The file tree of the README ---

LISTED = ("ops", "frozen", "model", "methods", "adapters", "training")  # file by file


def tree() -> list[str]:
    """The paths in the README's list. Each line has a name, with / for a folder, and a clause about it."""
    text = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- begin of files -->\n\n```\n(.*?)```\n\n<!-- end of files -->", text, flags=re.S)
    paths, folder = [], ""
    for line in block.splitlines():
        match = re.fullmatch(r"( *)(\w+)(/?) +\S.*", line)
        assert match, line
        indent, name, slash = match.groups()
        folder = folder if indent else f"{name}/"
        paths.append((folder if indent else "") + name + ("" if slash else ".py"))
    return paths


def entries(folder: Path) -> set[str]:
    """The Python files and the folders of Python files in a folder."""
    files = {path for path in folder.glob("*.py") if path.stem != "__init__"}
    folders = {path.parent for path in folder.glob("*/__init__.py")}
    return {path.relative_to(ROOT).as_posix() for path in files | folders}


def test_the_file_tree_of_the_readme_names_what_is_there_and_nothing_else() -> None:
    there = entries(ROOT).union(*(entries(ROOT / room) for room in LISTED))
    assert sorted(tree()) == sorted(there)


def test_folders_stand_in_the_order_in_which_they_may_import_each_other() -> None:
    rooms = [path.removesuffix(".py") for path in tree() if "/" not in path]
    assert rooms[: len(ROOMS)] == list(ROOMS)
