"""How strong are the tests? Change the mathematics in every small way, and see whether a test notices.

    pip install -e ".[test,mutation]"
    python tests/tools/mutation.py                        every file that setup.cfg names: minutes
    python tests/tools/mutation.py minilora/lora.py …     these files only

mutmut makes the mutants in `mutants/`, which git ignores, and runs the tests of setup.cfg on each, with the few
examples of Hypothesis' profile "mutation". A mutant that no test notices has to be explained in docs/mutation.md, as a
diff of its line under the name of its function. Prints a table, and fails if a survivor is not explained.
"""

from __future__ import annotations

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


def main(files: list[str]) -> int:
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    modules = [file.removesuffix(".py").replace("/", ".") for file in files]
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mutmut("run", "--max-children", str(processes), *(f"{module}.x*" for module in modules))
    known = explained()
    counts: dict[str, Counter[str]] = {}
    unexplained = []
    for name, status in re.findall(r"^\s*(\S+): (.*)$", mutmut("results", "--all", "true"), flags=re.M):
        if status == "not checked":
            continue
        count = counts.setdefault(name.rpartition(".")[0], Counter())
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
    columns = ("mutants", "killed", "survived", "explained")
    print(f"| file | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for module in sorted(counts):
        print(f"| {module.replace('.', '/')}.py | {' | '.join(str(counts[module][c]) for c in columns)} |")
    print(f"| **all** | {' | '.join(str(sum(count[c] for count in counts.values())) for c in columns)} |")
    if unexplained:
        print(f"\n{len(unexplained)} survivors without an explanation in {PAGE.relative_to(ROOT)}:\n")
        print("\n\n".join(unexplained))
    return bool(unexplained) or not counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
