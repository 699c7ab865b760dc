"""Compare the quality and the cost of every method on the same model, data and budget.

Each method is tried with three learning rates, and with more while the best is the lowest or the highest; the best is
run with the other seeds. Each trial is a run of `python -m minilora.train` in a process of its own. A comparison that
was cut off goes on where it stopped when the same command is given again. Under mpirun or srun the ranks run trials
at once, all but the first, which hands them out. Flags that are not listed here go to every
trial: --max-length, --target-modules, --activation-checkpointing and so on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minilora.cli import errors, train_flags
from minilora.cli.flags import ours
from minilora.cli.parser import Listed, Parser, comma_list
from minilora.cli.train_flags import choose_settings
from minilora.compare import figures
from minilora.compare.at_once import Competition, run_at_once, workers
from minilora.compare.claims import Claim, ClaimsByModel, as_page, claims
from minilora.compare.inputs import write_rows
from minilora.compare.latency import latency
from minilora.compare.plots import plot_comparison
from minilora.compare.report import comparison_tables
from minilora.compare.rivals import FULL, LORA, RIVALS, choose, lora_of_rank
from minilora.compare.spectrum import spectra
from minilora.compare.trained import python_perplexity, trained_model
from minilora.compare.trials import Field, expected_trials, flags_for
from minilora.data.tokenizer import Tokenizer
from minilora.figures.machine import facts, usable_cores
from minilora.figures.tables import as_markdown, as_text, check_markdown_file, machine_line, write_markdown
from minilora.formats.files import read_json, write_json, write_text
from minilora.formats.hub import find_model
from minilora.formats.load import SHIPPED_MODEL, load_model
from minilora.runs.folder import is_free, only_run
from minilora.runs.settings import read_settings
from minilora.training.ranks import alone

RESULTS_FILE, BUDGET_FILE = "comparison.json", "budget.json"
CLAIMS_PAGE, CLAIMS_FILE = "claims.md", "claims.json"


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of `compare`, and the other flags, which go to every trial."""
    parser = Parser(
        prog="python -m minilora.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {rival.name:12}{rival.what}" for rival in RIVALS),
    )
    names = [rival.name for rival in RIVALS]
    listed: dict[str, Any] = {"nargs": "+", "action": Listed}
    methods = "the methods to compare (default: all)"
    parser.add_argument("--methods", **listed, type=comma_list(str), default=names, metavar="NAME", help=methods)
    ranks = "compare LoRA at these ranks, too"
    parser.add_argument("--ranks", **listed, type=comma_list(int), default=[], metavar="R", help=ranks)
    parser.add_argument(
        "--cipher", action="store_true", help="compare full and LoRA on the enciphered task, too: a large shift"
    )
    parser.add_argument(
        "--model", default=str(SHIPPED_MODEL), help="the base, a folder or a hub id (default: tinysmol)"
    )
    parser.add_argument("--data", default="", help="the file or folder of data (default: the built-in SQL task)")
    parser.add_argument(
        "--steps", type=int, default=40, metavar="N", help="optimiser steps of each trial (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows in a step (%(default)s)")
    parser.add_argument("--eval-rows", type=int, default=100, metavar="N", help="held-out rows to answer (%(default)s)")
    seeds = "seeds, with one run each (0 1)"
    parser.add_argument("--seeds", **listed, type=comma_list(int), default=[0, 1], metavar="N", help=seeds)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="the folder of trials and results (%(default)s)"
    )
    parser.add_argument(
        "--docs", type=Path, metavar="FOLDER", help="write the results into the pages of this folder, too"
    )
    parser.add_argument(
        "--page", default="comparison.md", help="the page of --docs that gets the tables and pictures (%(default)s)"
    )
    args, shared = parser.read_known(argv)
    given = train_flags.parse(shared, also=parser.flags)  # an unknown one is told here, before anything is written
    if any(ours().get(name, name) == "method" for name in vars(given)):
        raise ValueError("--method would do nothing here: the methods to compare are chosen by --methods")
    return args, shared


def check_comparison(args: argparse.Namespace, shared: list[str]) -> None:
    """Raise ValueError, naming the flag, if a value makes no sense to `compare` or to `train`."""
    choose_settings(train_flags.parse(shared))
    for rival in choose(args.methods):
        if rival.rates:
            choose_settings(train_flags.parse([*flags_for(rival, shared), *rival.flags]))
    if args.steps < 1 or args.batch_size < 1 or args.eval_rows < 0:
        raise ValueError("--steps and --batch-size must be at least 1, --eval-rows at least 0")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {args.seeds}: give different numbers, none below 0")
    if min(args.ranks, default=1) < 1:
        raise ValueError(f"--ranks {args.ranks}: a rank is at least 1")
    if args.cipher and args.data:
        raise ValueError("--cipher enciphers the built-in task: leave out --data")
    if args.docs:
        for page in (args.page, CLAIMS_PAGE):
            check_markdown_file(args.docs / page)


class Comparison:
    """The trials of one call. All must have the same budget; methods and seeds may be added in later calls."""

    def __init__(self, args: argparse.Namespace, shared: Sequence[str]) -> None:
        self.args = args
        self.flags = list(shared)
        self.rivals = choose(args.methods)
        if args.data and not Path(args.data).is_dir():  # evaluate cannot tell its held-out rows from the others
            print("few-shot left out: it needs --data to be a folder with train and test files")
            self.rivals = [rival for rival in self.rivals if rival.rates]
        self.ranks = [lora_of_rank(rank, LORA.rates) for rank in sorted({*args.ranks})]
        self.cipher = [FULL, LORA, lora_of_rank(64, LORA.rates)] if args.cipher else []
        budget = {name: getattr(args, name) for name in ("model", "data", "steps", "batch_size", "eval_rows")}
        budget["flags"] = self.flags
        path = args.out / BUDGET_FILE
        if path.exists() and read_json(path) != budget:
            raise ValueError(f"{args.out} holds a comparison with another budget, see {path}: choose another --out")
        if not path.exists() and not is_free(args.out):
            raise ValueError(f"--out {args.out} holds files that are not a comparison's: choose a new or empty folder")
        write_json(path, budget)

    def steps(self) -> int:
        """The number of steps of all trials, without the trials that a search may add."""
        seeds = self.args.seeds
        count = expected_trials(self.rivals, seeds) + expected_trials(self.cipher, seeds[:1])
        count += expected_trials(self.ranks, seeds)
        return count * int(self.args.steps)

    def run(self, executor: Executor | None = None) -> dict[str, Any]:
        """Run the trials that are not done yet, and gather the figures of all. An `executor` runs them at once."""
        args = self.args
        data = args.data or str(write_rows(args.out / "data", args.steps * args.batch_size))
        if executor:
            with self.bar() as bar:
                run_at_once(executor, self.competitions(data, bar), bar)
        with self.bar(disable=executor is not None) as bar:
            competitions = self.competitions(data, bar)
            found = [
                figures.result(rival, seeds, f.compete(rival, seeds), f.folder) for f, rival, seeds in competitions
            ]
        methods, ranks = len(self.rivals), len(self.ranks)
        return {"methods": found[:methods], "ranks": found[methods:][:ranks], "cipher": found[methods + ranks :]}

    def bar(self, disable: bool = False) -> tqdm[Any]:
        return tqdm(total=self.steps(), desc="comparing", unit="step", dynamic_ncols=True, disable=disable)

    def competitions(self, data: str, bar: tqdm[Any]) -> list[Competition]:
        """The methods, LoRA at other ranks, and those of the enciphered task."""
        args = self.args
        field = self.field(args.out, data, bar)
        competitions = [Competition(field, rival, args.seeds) for rival in (*self.rivals, *self.ranks)]
        if self.cipher:
            folder = args.out / "cipher"
            rows = write_rows(folder / "data", args.steps * args.batch_size, cipher=True)
            enciphered = self.field(folder, str(rows), bar)
            competitions += [Competition(enciphered, rival, args.seeds[:1]) for rival in self.cipher]
        return competitions

    def field(self, out: Path, data: str, bar: tqdm[Any]) -> Field:
        args = self.args
        common = ["--model", args.model, "--data", data, "--eval-rows", str(args.eval_rows)]
        often = str(max(1, args.steps // 2))
        shared = [*common, "--steps", str(args.steps), "--batch-size", str(args.batch_size), "--weight-decay", "0"]
        shared += ["--eval-every", often, "--save-every", often, *self.flags]
        return Field(out, shared, common, args.steps, bar)


def compare_command(argv: list[str] | None = None) -> None:
    """Parse, check, and compare. Of several ranks, the first does all but the trials."""
    args, shared = parse(argv)
    check_comparison(args, shared)
    with alone() as ranks, workers(ranks) as executor:
        if ranks.is_first:
            with only_run(args.out):
                compare(args, Comparison(args, shared), executor)


def compare(args: argparse.Namespace, comparison: Comparison, executor: Executor | None) -> None:
    """Run, measure, write, print."""
    machine = facts(usable_cores())
    print(machine_line(machine))
    results = comparison.run(executor)
    results |= after_training(results)
    write_json(args.out / RESULTS_FILE, {"machine": machine, "budget": read_json(args.out / BUDGET_FILE), **results})
    tables = comparison_tables(results)
    write_text(args.out / "comparison.md", as_markdown(tables, machine, []))
    for table in tables:
        print(f"\n{as_text(table)}")
    pictures = plot_comparison(results, args.out)
    judged = {Path(args.model).stem: claims(results)}
    write_text(args.out / CLAIMS_PAGE, as_page(judged))
    if args.docs:
        write_tables(args.docs / args.page, results, machine, pictures)
        write_claims(args.docs, judged)
    print(f"\n{args.out}: {', '.join(sorted(path.name for path in args.out.glob('*.*')))}")


def after_training(results: dict[str, Any]) -> dict[str, Any]:
    """Measure the trained models: latency, what was forgotten, and the spectra of full fine-tuning's and LoRA's ΔW.

    A process inherits the peak memory of the one that starts it, so this process measures only after all trials.
    """
    good = {result["method"]: result for result in results["methods"] if result["seeds"]}
    of_folders = [result for result in (*good.values(), *results["ranks"]) if result["seeds"] and "rates" in result]
    if of_folders:
        settings = read_settings(Path(of_folders[0]["folder"]))
        for result in tqdm(good.values(), desc="answering", unit="method", dynamic_ncols=True, leave=False):
            result["latency"] = latency(result, settings)
        source = find_model(settings.model, settings.revision).folder
        tokenizer = Tokenizer.load(source)
        before = python_perplexity(load_model(source)[0], tokenizer)
        for result in tqdm(of_folders, desc="perplexity of Python", unit="method", dynamic_ncols=True, leave=False):
            _, trained = trained_model(source, Path(result["folder"]))
            after = python_perplexity(trained, tokenizer)
            result |= {"base_python_perplexity": before, "python_perplexity": after}
    comparable = {"full", "lora"} <= good.keys()
    spectrum = spectra(Path(good["full"]["folder"]), Path(good["lora"]["folder"])) if comparable else {}
    return {"spectrum": spectrum}


def write_tables(page: Path, results: dict[str, Any], machine: dict[str, Any], pictures: Sequence[Path]) -> None:
    """Write tables and pictures into a page such as docs/comparison.md."""
    shown = []
    for picture in pictures:
        place = page.parent / "images" / f"{page.stem}-{picture.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture.read_bytes())
        shown.append(f"![{picture.stem}](images/{place.name})")
    tables = as_markdown(comparison_tables(results), machine, []).rstrip()
    write_markdown(page, "\n\n".join([tables, *shown]) + "\n")


def write_claims(docs: Path, judged: ClaimsByModel) -> None:
    """Write this model's column of docs/claims.md. The other models' are kept: claims.json holds all."""
    path = docs / CLAIMS_FILE
    known = read_json(path) if path.exists() else {}
    by_model = {model: [Claim(*claim) for claim in judged] for model, judged in known.items()} | judged
    write_json(path, by_model)
    write_markdown(docs / CLAIMS_PAGE, as_page(by_model))


def main(argv: list[str] | None = None) -> int:
    return errors.run_on_ranks(compare_command, argv)


if __name__ == "__main__":
    sys.exit(main())
