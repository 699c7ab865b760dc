"""Merge an adapter into its base model: a complete model that costs no more than the base to run.

It is a Hugging Face folder, or a GGUF file for llama.cpp and Ollama.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.adapters.merging import merged_parameters
from minilora.backend import Array, HostArray, to_host, use
from minilora.cli import errors
from minilora.cli.base import find_base
from minilora.cli.flags import add_model_flags, flags
from minilora.cli.parser import Parser
from minilora.data.tokenizer import Tokenizer, save_tokenizer_files, tokenizer_files_to_copy
from minilora.formats.adapters import load_adapter
from minilora.formats.checkpoint import DTYPES, as_dtype, read_config, read_weights, write_checkpoint
from minilora.formats.files import write_json
from minilora.formats.gguf_tokenizer import tokenizer_fields
from minilora.formats.gguf_write import GGUF_DTYPES, Q8_0, check_free, rounded, write_gguf
from minilora.formats.hub import find_adapter
from minilora.formats.whole import building, check_new
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD
from minilora.runs.evaluation import differences, outside_text

MERGE_FILE = "merge.json"
MUCH = 0.1  # of the adapter's effect: more than this is not lost in silence
GGUF, FOLDER = "gguf", "huggingface"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.merge", description=__doc__)
    add_model_flags(parser)
    parser.add_argument(
        *flags("adapter"), required=True, metavar="ADAPTER", help="folder of the adapter, or its id on the hub"
    )
    parser.add_argument(
        *flags("out"), type=Path, required=True, metavar="PATH", help="a folder, new or empty; FILE.gguf"
    )
    parser.add_argument("--format", choices=(FOLDER, GGUF), default=FOLDER, help="to write (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=GGUF_DTYPES,
        default="float32",
        help="of the written weights (%(default)s); the smaller ones round, and how much of the update is lost is "
        f"told; {Q8_0} goes with --format {GGUF}",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="write embedding and head as two matrices, where the base has one for both and the adapter changes one",
    )
    parser.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="gigabytes in a file at most (%(default)s)"
    )
    return parser.read(argv)


class Rounding:
    """How much of an update ΔW does not survive rounding W + ΔW to a smaller dtype."""

    def __init__(self) -> None:
        self.weights = self.unchanged = 0
        self.lost = self.whole = 0.0  # Σ squares of what is lost of ΔW, and of ΔW

    def add(self, W: Array, merged: Array, written: np.ndarray[Any, Any]) -> None:
        """W before, W + ΔW in float32, and the same as it is written."""
        W, merged = to_host(W), to_host(merged)
        self.weights += W.size
        self.unchanged += int((written == W).sum())
        self.lost += float(((merged - written.astype(np.float32)) ** 2).sum(dtype=np.float64))
        self.whole += float(((merged - W) ** 2).sum(dtype=np.float64))

    def report(self) -> dict[str, Any]:
        return {
            "adapted_weights": self.weights,
            "unchanged_share": self.unchanged / self.weights,
            "lost_share_of_update": (self.lost / self.whole) ** 0.5 if self.whole else 0.0,
        }


def merge_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.format == GGUF:
        check_free(args.out, whole_model=True)
    elif args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} goes with --format {GGUF}")
    else:
        check_new(args.out)
    if not args.max_shard_size > 0:
        raise ValueError(f"--max-shard-size {args.max_shard_size} is not a size")
    use("cpu")
    adapter = find_adapter(args.adapter).folder
    source = find_base(args.model, args.revision, {args.adapter: adapter}).folder
    config, raw_config = read_config(source)
    weights = dict(read_weights(source, config))
    base = base_model(config, weights, frozen="stored")
    adapted = load_adapter(base, adapter)
    tokenizer_files_to_copy(source)  # first: a link out of the folder is an error
    if adapted.config.tie_word_embeddings != config.tie_word_embeddings:
        if not args.untie:
            raise ValueError(
                f"{args.adapter} changes the embedding or the head, which in this base are one matrix: merging would "
                "change both. With --untie they are written as two"
            )
        weights[f"{HEAD}.weight"] = weights[f"{EMBED}.weight"]
    raw_merged = merged_config(raw_config, config, adapted.config)

    def as_written(name: str, tensor: HostArray) -> HostArray:
        return rounded(name, tensor, args.dtype) if args.format == GGUF else as_dtype(name, tensor, DTYPES[args.dtype])

    rounding, written = Rounding(), {name: as_written(name, weight) for name, weight in weights.items()}
    for name, merged in tqdm(merged_parameters(base, adapted), desc="merging", unit="tensor"):
        written[name] = as_written(name, to_host(merged))
        before = weights.get(name)  # a bias that BitFit has added was not there
        rounding.add(np.zeros(merged.shape) if before is None else before.astype(np.float32), merged, written[name])
    tokenizer = Tokenizer.load(source).fitting(config.vocab_size)
    texts = outside_text(tokenizer)
    plain = base_model(adapted.config, written, frozen="stored")
    (of_rounding, of_adapter), largest = differences(adapted, [plain, base], texts)
    if not math.isfinite(of_rounding.logit):
        raise ValueError(f"{args.adapter} on {source}: the logits of sample text are no numbers, they overflow")
    report = {
        "dtype": args.dtype,
        **rounding.report(),
        "largest_logit_difference": of_rounding.logit,
        "largest_logit": largest,
        "rounding_kl": of_rounding.kl,
        "adapter_kl": of_adapter.kl,
    }
    if args.format == GGUF:
        fields, kind = tokenizer_fields(tokenizer, config.vocab_size), raw_config.get("model_type", "llama")
        write_gguf(args.out, kind, adapted.config, written, args.dtype, fields, tokenizer.stop_texts)
    else:
        with building(args.out) as out:
            write_checkpoint(out, raw_merged, written, args.dtype, int(args.max_shard_size * 1e9))
            save_tokenizer_files(source, out)
            write_json(out / MERGE_FILE, report)
    tell(report, args.out)


def merged_config(raw: dict[str, Any], before: Config, after: Config) -> dict[str, Any]:
    """The base's config.json with what the adapter has changed. ValueError if its kind of model has no place for it."""
    merged = dict(raw)
    if after.tie_word_embeddings != before.tie_word_embeddings:
        merged["tie_word_embeddings"] = after.tie_word_embeddings
    if after.biased != before.biased:
        merged |= {"attention_bias": "o" in after.biased, "mlp_bias": "down" in after.biased}
    if Config.from_dict(merged).biased != after.biased:
        kind = raw.get("model_type", "llama")
        raise ValueError(f"a model of type {kind} has no place for these biases: keep the adapter beside the model")
    return merged


def tell(report: dict[str, Any], out: Path) -> None:
    """Print the file that was written, and the cost of rounding."""
    print(
        f"{out}: {report['adapted_weights']:,} weights adapted, written as {report['dtype']}; rounding left "
        f"{report['unchanged_share']:.1%} of them unchanged and lost {report['lost_share_of_update']:.2%} of the update"
    )
    print(
        f"on sample text the logits, the largest of which is {report['largest_logit']:.3g}, differ by at most "
        f"{report['largest_logit_difference']:.2g} from base and adapter together"
    )
    cost, effect = report["rounding_kl"], report["adapter_kl"]
    print(f"there rounding costs {cost:.2g} nats a token (KL), where the adapter's whole effect is {effect:.2g}")
    if cost > MUCH * effect:
        print(
            "much of what was learnt is lost: write --dtype float32, or keep the adapter beside the base",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    return errors.run(merge_command, argv)


if __name__ == "__main__":
    sys.exit(main())
