"""Merge an adapter into its base model: a complete Hugging Face folder that costs no more than the base to run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora import cli
from minilora.flags import add_model_flags, dashed, flags
from minilora.formats.checkpoint import DTYPES, read_config, read_weights, write_checkpoint
from minilora.formats.files import write_json
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.peft import read_adapter
from minilora.lora import merge
from minilora.methods.targets import target_module_names
from minilora.text.tokenizer import save_tokenizer_files

REPORT_FILE = "merge.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minilora.merge", description=__doc__)
    add_model_flags(parser)
    parser.add_argument(
        *flags("adapter"), required=True, metavar="ADAPTER", help="folder of the LoRA adapter, or its id on the hub"
    )
    parser.add_argument(*flags("out"), type=Path, required=True, metavar="FOLDER", help="to write, new or empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the written weights (%(default)s); the smaller two round, and how much of the update is lost is told",
    )
    return parser.parse_args(dashed(argv))


class Rounding:
    """How much of the updates ΔW does not survive rounding W + ΔW to a smaller dtype."""

    def __init__(self) -> None:
        self.weights = self.unchanged = 0
        self.lost = self.whole = 0.0  # Σ squares of what is lost of ΔW, and of ΔW

    def add(self, W: np.ndarray[Any, Any], merged: np.ndarray[Any, Any], written: np.ndarray[Any, Any]) -> None:
        """W before, W + ΔW in float32, and the same as it is written."""
        self.weights += W.size
        self.unchanged += int((written == W).sum())
        self.lost += float(((merged - written.astype(np.float32)) ** 2).sum(dtype=np.float64))
        self.whole += float(((merged - W) ** 2).sum(dtype=np.float64))

    def report(self, dtype: str) -> dict[str, Any]:
        return {
            "dtype": dtype,
            "adapted_weights": self.weights,
            "unchanged_share": self.unchanged / self.weights,
            "lost_share_of_update": (self.lost / self.whole) ** 0.5 if self.whole else 0.0,
        }


def merge_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not cli.is_free(args.out):
        raise ValueError(f"--out {args.out} exists and is not an empty folder: choose another")
    folder = find_model(args.model, args.revision).folder
    config, raw_config = read_config(folder)
    weights = read_weights(folder, config)
    settings, adapter, *_ = read_adapter(find_adapter(args.adapter).folder, config)
    rounding = Rounding()
    for module in tqdm(target_module_names(config, settings.target_modules), desc="merging", unit="matrix"):
        A, B = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
        name = f"{module}.weight"
        merged = merge(weights[name].astype(np.float32), A, B, settings.scale)
        written = merged.W.astype(DTYPES[args.dtype])
        rounding.add(merged.original, merged.W, written)
        weights[name] = written
    write_checkpoint(args.out, raw_config, weights, args.dtype)
    save_tokenizer_files(folder, args.out)
    report = rounding.report(args.dtype)
    write_json(args.out / REPORT_FILE, report)
    print(
        f"{args.out}: {report['adapted_weights']:,} weights adapted, written as {args.dtype}; rounding left "
        f"{report['unchanged_share']:.1%} of them unchanged and lost {report['lost_share_of_update']:.2%} of the update"
    )
    if report["lost_share_of_update"] > 0.1:
        print(
            "much of what was learnt is lost: write --dtype float32, or keep the adapter beside the base",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    return cli.run(merge_command, argv)


if __name__ == "__main__":
    sys.exit(main())
