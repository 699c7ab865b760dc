"""Measure the server: tokens per second of several rows together and one by one, beside llama.cpp's server.

Every row continues a prompt of its own by a fixed number of greedy tokens. Rows are mixed, each with another adapter or
none, or all of one adapter. llama.cpp gets the same GGUF file, or the model written as one, and the same adapters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from minilora.cli import errors
from minilora.cli.answering import add_loading_flags
from minilora.cli.base import find_base
from minilora.cli.flags import flags
from minilora.cli.parser import Parser
from minilora.figures.machine import facts, usable_cores
from minilora.figures.tables import (
    Table,
    as_markdown,
    as_text,
    check_markdown_file,
    machine_line,
    write_markdown,
)
from minilora.formats.files import write_json
from minilora.formats.gguf_file import is_gguf
from minilora.formats.library import BASE, named_adapters

PROMPTS = (
    "Two soups and three cardamom buns, please.", "The capital of France is", "Once upon a time there was a fox who",
    "How many boats are longer than ten metres?", "A list of fruit: apple, pear,", "The weather today is",
    "Dear Sir or Madam, I am writing to", "To boil an egg, first",
)  # fmt: skip
LENGTH = 256  # tokens of a slot beside those of the answer
Body = dict[str, Any]
Bodies = Callable[[Sequence[str]], list[Body]]  # a request for each row, whose adapter it is given


class Outcome(NamedTuple):
    """Tokens per second, the median of all repeats, and how many rows got the same answer in both ways."""

    side: str
    rows: str
    one_by_one: float
    together: float
    same: int
    of: int


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.serve.measure", description=__doc__)
    add_loading_flags(parser)
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows together (%(default)s)")
    parser.add_argument(
        *flags("max_tokens"), type=int, default=64, metavar="N", help="tokens of each answer (%(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="how often, for the median (%(default)s)")
    parser.add_argument(*flags("out"), type=Path, metavar="FILE", help="write the figures to a JSON file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to a page, as docs/serve.md")
    return parser.read(argv)


@contextlib.contextmanager
def address_of(command: list[str]) -> Iterator[str]:
    """The address that a server prints in its first line; it is ended with the context."""
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        found = re.search(r"http://[^/\s]+", line)
        if not found:
            raise RuntimeError(f"the server did not start: {' '.join(command[:4])} …")
        yield found[0]
    finally:
        server.terminate()
        server.wait()


def ask(address: str, body: Body) -> tuple[str, int]:
    """The answer, and the number of its tokens."""
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def measured(side: str, rows: str, address: str, bodies: list[Body], repeat: int) -> Outcome:
    """Ask for all bodies, one after the other and at once."""

    def speed(at_once: int) -> tuple[float, list[str]]:
        start = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(lambda body: ask(address, body), bodies))
        return sum(tokens for _, tokens in answers) / (time.perf_counter() - start), [text for text, _ in answers]

    ask(address, bodies[0])  # to warm up
    alone, together = (zip(*(speed(n) for _ in range(repeat)), strict=True) for n in (1, len(bodies)))
    (speeds_alone, texts_alone), (speeds, texts) = alone, together
    same = sum(a == b for a, b in zip(texts_alone[0], texts[0], strict=True))
    return Outcome(side, rows, median(speeds_alone), median(speeds), same, len(bodies))


def write_gguf(args: argparse.Namespace, adapters: dict[str, Path], folder: Path) -> tuple[Path, list[Path]]:
    """The base and the adapters as GGUF files; a base that is one stays where it is."""
    source = find_base(args.model, args.revision, adapters).folder

    def converted(out: Path, *given: object) -> Path:
        convert = [sys.executable, "-m", "minilora.convert", *map(str, given), "--format", "gguf", "--out", str(out)]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        return out

    base = source if is_gguf(source) else converted(folder / "base.gguf", "--model", source)
    written = [
        converted(folder / f"{name}.gguf", "--adapter", path, "--model", source) for name, path in adapters.items()
    ]
    return base, written


def measure_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.markdown:
        check_markdown_file(args.markdown)
    adapters = named_adapters(args.adapter)
    names = [BASE, *adapters]
    mixed = [names[i % len(names)] for i in range(args.rows)]
    chosen = {"mixed": mixed} | ({"one adapter": [names[1]] * args.rows} if adapters else {"base": [BASE] * args.rows})
    common = {"max_tokens": args.max_tokens, "temperature": 0, "ignore_eos": True}
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(args.rows)]

    def ours(of_rows: Sequence[str]) -> list[Body]:
        return [common | {"model": name, "prompt": prompt} for name, prompt in zip(of_rows, prompts, strict=True)]

    def theirs(of_rows: Sequence[str]) -> list[Body]:
        loras = [[{"id": i, "scale": float(name == each)} for i, each in enumerate(adapters)] for name in of_rows]
        pairs = zip(loras, prompts, strict=True)
        return [common | {"lora": lora, "prompt": prompt, "cache_prompt": False} for lora, prompt in pairs]

    given = [word for name in ("model", "revision", "device", "frozen") if getattr(args, name)
             for word in (f"--{name}", getattr(args, name))]  # fmt: skip
    given += [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    serve = [sys.executable, "-m", "minilora.serve", "--port", "0", "--max-batch", str(args.rows), *given]
    outcomes: list[Outcome] = []

    def measure(side: str, command: list[str], bodies: Bodies) -> None:
        with address_of(command) as address:
            for rows, of_rows in chosen.items():
                outcomes.append(measured(side, rows, address, bodies(of_rows), args.repeat))

    measure("minilora", [*serve, "--max-tokens", str(args.max_tokens)], ours)
    notes = []
    if find_spec("xllamacpp"):
        with tempfile.TemporaryDirectory() as folder:
            base, files = write_gguf(args, adapters, Path(folder))
            job = {"model": str(base), "adapters": [*map(str, files)], "rows": args.rows}
            job |= {"length": args.max_tokens + LENGTH, "threads": usable_cores()}
            command = [sys.executable, "-m", "minilora.serve.llama_cpp_side", json.dumps(job)]
            measure("llama.cpp", command, theirs)
    else:
        notes.append("llama.cpp left out: xllamacpp is not installed (pip install -e '.[peers]')")
    machine = facts(usable_cores())
    table = as_table(outcomes, args, notes)
    print(as_text(table), machine_line(machine), sep="\n")
    if args.markdown:
        write_markdown(args.markdown, as_markdown([table], machine, []))
    if args.out:
        write_json(args.out, {"machine": machine, "outcomes": [outcome._asdict() for outcome in outcomes]})


def as_table(outcomes: Sequence[Outcome], args: argparse.Namespace, notes: list[str]) -> Table:
    rows = [
        [f"{o.side}, {o.rows}", f"{o.one_by_one:.1f}", f"{o.together:.1f}", f"{o.together / o.one_by_one:.2f}×",
         f"{o.same} of {o.of}"]
        for o in outcomes
    ]  # fmt: skip
    title = f"{args.rows} rows of {args.max_tokens} tokens, in tokens/s"
    return Table(title, ["", "one by one", "together", "", "same answers"], rows, notes)


def main(argv: list[str] | None = None) -> int:
    return errors.run(measure_command, argv)


if __name__ == "__main__":
    sys.exit(main())
