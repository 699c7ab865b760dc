"""Write a checkpoint with random weights: the real shapes of a model, without a download.

python -m minilora.random_checkpoint SmolLM2-135M --out random-135m
"""

from __future__ import annotations

import sys
from pathlib import Path

from minilora.cli import errors
from minilora.cli.parser import Parser
from minilora.data.tokenizer import tokenizer_files_to_copy
from minilora.formats.checkpoint import DTYPES, named_dtype, random_weights, write_checkpoint
from minilora.formats.files import copy_file
from minilora.formats.known_configs import KNOWN_CONFIGS, find_config
from minilora.formats.load import SHIPPED_MODEL
from minilora.formats.whole import building, check_new
from minilora.model.names import parameter_count


def random_checkpoint_command(argv: list[str] | None = None) -> None:
    """Parse, write, print."""
    parser = Parser(prog="python -m minilora.random_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("config", help=f"a path to a config.json, or {', '.join(KNOWN_CONFIGS)}")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "float64"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the weights (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer is copied (default: weights/tinysmol)")
    args = parser.read(argv)
    config, raw = find_config(args.config)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative")
    check_new(args.out)
    tokenizer = tokenizer_files(args.tokenizer)
    with building(args.out) as out:
        write_checkpoint(out, raw, random_weights(config, args.seed, args.dtype), args.dtype)
        for path in tokenizer:
            copy_file(path, out / path.name)
    count = parameter_count(config)
    print(f"{count:,} parameters, {count * named_dtype(args.dtype).itemsize:,} bytes, in {args.out}")


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The files to copy. A folder named by the user must hold a tokenizer; the default folder may be absent."""
    chosen = folder or SHIPPED_MODEL
    if folder and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.json'}: no such file: --tokenizer names a folder that holds it")
    return tokenizer_files_to_copy(chosen)


def main(argv: list[str] | None = None) -> int:
    return errors.run(random_checkpoint_command, argv)


if __name__ == "__main__":
    sys.exit(main())
