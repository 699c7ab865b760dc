"""The common part of generate and chat: flags, models by name, and text that appears as it is generated."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora.backend import use
from minilora.cli.base import find_base
from minilora.cli.flags import add_model_flags, flags
from minilora.data.streamed_text import StreamedText
from minilora.data.tokenizer import Tokenizer
from minilora.formats.library import BASE, load_adapters, named_adapters
from minilora.formats.load import load_model
from minilora.frozen.hold import FROZEN, MIXED_PRECISION
from minilora.model.generation import Choose, penalised, sampler
from minilora.model.model import Model
from minilora.runs.folder import read_summary


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the base and the adapters, and say where and how they are held."""
    add_model_flags(parser)
    parser.add_argument(
        *flags("adapter"),
        action="append",
        default=[],
        metavar="[NAME=]ADAPTER",
        help="the folder of an adapter, or its id on the hub, with a name of your choice; may be given several times",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--frozen", choices=FROZEN, default="widened", help="how weights are held")
    parser.add_argument(
        *flags("mixed_precision"),
        choices=MIXED_PRECISION,
        default="no",
        help="products with the base's weights in 16 bits: faster where the machine has them (%(default)s)",
    )


def add_flags(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the flags of loading, and those that say how to sample. `max_tokens` is the default of `--max-tokens`."""
    add_loading_flags(parser)
    parser.add_argument(
        "--system-prompt", default="", metavar="TEXT", help="the system message at the start of a conversation"
    )
    parser.add_argument(
        *flags("max_tokens"),
        metavar="N",
        type=int,
        default=max_tokens,
        help="the most new tokens (%(default)s)",
    )
    parser.add_argument(
        *flags("temp"),
        metavar="X",
        type=float,
        default=0.0,
        help="temperature; 0 takes the most probable token (%(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw only from the k most probable tokens; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the fewest tokens whose probabilities reach p (%(default)s)"
    )
    penalty = "divide the logits of tokens that the text has already; 1.1 is usual, 1 changes nothing (%(default)s)"
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help=penalty)
    parser.add_argument("--seed", type=int, default=0, help="the seed of the draws (%(default)s)")
    parser.add_argument(
        "--extra-eos-token",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="a token that ends an answer, beside the model's own",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, if a value makes no sense."""
    for name, sensible in (
        ("max_tokens", args.max_tokens >= 1),
        ("temp", args.temp >= 0),
        ("top_k", args.top_k >= 0),
        ("top_p", 0 < args.top_p <= 1),
        ("repetition_penalty", 0 < args.repetition_penalty < math.inf),
        ("seed", args.seed >= 0),
    ):
        if not sensible:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} makes no sense: see --help")


class Loaded(NamedTuple):
    """The models with their tokenizer and sampler."""

    models: dict[str, Model]  # "base" first, then the adapters on it
    tokenizer: Tokenizer
    choose: Choose
    stop_ids: frozenset[int]
    learnt_to_chat: bool  # every adapter's training rows were messages

    @property
    def adapters(self) -> list[str]:
        """The adapters that the user named, or the base if there are none."""
        return [name for name in self.models if name != BASE] or [BASE]


def load_models(args: argparse.Namespace, adapters: Mapping[str, Path]) -> tuple[dict[str, Model], Tokenizer, str]:
    """The base and the adapters on it by name, the tokenizer, and the base's name as the user knows it."""
    use(args.device)
    source = find_base(args.model, args.revision, adapters)
    base, _ = load_model(source.folder, frozen=args.frozen, mixed_precision=args.mixed_precision)
    models = load_adapters(base, adapters)
    return models, Tokenizer.load(source.folder).fitting(base.config.vocab_size), source.name


def load(args: argparse.Namespace) -> Loaded:
    """Load the base, the adapters on it, and the tokenizer, as the flags of `add_flags` say."""
    adapters = named_adapters(args.adapter)
    models, tokenizer, _ = load_models(args, adapters)
    drawn = sampler(args.temp, args.top_k, args.top_p, np.random.default_rng(args.seed))
    choose = penalised(drawn, args.repetition_penalty)
    stop_ids = tokenizer.stop_ids | extra_stops(args.extra_eos_token, tokenizer)
    return Loaded(models, tokenizer, choose, stop_ids, bool(adapters) and all(map(learnt_to_chat, adapters.values())))


def learnt_to_chat(adapter: Path) -> bool:
    """Whether the folder is that of a run whose training rows were messages."""
    train = (read_summary(adapter).get("data") or {}).get("train") or {}
    shapes = train.get("shapes") or []
    return bool(shapes) and all("messages" in shape for shape in shapes)


def extra_stops(texts: list[str], tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that `--extra-eos-token` names."""
    encoded = {text: tokenizer.encode(text) for text in texts}
    for text, ids in encoded.items():
        if len(ids) != 1:
            raise ValueError(f"--extra-eos-token {text!r} is {len(ids)} tokens of this model, and has to be one")
    return frozenset(ids[0] for ids in encoded.values())


def pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the tokens, as they come. The bytes of an incomplete character are held back until it is complete."""
    text = StreamedText(tokenizer)
    for token in tokens:
        if piece := text.add(token):
            yield piece
    yield text.rest()
