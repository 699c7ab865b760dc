"""The package as it is installed: what an import loads, and the files that go along."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "minilora"


def loaded_by(statement: str) -> set[str]:
    """The modules of minilora that a statement loads, in a process of its own."""
    program = f"import sys; {statement}; print(*(name for name in sys.modules if name.startswith('minilora')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_lora_loads_nothing_but_what_lora_stands_on() -> None:
    assert loaded_by("import minilora") == {"minilora"}
    rooms = {".".join(name.split(".")[:2]) for name in loaded_by("import minilora.lora")}
    assert rooms <= {"minilora", "minilora.backend", "minilora.ops", "minilora.frozen", "minilora.lora"}


def test_the_front_door_loads_no_command_and_nothing_that_trains() -> None:
    names = loaded_by("from minilora import load, load_adapter, complete")
    assert "minilora.runs.front_door" in names
    assert not any(name.startswith(("minilora.training", "minilora.cli", "minilora.train")) for name in names)


def test_every_file_beside_the_code_is_installed_with_it() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split(",")
        for path in ROOT.joinpath(*package.split(".")).glob(pattern.strip())
    }
    beside = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert beside == installed
