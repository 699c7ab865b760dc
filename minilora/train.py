"""Fine-tune a Llama-style model with LoRA.

Without arguments, the shipped model learns to turn English questions into SQL, and the command shows its answers
before and after. With --data it learns your own rows: {"text"}, {"prompt", "completion"} or {"messages"}, one JSON
object a line; or a .txt file; or a folder with train, valid and test files of these kinds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

from minilora.backend import use
from minilora.cli import errors
from minilora.cli.train_flags import choose_settings, parse
from minilora.data.examples import Row
from minilora.data.prompts import last_words, question
from minilora.data.show import show_batch
from minilora.formats.files import write_json
from minilora.pages.page import write_page
from minilora.runs.advice import out_of_memory
from minilora.runs.evaluation import LENGTH, TEXTS
from minilora.runs.findings import FINDINGS_FILE, findings
from minilora.runs.folder import SUMMARY_FILE, is_free, only_run
from minilora.runs.plots import plot_loss
from minilora.runs.run import Judgement, Run, check_ranks, judge, prepare, summarize, train_run
from minilora.runs.settings import SETTINGS_FILE, Settings
from minilora.runs.state_file import load_state, save_state
from minilora.runs.stopping import Stopped
from minilora.training.loop import next_batches
from minilora.training.ranks import alone, world


def train_command(argv: list[str] | None = None) -> None:
    """Parse, prepare, train, and say how to go on if that is cut off."""
    started = time.perf_counter()
    args = parse(argv, __doc__)
    settings, folder, resumed = choose_settings(args)
    ranks = world()
    folder = ranks.gather(folder)[0]
    device = use(settings.device, ranks.place)
    try:
        run = prepare(settings, folder)
    except (ValueError, FileNotFoundError) as error:
        if not resumed:
            raise
        raise ValueError(f"{error} ({folder / SETTINGS_FILE} has it so)") from error
    if "show_batch" in args:
        if resumed:
            load_state(run.state, folder)
        batch = next_batches(run.state, run.task.rows, run.plan, run.tokenizer.pad_id)[0]
        print(*run.task.report, *show_batch(batch, run.tokenizer, color=sys.stdout.isatty()), sep="\n")
        return
    check_ranks(run, device)  # before anything is written
    with only_run(folder) if ranks.is_first else nullcontext():
        try:
            begin(run, resumed)
            describe(run, device)
            train_and_judge(run, started)
        except (KeyboardInterrupt, Stopped) as error:
            if (folder / SETTINGS_FILE).exists():  # else it has not begun, and the same command begins it
                tell_how_to_go_on(run, after_a_step=isinstance(error, KeyboardInterrupt) and bool(error.args))
            raise
        except Exception as error:
            if errors.is_out_of_memory(error):
                raise RuntimeError(out_of_memory(run.settings, run.task.figures["train"]["longest"])) from error
            raise


def tell_how_to_go_on(run: Run, after_a_step: bool) -> None:
    saved = f"after step {run.state.step}, which is saved" if after_a_step else "at once"
    with suppress(OSError):  # the terminal may be gone
        print(f"\nstopped {saved}; go on with: python -m minilora.train --resume {run.folder}")


def begin(run: Run, resumed: bool) -> None:
    """Read the state of a resumed run, or let rank 0 save that of a new one."""
    if resumed:
        for remark in load_state(run.state, run.folder):
            print(f"remark: {remark}", file=sys.stderr)
    elif not world().is_first:
        return
    elif not is_free(run.folder):
        raise ValueError(f"--out {run.folder}: another process has begun a run there: choose another folder")
    else:
        save_state(run.state, run.folder)  # saved first, because a folder with settings can be resumed
        run.settings.save(run.folder)


def train_and_judge(run: Run, started: float) -> None:
    """Judge, train, judge again, and report."""
    print("before training …", flush=True)
    before = judge(run, run.base)
    train_run(run)
    print("after training …", flush=True)
    after = judge(run, run.adapted)
    of_ranks = world().figures()
    with alone() as ranks:
        if ranks.is_first:
            report(run, before, after, started, of_ranks)


def report(run: Run, before: Judgement, after: Judgement, started: float, of_ranks: dict[str, Any]) -> None:
    """Write the summary and the page, and print what came out: the work of one process."""
    folder = run.folder
    plot = plot_loss(folder, before.loss, after.loss)
    summary = summarize(run, before, after, started) | of_ranks
    write_json(folder / SUMMARY_FILE, {name: finite_or_null(value) for name, value in summary.items()})
    report_started = time.perf_counter()
    write_json(folder / FINDINGS_FILE, findings(run, before, after))
    page = write_page(folder)
    report_seconds = time.perf_counter() - report_started
    print_examples(run.task.held_out_rows, before, after)
    print_summary(summary)
    for advice in summary["advice"]:
        print(f"\n{advice}")
    print(f"\n{folder}: adapter, {SUMMARY_FILE}, metrics.jsonl, {plot.name}")
    print(f"all of it to look at: {page} (made in {report_seconds:.1f} s)")


def finite_or_null(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(run: Run, device: str) -> None:
    """Print the model, the method, the data and the number of steps."""
    settings, config = run.settings, run.base.config
    task = settings.data or "the built-in task, English questions to SQL"
    ranks = world().size
    place = f"{device}, {ranks} ranks of {run.state.cores} threads" if ranks > 1 else device
    print(f"{settings.model} on {place}: {config.num_hidden_layers} layers of width {config.hidden_size}")
    print(f"{run.method.name} on {task}")
    for line in run.task.report:
        print(f"  {line}")
    done = f", {run.state.step} of them done" if run.state.step else ""
    print(f"  {run.plan.steps} steps of {settings.batch_size * settings.grad_accumulation} rows{done}")
    if settings.grad_accumulation < ranks:
        print(too_few_micro_batches(settings, ranks), file=sys.stderr)


def too_few_micro_batches(settings: Settings, ranks: int) -> str:
    """The remark that some ranks will have nothing to do, with the flags that give each a micro-batch of its own."""
    count, rows = settings.grad_accumulation, settings.batch_size * settings.grad_accumulation
    more = next((k for k in range(ranks, rows) if rows % k == 0), rows)
    return (
        f"remark: a step has {count} micro-batch{'es' if count > 1 else ''} for {ranks} ranks, and some have nothing "
        f"to do. The same step of {rows} rows in more parts: --batch-size {rows // more} --grad-accumulation {more}"
    )


def print_examples(rows: Sequence[Row], before: Judgement, after: Judgement, count: int = 3) -> None:
    """Print a few held-out rows: the prompt, the right answer, and the answers before and after training."""
    for i in range(0, len(after.answers), max(1, len(after.answers) // count))[:count]:
        asked, right = question(rows[i]) or ({"prompt": ""}, "")  # rows that were answered ask something
        print(f"\n{last_words(asked)}")
        for name, answer in (
            ("right", right),
            ("before", before.answers[i]),
            ("after", after.answers[i]),
        ):
            print(f"  {name:>6}: {_one_line(answer)}")


def _one_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def print_summary(summary: dict[str, Any]) -> None:
    """Print the figures before and after training, and their cost."""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    print(f"\n{'':24}{'before':>10}{'after':>10}")
    print(f"{'held-out loss':24}{summary['base_loss']:>10.3f}{summary['adapted_loss']:>10.3f}   nats per token")
    if summary["adapted_exact_match"] is not None:
        print(f"{'exact match':24}{summary['base_exact_match']:>10.1%}{summary['adapted_exact_match']:>10.1%}")
    print(f"{'drift KL(base ‖ adapted)':24}{0:>10.3f}{summary['drift_kl']:>10.3f}   nats per token of other text")
    if summary["tokens"] < TEXTS * LENGTH:
        print(f"(the drift is of {summary['drift_tokens']:,} tokens of it: training read {summary['tokens']:,} only)")
    print(f"\ntrained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters ({share:.1%})")
    print(
        f"{summary['steps']} steps at {summary['tokens_per_second']:,.0f} tokens/s; {summary['seconds']:.0f} s in all, "
        f"{summary['training_seconds']:.0f} s in training; peak memory {summary['peak_memory_bytes'] / 1e6:,.0f} MB"
    )


def main(argv: list[str] | None = None) -> int:
    return errors.run_on_ranks(train_command, argv)


if __name__ == "__main__":
    sys.exit(main())
