"""Continue a prompt with a model, and perhaps an adapter; the words appear as they are made."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import numpy as np

from minilora import cli
from minilora.backend import use
from minilora.flags import add_model_flags, dashed, flags
from minilora.formats.adapters import load_adapter
from minilora.formats.hub import find_adapter, find_model
from minilora.formats.load import load_model
from minilora.methods.base import FROZEN
from minilora.model.generation import sampler, stream
from minilora.text.tokenizer import Tokenizer


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minilora.generate", description=__doc__)
    add_model_flags(parser)
    parser.add_argument(*flags("adapter"), metavar="ADAPTER", help="folder of a LoRA adapter, or its id on the hub")
    parser.add_argument("--prompt", default="-", help="the text to continue; - reads it from standard input (default)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message for the chat template")
    parser.add_argument(
        *flags("max_tokens"), metavar="N", type=int, default=128, help="at most this many new tokens (%(default)s)"
    )
    parser.add_argument(
        *flags("temp"), metavar="X", type=float, default=0.0, help="temperature; 0 takes the best token (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k best tokens only; 0: all (%(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the fewest tokens that reach p (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--frozen", choices=FROZEN, default="widened", help="how weights are held")
    return parser.parse_args(dashed(argv))


def check(args: argparse.Namespace) -> None:
    """Raise ValueError naming the flag whose value makes no sense."""
    for name, fine in (
        ("max_tokens", args.max_tokens >= 1),
        ("temp", args.temp >= 0),
        ("top_k", args.top_k >= 0),
        ("top_p", 0 < args.top_p <= 1),
        ("seed", args.seed >= 0),
    ):
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} makes no sense: see --help")


def pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the tokens, as soon as it is certain: bytes of a character that is not whole yet are held back."""
    seen: list[int] = []
    done = ""
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(done) :]
            done = text
    yield tokenizer.decode(seen)[len(done) :]


def generate_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    use(args.device)
    folder = find_model(args.model, args.revision).folder
    model, _ = load_model(folder, frozen=args.frozen)
    if args.adapter:
        model = load_adapter(model, find_adapter(args.adapter).folder)
    tokenizer = Tokenizer.load(folder)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    text = tokenizer.chat([{"role": "user", "content": prompt}], add_generation_prompt=True) if args.chat else prompt
    ids = tokenizer.with_bos(tokenizer.encode(text))
    if not ids:
        raise ValueError("the prompt is empty: give some text with --prompt")
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model sees {model.config.max_position_embeddings}")
    choose = sampler(args.temp, args.top_k, args.top_p, np.random.default_rng(args.seed))
    tokens = (int(row[0]) for row in stream(model, [ids], choose))
    answer = itertools.takewhile(lambda token: token not in tokenizer.stop_ids, tokens)
    for piece in pieces(itertools.islice(answer, min(args.max_tokens, room)), tokenizer):
        print(piece, end="", flush=True)
    print()


def main(argv: list[str] | None = None) -> int:
    return cli.run(generate_command, argv)


if __name__ == "__main__":
    sys.exit(main())
