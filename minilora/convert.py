"""Write an adapter in another format: PEFT's for mlx-lm, or mlx-lm's for PEFT. Its numbers stay as they are."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minilora.backend import to_host, use
from minilora.cli import errors
from minilora.cli.flags import dashed, flags
from minilora.formats.adapters import FORMATS, read_method, write_method
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.library import trained_on
from minilora.formats.load import load_model


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minilora.convert", description=__doc__)
    parser.add_argument(*flags("adapter"), required=True, metavar="ADAPTER", help="its folder, or its id on the hub")
    parser.add_argument("--format", choices=FORMATS, required=True, help="to write")
    parser.add_argument(*flags("out"), type=Path, required=True, metavar="FOLDER", help="to write, new or empty")
    parser.add_argument(
        *flags("model"), default="", metavar="MODEL", help="its base: a folder or an id (default: as the adapter says)"
    )
    return parser.parse_args(dashed(argv))


def convert_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not errors.is_free(args.out):
        raise ValueError(f"--out {args.out} exists and is not an empty folder: choose another")
    use("cpu")
    folder = find_adapter(args.adapter).folder
    trained = trained_on(folder)
    if not (args.model or trained.base):
        raise ValueError(f"{folder} does not say which base it belongs to: name it with --model")
    model = args.model or trained.base
    revision = "" if args.model or Path(model).exists() else trained.revision
    base, _ = load_model(find_model(model, revision).folder, frozen="stored")
    method, tensors = read_method(folder, base)
    host = {name: to_host(tensor) for name, tensor in tensors.items()}
    write_method(args.out, method, host, base.config, trained.base or model, trained.revision or None, args.format)
    print(f"{args.out}: {len(host)} tensors of {sum(tensor.size for tensor in host.values()):,} numbers, {args.format}")


def main(argv: list[str] | None = None) -> int:
    return errors.run(convert_command, argv)


if __name__ == "__main__":
    sys.exit(main())
