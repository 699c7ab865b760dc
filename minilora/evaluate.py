"""Measure a model, and perhaps an adapter, on held-out rows: loss, perplexity, exact match, drift from the base."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.backend import use
from minilora.cli import errors
from minilora.cli.base import find_base
from minilora.cli.flags import add_model_flags, flags
from minilora.cli.parser import Parser
from minilora.data.batches import ExampleRows, batches_of
from minilora.data.conversations import TRAIN_ON
from minilora.data.datasets import FLAGS, Features, load_dataset, read_rows
from minilora.data.examples import Row, encode_rows
from minilora.data.few_shot import few_shot_rows, first_answer
from minilora.data.report import report
from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import load_adapter
from minilora.formats.hub import find_adapter
from minilora.formats.load import load_model
from minilora.runs.evaluation import answers, can_be_matched, drift, exact_match, outside_text
from minilora.runs.run import default_max_length
from minilora.runs.task import BUILT_IN_ROWS
from minilora.tasks.nl2sql.rows import nl2sql_rows
from minilora.training.ranks import world
from minilora.training.step import mean_loss


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.evaluate", description=__doc__)
    add_model_flags(parser)
    adapter = "the folder of an adapter, or its id on the hub; the drift is from the model without it"
    parser.add_argument(*flags("adapter"), metavar="ADAPTER", help=adapter)
    data = "the rows to measure on: a file, or a folder's test part, else its valid part"
    parser.add_argument(*flags("data"), type=Path, metavar="PATH", help=data)
    parser.add_argument(*flags("batch_size"), metavar="N", type=int, default=8, help="rows in a batch (%(default)s)")
    for name, feature in FLAGS.items():
        parser.add_argument(feature, dest=name, metavar="KEY", help=f"the key that the rows have instead of {name}")
    parser.add_argument(
        "--train-on", choices=TRAIN_ON, default=TRAIN_ON[0], help="the part of prompts and answers that counts"
    )
    shots = "show up to K training rows with their answers before each prompt; nothing trains (%(default)s)"
    parser.add_argument("--few-shot", metavar="K", type=int, default=0, help=shots)
    parser.add_argument("--seed", type=int, default=0, help="the seed of the draw of these rows (%(default)s)")
    length = "the most tokens in a row; 0: as for training (%(default)s)"
    parser.add_argument(*flags("max_length"), metavar="N", type=int, default=0, help=length)
    parser.add_argument("--eval-rows", type=int, default=200, help="rows to answer for the exact match (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser.read(argv)


def held_out_rows(data: Path | None, features: Features) -> Sequence[Row]:
    """The rows to measure on. Without --data they are the test part of the built-in task."""
    if data is None:
        return list(nl2sql_rows("test", BUILT_IN_ROWS["test"]))
    if not data.is_dir():
        return read_rows(data, features)
    parts = load_dataset(data, seed=0, features=features)
    if not (parts.test or parts.valid):
        raise ValueError(f"--data {data} has neither a test nor a valid file: name the file to measure on")
    return parts.test or parts.valid


def training_rows(data: Path | None, features: Features) -> Sequence[Row]:
    """The rows to show before each prompt."""
    if data is None:
        return list(nl2sql_rows("train", BUILT_IN_ROWS["train"]))
    if not data.is_dir():
        raise ValueError(f"--few-shot shows training rows: give --data a folder with train and test files, not {data}")
    return load_dataset(data, seed=0, features=features).train


def evaluate_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.batch_size < 1 or min(args.eval_rows, args.max_length, args.few_shot, args.seed) < 0:
        raise ValueError("--batch-size must be at least 1; --eval-rows, --max-length, --few-shot and --seed at least 0")
    use(args.device, world().place)
    adapters = {args.adapter: find_adapter(args.adapter).folder} if args.adapter else {}
    folder = find_base(args.model, args.revision, adapters).folder
    base, _ = load_model(folder)
    model = load_adapter(base, adapters[args.adapter]) if args.adapter else base
    tokenizer = Tokenizer.load(folder).fitting(base.config.vocab_size)
    features = {name: key for name in FLAGS if (key := getattr(args, name))}
    rows = held_out_rows(args.data, features)
    max_length = args.max_length or default_max_length(model)
    if args.few_shot:
        shown = training_rows(args.data, features)
        rows, shots = few_shot_rows(rows, shown, args.few_shot, tokenizer, max_length, args.seed)
    encoded = encode_rows(rows, tokenizer, max_length, args.train_on)
    batches = batches_of(ExampleRows(encoded.examples), args.batch_size, tokenizer.pad_id)

    loss = mean_loss(model, batches)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: the numbers of {args.adapter or folder} are finite, but too large")
    figures: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    answered = encoded.kept(rows)[: args.eval_rows]
    if can_be_matched(answered):
        completions = answers(model, tokenizer, answered)
        if args.few_shot:
            pairs = zip(completions, answered, strict=True)
            completions = [first_answer(answer, row["completion"]) for answer, row in pairs]
        figures["exact_match"] = exact_match(completions, answered)
    if args.adapter:
        figures["drift_kl"] = drift(base, model, outside_text(tokenizer))
    if args.few_shot:
        figures["shots"] = shots
    figures["examples"] = len(encoded.examples)
    figures["left_out"] = len(encoded.too_long) + len(encoded.unlabelled)
    if args.json:
        print(json.dumps(figures, allow_nan=False))
        return
    print(report(encoded, max_length, str(args.data or "built-in task")))
    for name, value in figures.items():
        print(f"{name:12} {value:,}" if isinstance(value, int) else f"{name:12} {value:.4f}")


def main(argv: list[str] | None = None) -> int:
    return errors.run_on_ranks(evaluate_command, argv)


if __name__ == "__main__":
    sys.exit(main())
