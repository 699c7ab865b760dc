"""How strong are the tests? Change the mathematics in every small way, and see whether a test notices.

    pip install -e ".[test,mutation]"
    python tests/tools/mutation.py                        every file that setup.cfg names: minutes
    python tests/tools/mutation.py minilora/lora.py …     these files only

mutmut makes the mutants in `mutants/`, which git ignores, and runs the tests of setup.cfg on each, with the few
examples of Hypothesis' profile "mutation". A mutant that no test notices has to be explained in docs/mutation.md, as a
diff of its line under the name of its function. Writes a row of that page's table for each file, with a hash of what
the file was, and fails if a survivor is not explained.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mutation.md"
CAUGHT, ESCAPED = ("killed", "timeout"), ("survived", "no tests")


class Mutation(NamedTuple):
    function: str  # "minilora.lora.lora"
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"@@ {self.function} @@", *(f"- {a}" for a in self.before), *(f"+ {a}" for a in self.after)]
        return "\n".join(lines)


def mutation(function: str, diff: list[str]) -> Mutation:
    """From the lines of a diff."""
    changed = [tuple(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+"]
    return Mutation(function, changed[0], changed[1])


def explained() -> set[Mutation]:
    """The mutations that the page says change nothing: `@@ function @@`, and the line before and after."""
    found = set()
    for block in re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S):
        for function, diff in re.findall(r"^@@ (\S+) @@\n((?:[-+].*\n)+)", block, flags=re.M):
            lines = diff.splitlines()
            starts = [i for i, line in enumerate(lines) if line[0] == "-" and lines[i - 1][0] == "+"]
            pairs = [lines[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]
            found |= {mutation(function, pair) for pair in pairs}
    return found


def mutmut(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mutmut", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mutmut {' '.join(arguments)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def shown(name: str) -> Mutation:
    """A mutant by mutmut's name for it: `minilora.frozen.weight.xǁDenseWeightǁforward__mutmut_1`."""
    module, _, mangled = name.rpartition("__mutmut_")[0].rpartition(".")
    function = mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    diff = [line for line in mutmut("show", name).splitlines() if not line.startswith(("---", "+++"))]
    return mutation(f"{module}.{function}", diff)


class Row(NamedTuple):
    """What became of the mutants of a file, and of which file: the first digits of its SHA-256."""

    mutants: int
    killed: int
    survived: int
    explained: int
    made_from: str


COLUMNS = ("mutants", "killed", "survived", "explained")
HEAD = "| file | mutants | killed | survived | explained | made from |\n|---|---|---|---|---|---|\n"
ROW = re.compile(r"^\| \[[^\]]*\]\(\.\./(\S+\.py)\)[^|]*" + r"\| *([\d,]+) *" * 4 + r"\| *`(\w+)` *\|\n", flags=re.M)
TABLE = re.compile(r"^\| file \| mutants .*\n(?:\|.*\n)+", flags=re.M)


def mutated_files() -> list[str]:
    """The files that setup.cfg names: those whose mathematics is changed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    paths = {path for pattern in setup["mutmut"]["only_mutate"].split() for path in ROOT.glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if "def " in path.read_text(encoding="utf-8"))


def digest(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12]


def rows() -> dict[str, Row]:
    """The page's table by file."""
    found = ROW.findall(PAGE.read_text(encoding="utf-8"))
    return {file: row([int(n.replace(",", "")) for n in numbers], made_from) for file, *numbers, made_from in found}


def row(counts: list[int], made_from: str) -> Row:
    mutants, killed, survived, explained = counts
    return Row(mutants, killed, survived, explained, made_from)


def stale() -> list[str]:
    """The files that have no row, or have changed since it was made."""
    known = rows()
    return [file for file in mutated_files() if file not in known or known[file].made_from != digest(file)]


def write(new: dict[str, Row]) -> None:
    """The page with these rows; those of files that are not mutated any more are dropped."""
    files = mutated_files()
    table = {file: row for file, row in sorted((rows() | new).items()) if file in files}
    lines = [
        f"| [{file.removeprefix('minilora/')}](../{file}) | {' | '.join(f'{n:,}' for n in counts)} | `{made_from}` |"
        for file, (*counts, made_from) in table.items()
    ]
    total = [f"{sum(getattr(row, column) for row in table.values()):,}" for column in COLUMNS]
    lines.append(f"| **all** | {' | '.join(total)} | |")
    text = HEAD + "\n".join(lines) + "\n"
    PAGE.write_text(TABLE.sub(lambda _: text, PAGE.read_text(encoding="utf-8"), count=1), encoding="utf-8")


def main(files: list[str]) -> int:
    files = files or mutated_files()
    made_from = {file: digest(file) for file in files}
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    modules = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files]
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mutmut("run", "--max-children", str(processes), *(f"{module}.x*" for module in modules))
    known = explained()
    counts = {module: Counter[str]() for module in modules}
    unexplained = []
    for name, status in re.findall(r"^\s*(\S+): (.*)$", mutmut("results", "--all", "true"), flags=re.M):
        if status == "not checked":
            continue
        count = counts[name.rpartition(".")[0]]
        count["mutants"] += 1
        if status in CAUGHT:
            count["killed"] += 1
            continue
        escaped = shown(name)
        count["survived"] += 1
        if status in ESCAPED and escaped in known:
            count["explained"] += 1
        else:
            unexplained.append(f"{escaped}\n({status}: {name})")
    new = {
        file: row([counts[module][column] for column in COLUMNS], made_from[file])
        for file, module in zip(files, modules, strict=True)
    }
    for file, found in new.items():
        print(f"{file}: {', '.join(f'{getattr(found, column)} {column}' for column in COLUMNS)}")
    write({file: found for file, found in new.items() if found.survived == found.explained})
    if unexplained:
        print(f"\n{len(unexplained)} survivors without an explanation in {PAGE.relative_to(ROOT)}:\n")
        print("\n\n".join(unexplained))
    return bool(unexplained) or not any(found.mutants for found in new.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
