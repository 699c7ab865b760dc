"""Write an adapter or a model in another format. The numbers stay as they are, but where --dtype rounds them.

An adapter, with --adapter: PEFT's format, mlx-lm's or llama.cpp's (gguf). A model, with --model alone: a GGUF file as a
Hugging Face folder, or a folder as a GGUF file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minilora.backend import to_host, use
from minilora.cli import errors
from minilora.cli.base import find_base
from minilora.cli.flags import flags
from minilora.cli.parser import Parser
from minilora.data.tokenizer import Tokenizer, save_tokenizer_files, tokenizer_files_to_copy
from minilora.formats.adapters import FORMATS, read_method, write_method
from minilora.formats.checkpoint import DTYPES, read_config, read_weights, write_checkpoint
from minilora.formats.gguf_tokenizer import tokenizer_fields
from minilora.formats.gguf_write import GGUF_DTYPES, check_free, write_gguf, write_gguf_adapter
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.library import trained_on
from minilora.formats.load import load_model
from minilora.formats.whole import building, check_new
from minilora.model.names import parameter_count

GGUF, FOLDER = "gguf", "huggingface"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.convert", description=__doc__)
    parser.add_argument(*flags("adapter"), default="", metavar="ADAPTER", help="its folder, or its id on the hub")
    formats = f"to write: of an adapter {', '.join((*FORMATS, GGUF))}; of a model {FOLDER} (the default), {GGUF}"
    parser.add_argument("--format", choices=(*FORMATS, GGUF, FOLDER), help=formats)
    parser.add_argument(
        *flags("out"), type=Path, required=True, metavar="PATH", help="a folder, new or empty; FILE.gguf"
    )
    model = "a folder, a .gguf file or an id; of an adapter, its base (default: as the adapter says)"
    parser.add_argument(*flags("model"), default="", metavar="MODEL", help=model)
    dtype = "of a model's matrices (default: float32)"
    parser.add_argument("--dtype", choices=GGUF_DTYPES, help=dtype)
    return parser.read(argv)


def convert_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.format = args.format or ("" if args.adapter else FOLDER)
    possible = (*FORMATS, GGUF) if args.adapter else (FOLDER, GGUF)
    if args.format not in possible:
        what = "--adapter" if args.adapter else "--model without --adapter"
        raise ValueError(f"{what} goes with --format {' or '.join(possible)}")
    if args.adapter and args.dtype:
        raise ValueError("--dtype is for models: an adapter keeps its numbers as they are")
    if args.format == GGUF:
        check_free(args.out, whole_model=not args.adapter)
    else:
        check_new(args.out)
    use("cpu")
    if args.adapter:
        convert_adapter(args)
    elif args.model:
        convert_model(args)
    else:
        raise ValueError("give --adapter, or --model, or both: there is nothing to convert")


def convert_adapter(args: argparse.Namespace) -> None:
    folder = find_adapter(args.adapter).folder
    trained = trained_on(folder)
    source = find_base(args.model, "", {args.adapter: folder})
    base, raw = load_model(source.folder, frozen="stored")
    method, tensors = read_method(folder, base)
    host = {name: to_host(tensor) for name, tensor in tensors.items()}
    if args.format == GGUF:
        write_gguf_adapter(args.out, method, host, raw.get("model_type", "llama"), base.config)
    else:
        named = trained.base or source.name, trained.revision or None
        with building(args.out) as out:
            write_method(out, method, host, base.config, *named, args.format)
    print(f"{args.out}: {len(host)} tensors of {sum(tensor.size for tensor in host.values()):,} numbers, {args.format}")


def convert_model(args: argparse.Namespace) -> None:
    dtype = args.dtype or "float32"
    source = find_model(args.model).folder
    config, raw = read_config(source)
    weights = read_weights(source, config)
    if args.format == GGUF:
        tokenizer = Tokenizer.load(source)
        fields, stops = tokenizer_fields(tokenizer, config.vocab_size), tokenizer.stop_texts
        write_gguf(args.out, raw.get("model_type", "llama"), config, weights, dtype, fields, stops)
    elif dtype in DTYPES:
        tokenizer_files_to_copy(source)  # first: a link out of the folder is an error
        with building(args.out) as out:
            write_checkpoint(out, raw, weights, dtype)
            save_tokenizer_files(source, out)
    else:
        raise ValueError(f"--dtype {dtype} goes with --format {GGUF}")
    print(f"{args.out}: {parameter_count(config):,} weights in {dtype}, {args.format}")


def main(argv: list[str] | None = None) -> int:
    return errors.run(convert_command, argv)


if __name__ == "__main__":
    sys.exit(main())
