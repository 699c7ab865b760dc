"""The methods that are compared: the flags of `train` that ask for each, and the learning rates it is tried with.

All train the same rows for the same number of steps. A method with a size of its own gets the one that trains about as
many numbers as LoRA at rank 8 does on the shipped model, if it can: so they differ in where they put them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SHOTS = 8  # rows before a prompt, as many of them as fit


class Rival(NamedTuple):
    """A method under the name it has in tables. Without `rates` it does not train: it is measured by `evaluate`."""

    name: str
    what: str
    flags: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()


LORA = Rival("lora", "A and B beside every linear map, rank 8, α 16", (), (3e-3, 1e-2, 3e-2))
FULL = Rival("full", "every parameter", ("--method", "full"), (3e-4, 1e-3, 3e-3))

RIVALS = (
    FULL,
    LORA,
    Rival("rslora", "LoRA scaled by α/√r", ("--rslora",), (1e-3, 3e-3, 1e-2)),
    Rival("loraplus", "LoRA, B 16 times as fast as A", ("--loraplus-lr-ratio", "16"), (3e-4, 1e-3, 3e-3)),
    Rival("pissa", "LoRA from W's principal part", ("--init", "pissa"), (1e-3, 3e-3, 1e-2)),
    Rival("orthogonal", "LoRA from orthogonal A and B", ("--init", "orthogonal"), (3e-3, 1e-2, 3e-2)),
    Rival("dora", "LoRA, and a length for each row of W", ("--method", "dora"), (3e-3, 1e-2, 3e-2)),
    Rival("qlora", "LoRA on W in 4 bits", ("--frozen", "nf4"), (3e-3, 1e-2, 3e-2)),
    Rival(
        "bottleneck", "a small network behind attention and MLP",
        ("--method", "bottleneck", "--bottleneck-size", "32"), (3e-3, 1e-2, 3e-2),
    ),
    Rival("prefix", "20 keys and values before the text", ("--method", "prefix"), (1e-1, 3e-1, 1e0)),
    Rival("prompt", "20 embeddings before the text", ("--method", "prompt"), (3e-2, 1e-1, 3e-1)),
    Rival("bitfit", "biases, and the norms' gains", ("--method", "bitfit", "--train-norms"), (3e-2, 1e-1, 3e-1)),
    Rival("head", "the head alone", ("--method", "head", "--untie"), (3e-4, 1e-3, 3e-3)),
    Rival("embedding", "the embedding alone", ("--method", "embedding", "--untie"), (1e-3, 3e-3, 1e-2)),
    Rival(
        "random", "weights drawn at random, as many as LoRA's",
        ("--method", "random", "--random-share", "0.053"), (3e-3, 1e-2, 3e-2),
    ),
    Rival("few-shot", f"nothing: up to {SHOTS} rows with answers before the prompt", ("--few-shot", str(SHOTS))),
)  # fmt: skip


def lora_of_rank(rank: int, rates: Sequence[float]) -> Rival:
    """LoRA at another rank, α twice the rank: the scale stays, and what differs is capacity."""
    flags = ("--rank", str(rank), "--alpha", str(2 * rank))
    return Rival(f"lora-r{rank}", f"LoRA, rank {rank}, α {2 * rank}", flags, tuple(rates))


def choose(names: Sequence[str]) -> list[Rival]:
    """The rivals of these names, in the order of RIVALS. ValueError for a name that is none."""
    known = {rival.name: rival for rival in RIVALS}
    for name in names:
        if name not in known:
            raise ValueError(f"--methods {name}: choose of {', '.join(known)}")
    return [rival for rival in RIVALS if rival.name in names]


def neighbour(rate: float, by: int) -> float:
    """The rate so many places further in … 1e-3, 3e-3, 1e-2, 3e-2 …, two for each power of ten."""
    place = round(2 * math.log10(rate)) + by
    return float(f"{(1, 3)[place % 2]}e{place // 2}")
