"""Hold the laws against the implementations of others, and write docs/specification-of-others.md.

python tests/tools/specification_of_others.py [NAME …] [--python NAME=PATH …]

Each implementation whose packages are there is run, in a process of its own; PATH is the Python of another
environment, for packages that cannot be installed side by side. What is not run keeps its place in results.json, and
the page is made from all of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.kit import IMPLEMENTATIONS  # noqa: E402
from support.law_report import BROKEN, DIFFERS, HELD, NOT_OFFERED, escaped  # noqa: E402

from minilora.figures.tables import write_markdown  # noqa: E402

PAGE = ROOT / "docs" / "specification-of-others.md"
RESULTS = IMPLEMENTATIONS / "results.json"
SIGNS = {HELD: "✓", DIFFERS: "≠", BROKEN: "✗", NOT_OFFERED: "–"}


class Other(NamedTuple):
    title: str
    packages: tuple[str, ...]  # as pip knows them; none if NumPy is enough


OTHERS = {
    "minilora_itself": Other("minilora", ()),
    "peft_lora": Other("PEFT", ("peft", "torch", "transformers")),
    "transformers_llama": Other("transformers", ("transformers", "torch", "peft")),
    "bitsandbytes_nf4": Other("bitsandbytes", ("bitsandbytes", "torch")),
    "loralib_lora": Other("loralib", ("loralib", "torch")),
    "torchtune_lora": Other("torchtune", ("torchtune", "torchao", "torch")),
    "litgpt_lora": Other("LitGPT", ("litgpt", "torch")),
    "labml_lora": Other("labml.ai", ("labml-nn", "torch")),
    "mlx_lora": Other("mlx-lm", ("mlx-lm", "mlx")),
    "materialised": Other("W + s B A formed", ()),
    "transposed": Other("transposed", ()),
    "sequential": Other("A first, then B", ()),
}
ASK = "import json, sys, platform; from importlib.metadata import version as v; "
ASK += "print(json.dumps({'Python': platform.python_version()} | {n: v(n) for n in sys.argv[1:]}))"


# --- Runs ---


def versions(python: str, packages: tuple[str, ...]) -> dict[str, str] | None:
    """Of Python and the packages, or None if one is missing."""
    asked = subprocess.run(
        [python, "-c", ASK, "numpy", *packages], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return json.loads(asked.stdout) if asked.returncode == 0 else None


def held_against(name: str, python: str, *flags: str) -> dict[str, dict[str, list[str]]]:
    """By chapter and law, in the order of reading: the outcome, and what was seen if the law does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        command = [python, "-m", "pytest", "tests/specification", "-p", "no:cacheprovider", "-W", "ignore", *flags]
        command += ["--implementation", str(IMPLEMENTATIONS / f"{name}.py"), "--specification-report", str(report)]
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        if not report.with_suffix(".json").exists():
            raise RuntimeError(f"{name}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
        laws = json.loads(report.with_suffix(".json").read_text("utf-8"))["laws"]
    found: dict[str, dict[str, list[str]]] = {}
    for law in laws:
        seen = "; with ".join(filter(None, (law["detail"], law["counterexample"])))
        outcome = [law["status"], seen] if law["status"] in (DIFFERS, BROKEN) else [law["status"]]
        found.setdefault(law["chapter"], {})[law["law"]] = outcome
    return found


def outcomes(run: dict[str, Any]) -> dict[str, list[str]]:
    """By law, of all chapters."""
    return {law: outcome for laws in run["laws"].values() for law, outcome in laws.items()}


# --- The page ---


def results() -> dict[str, Any]:
    """By implementation: when it was run, with which packages, and what the laws said."""
    found: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return {name: found[name] for name in OTHERS if name in found}


def page_part(found: dict[str, Any]) -> str:
    return (
        "\n\n".join(["\n".join(what_was_run(found)), "\n".join(table(found)), "\n".join(what_was_seen(found))]) + "\n"
    )


def what_was_run(found: dict[str, Any]) -> Iterator[str]:
    yield "| | run with | on | held | differs | broken | not offered |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for name, run in found.items():
        packages = ", ".join(f"{package} {number}" for package, number in run["versions"].items())
        counts = [sum(outcome[0] == status for outcome in outcomes(run).values()) for status in SIGNS]
        numbers = " | ".join(map(str, counts))
        yield f"| {link(name)} | {packages} | {run['date']} | {numbers} |"


def link(name: str) -> str:
    return f"[{OTHERS[name].title}](../tests/specification/implementations/{name}.py)"


def table(found: dict[str, Any]) -> Iterator[str]:
    """A row for each law; its variants share it where every implementation does the same with all of them."""
    runs = [outcomes(run) for run in found.values()]
    yield f"| | {' | '.join(OTHERS[name].title for name in found)} |"
    yield f"|---|{':---:|' * len(found)}"
    for chapter, laws in next(iter(found.values()))["laws"].items():
        yield f"| **{escaped(chapter)}** |{' |' * len(found)}"
        for statement, variants in groupby(laws, key=lambda law: law.partition(" (")[0]):
            rows = {law: [SIGNS[run[law][0]] if law in run else "" for run in runs] for law in variants}
            first, *others = rows.values()
            if all(row == first for row in others):
                rows = {statement: first}
            yield from (f"| {escaped(law)} | {' | '.join(row)} |" for law, row in rows.items())


def what_was_seen(found: dict[str, Any]) -> Iterator[str]:
    yield "| of | law | | the smallest counterexample |\n|---|---|:---:|---|"
    for name, run in found.items():
        for law, (status, *seen) in outcomes(run).items():
            if seen:
                yield f"| {OTHERS[name].title} | {escaped(law)} | {SIGNS[status]} | {escaped(seen[0])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of implementations to run (default: all)")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    asked = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in asked.python)
    if unknown := ({*asked.names, *pythons} - {*OTHERS}):
        parser.error(f"no implementations: {', '.join(sorted(unknown))}; there are {', '.join(OTHERS)}")
    found = results()
    for name in asked.names or OTHERS:
        python = pythons.get(name, sys.executable)
        if (packages := versions(python, OTHERS[name].packages)) is None:
            print(f"{name}: not run, for want of {' or '.join(OTHERS[name].packages)}")
            continue
        found[name] = {"date": str(datetime.date.today()), "versions": packages, "laws": held_against(name, python)}
        RESULTS.write_text(json.dumps(found, ensure_ascii=False, indent=0) + "\n", "utf-8")
        print(f"{name}: run")
    write_markdown(PAGE, page_part(results()))


if __name__ == "__main__":
    main()
