"""Write a checkpoint with random weights: the real shapes of a model, without a download.

python -m minilora.random_checkpoint SmolLM2-135M --out random-135m
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from minilora import cli
from minilora.formats.checkpoint import DTYPES, named_dtype, random_weights, read_config_file, write_checkpoint
from minilora.formats.files import replacing
from minilora.formats.known_configs import KNOWN_CONFIGS
from minilora.formats.load import SHIPPED_MODEL
from minilora.model.config import Config
from minilora.model.names import parameter_count
from minilora.text.tokenizer import TOKENIZER_FILES


def random_checkpoint_command(argv: list[str] | None = None) -> None:
    """Parse, write, print."""
    parser = argparse.ArgumentParser(prog="python -m minilora.random_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("config", help=f"a path to a config.json, or {', '.join(KNOWN_CONFIGS)}")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "float64"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer is copied (default: weights/tinysmol)")
    args = parser.parse_args(argv)
    config, raw = find_config(args.config)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative")
    if not cli.is_free(args.out):
        raise ValueError(f"{args.out} exists and is not an empty folder: choose another --out")
    tokenizer = tokenizer_files(args.tokenizer)
    write_checkpoint(args.out, raw, random_weights(config, args.seed, args.dtype), args.dtype)
    for path in tokenizer:
        with replacing(args.out / path.name) as partial:
            shutil.copyfile(path, partial)
    count = parameter_count(config)
    print(f"{count:,} parameters, {count * named_dtype(args.dtype).itemsize:,} bytes, in {args.out}")


def find_config(name: str) -> tuple[Config, dict[str, Any]]:
    """A configuration by its known name or by its path."""
    if name in KNOWN_CONFIGS:
        return Config.from_dict(KNOWN_CONFIGS[name]), KNOWN_CONFIGS[name]
    if not Path(name).is_file():
        raise ValueError(f"{name} is neither a file nor a known configuration: {', '.join(KNOWN_CONFIGS)}")
    return read_config_file(Path(name))


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The files to copy. A folder that was asked for must hold a tokenizer; the default one may be absent."""
    chosen = folder or SHIPPED_MODEL
    if folder and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.json'}: no such file: --tokenizer names a folder that holds it")
    return [chosen / name for name in TOKENIZER_FILES if (chosen / name).is_file()]


def main(argv: list[str] | None = None) -> int:
    return cli.run(random_checkpoint_command, argv)


if __name__ == "__main__":
    sys.exit(main())
