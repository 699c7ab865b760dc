"""Combine LoRA adapters of one base into one: the weighted sum of their changes, as an adapter in PEFT's format."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from minilora.adapters.combination import Combination, Summand, combine, relative_error
from minilora.cli import errors
from minilora.cli.base import find_base
from minilora.cli.flags import flags
from minilora.cli.parser import Listed, Parser, comma_list
from minilora.formats.checkpoint import read_config, read_weights
from minilora.formats.files import write_json
from minilora.formats.library import contradiction, named_adapters, trained_on
from minilora.formats.peft import CONFIG, check_copies, read_adapter, write_adapter
from minilora.formats.whole import building, check_new
from minilora.methods.lora import LoRA
from minilora.model.config import Config

COMBINE_FILE = "combine.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.combine", description=__doc__)
    parser.add_argument(
        *flags("adapter"),
        action="append",
        default=[],
        metavar="[NAME=]ADAPTER",
        help="the folder of a LoRA adapter, or its id on the hub; one flag per adapter",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        action=Listed,
        type=comma_list(float),
        metavar="W",
        help="a weight for each adapter, in their order (default: all 1)",
    )
    parser.add_argument(
        "--combination-type",
        choices=("cat", "svd"),
        default="cat",
        help="cat: exact, with the sum of all ranks; svd: the nearest adapter of rank --rank (%(default)s)",
    )
    parser.add_argument(
        "--rank",
        "--svd-rank",
        type=int,
        default=0,
        metavar="R",
        help="the rank of svd (default: the largest of the adapters)",
    )
    parser.add_argument(
        *flags("out"), type=Path, required=True, metavar="FOLDER", help="the folder to write, new or empty"
    )
    parser.add_argument(
        *flags("model"),
        default="",
        metavar="MODEL",
        help="the base, a folder or a hub id (default: the first adapter's)",
    )
    parser.add_argument("--force", action="store_true", help="combine even adapters that name different bases")
    return parser.read(argv)


def checked_weights(args: argparse.Namespace) -> list[float]:
    """The weights. ValueError, naming the flag, if a value makes no sense."""
    if len(args.adapter) < 2:
        raise ValueError(f"--adapter is given {len(args.adapter)} times: it takes two or more adapters to combine")
    weights: list[float] = args.weights or [1.0] * len(args.adapter)
    if len(weights) != len(args.adapter) or not all(map(math.isfinite, weights)):
        listed = " ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"--weights {listed}: give one number for each of the {len(args.adapter)} adapters")
    if args.rank < 0 or (args.rank and args.combination_type == "cat"):
        raise ValueError(f"--rank {args.rank} goes with --combination-type svd, and is at least 1; cat keeps all ranks")
    check_new(args.out)
    return weights


def read_linear(name: str, folder: Path, config: Config, model_folder: Path) -> Summand:
    """An adapter whose update is a product of thin factors. ValueError, naming the method, for any other."""
    adapter = read_adapter(folder, config)
    if not adapter.method.thin_change:
        raise ValueError(f"{folder / CONFIG}: {adapter.method.name}, and only LoRA is linear and can be combined")
    if adapter.copies:
        check_copies(folder, adapter.copies, read_weights(model_folder, config))
    return Summand(name, cast(LoRA, adapter.method), adapter.tensors)


def combine_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    weights = checked_weights(args)
    folders = named_adapters(args.adapter)
    if (different := contradiction(folders)) and not args.force:
        raise ValueError(f"{different}: a sum of the two is right for neither. --force combines them all the same")
    first, trained = next((name, trained_on(folder)) for name, folder in folders.items())
    source = find_base(args.model, "", {first: folders[first]})
    model_folder = source.folder
    config, _ = read_config(model_folder)
    adapters = [read_linear(name, folder, config, model_folder) for name, folder in folders.items()]
    rank = None if args.combination_type == "cat" else args.rank or largest_rank(adapters, config)
    combination = combine(config, adapters, weights, rank)
    base, revision = trained.base or source.name, trained.revision or None
    report = combination_report(combination, folders, weights, args.combination_type)
    with building(args.out) as out:
        write_adapter(out, combination.method, combination.tensors, config, base, revision)
        write_json(out / COMBINE_FILE, report)
    show(args.out, combination, report)


def largest_rank(adapters: Sequence[Summand], config: Config) -> int:
    return max(place.rank for adapter in adapters for place in adapter.method.places(config).values())


def combination_report(
    combination: Combination, folders: dict[str, Path], weights: Sequence[float], combination_type: str
) -> dict[str, Any]:
    """The content of `combine.json`. Errors are ‖ΔW − ΔWᵣ‖ / ‖ΔW‖ in the Frobenius norm."""
    truncations = combination.truncations
    return {
        "adapters": [
            {"name": name, "folder": str(folder), "base": str(trained_on(folder)), "weight": weight}
            for (name, folder), weight in zip(folders.items(), weights, strict=True)
        ],
        "combination_type": combination_type,
        "overlapping_modules": combination.overlapping,
        "relative_error": relative_error(list(truncations.values())),
        "relative_error_by_module": {module: t.error for module, t in truncations.items()},
    }


def show(out: Path, combination: Combination, report: dict[str, Any]) -> None:
    """Print the combination in a few lines."""
    ranks = sorted({len(tensor) for name, tensor in combination.tensors.items() if "_A" in name})
    count, overlapping = len(combination.tensors) // 2, combination.overlapping
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print(f"{out}: " + " + ".join(f"{adapter['weight']:g} × {adapter['name']}" for adapter in report["adapters"]))
    print(f"{count} modules of rank {span}, scale 1")
    if overlapping:
        ends = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in overlapping))
        print(f"{len(overlapping)} of them are changed by more than one adapter, and there the changes add up: {ends}")
    else:
        print("no module is changed by more than one adapter")
    if errors := report["relative_error_by_module"]:
        worst = max(errors, key=errors.__getitem__)
        print(
            f"relative error of the lower rank: {report['relative_error']:.2%}; most, {errors[worst]:.2%}, at {worst}"
        )


def main(argv: list[str] | None = None) -> int:
    return errors.run(combine_command, argv)


if __name__ == "__main__":
    sys.exit(main())
