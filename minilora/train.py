"""Fine-tune a Llama-style model with LoRA.

Without arguments, the shipped model learns to turn English questions into SQL, and the command shows its answers
before and after. With --data it learns your own rows: {"text"}, {"prompt", "completion"} or {"messages"}, one JSON
object a line; or a .txt file; or a folder with train, valid and test files of these kinds.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
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
from minilora.runs.findings import FINDINGS_FILE, findings
from minilora.runs.folder import SUMMARY_FILE, is_free, only_run
from minilora.runs.plots import plot_loss
from minilora.runs.run import Judgement, Run, judge, prepare, summarize, train_run
from minilora.runs.state_file import load_state, save_state
from minilora.training.loop import next_batches


def train_command(argv: list[str] | None = None) -> None:
    """Parse, prepare, train, and say how to go on if that is cut off."""
    started = time.perf_counter()
    args = parse(argv, __doc__)
    settings, folder, resumed = choose_settings(args)
    device = use(settings.device)
    run = prepare(settings, folder)
    if "show_batch" in args:
        if resumed:
            load_state(run.state, folder)
        batch = next_batches(run.state, run.task.rows, run.plan, run.tokenizer.pad_id)[0]
        print(*run.task.report, *show_batch(batch, run.tokenizer, color=sys.stdout.isatty()), sep="\n")
        return
    with only_run(folder):
        begin(run, resumed)
        describe(run, device)
        try:
            train_and_judge(run, started)
        except KeyboardInterrupt as error:
            saved = f"after step {run.state.step}, which is saved" if error.args else "at once"
            with suppress(OSError):  # the terminal may be gone
                print(f"\nstopped {saved}; go on with: python -m minilora.train --resume {folder}")
            raise
        except Exception as error:
            if errors.is_out_of_memory(error):
                raise RuntimeError(out_of_memory(run.settings, run.task.figures["train"]["longest"])) from error
            raise


def begin(run: Run, resumed: bool) -> None:
    """Read the state of a resumed run, or save that of a new one."""
    if resumed:
        for remark in load_state(run.state, run.folder):
            print(f"remark: {remark}", file=sys.stderr)
    elif not is_free(run.folder):
        raise ValueError(f"--out {run.folder}: another process has begun a run there: choose another folder")
    else:
        save_state(run.state, run.folder)  # saved first, because a folder with settings can be resumed
        run.settings.save(run.folder)


def train_and_judge(run: Run, started: float) -> None:
    """Judge, train, judge again, write the summary and the page, and print what came out."""
    folder = run.folder
    print("before training …", flush=True)
    before = judge(run, run.base)
    train_run(run)
    print("after training …", flush=True)
    after = judge(run, run.adapted)
    plot = plot_loss(folder, before.loss, after.loss)
    summary = summarize(run, before, after, started)
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
    print(f"{settings.model} on {device}: {config.num_hidden_layers} layers of width {config.hidden_size}")
    print(f"{run.method.name} on {task}")
    for line in run.task.report:
        print(f"  {line}")
    done = f", {run.state.step} of them done" if run.state.step else ""
    print(f"  {run.plan.steps} steps of {settings.batch_size * settings.grad_accumulation} rows{done}")


def print_examples(rows: list[Row], before: Judgement, after: Judgement, count: int = 3) -> None:
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
    print(f"\ntrained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters ({share:.1%})")
    print(
        f"{summary['steps']} steps at {summary['tokens_per_second']:,.0f} tokens/s; {summary['seconds']:.0f} s in all, "
        f"{summary['training_seconds']:.0f} s in training; peak memory {summary['peak_memory_bytes'] / 1e6:,.0f} MB"
    )


def main(argv: list[str] | None = None) -> int:
    return errors.run(train_command, argv)


if __name__ == "__main__":
    sys.exit(main())
