"""The compared methods, as flags of `train`. Each method's file lists its variants and the learning rates to try.

All train on the same rows for the same number of steps. If a method has a size to choose, it trains about as many
parameters as LoRA at rank 8 does on the shipped model, so that the methods differ in where the parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.method import Method, known_methods
from minilora.methods.setting import flag

SHOTS = 8  # rows before a prompt, if the context holds as many


class Rival(NamedTuple):
    """A method under its name in tables. A rival without `rates` does not train: `evaluate` measures it."""

    name: str
    what: str
    flags: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()


def flags_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings as words of a command line."""
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [flag(name)] if value is True else [flag(name), *map(str, values)]
    return tuple(words)


def rivals() -> tuple[Rival, ...]:
    """Full fine-tuning, LoRA, then all other methods in the order of their files; few-shot prompting comes last."""
    kinds: list[type[Method]] = list(dict.fromkeys((Full, LoRA, *known_methods().values())))
    trained = [
        Rival(rival.name, rival.what, flags_of(rival.settings), rival.rates) for kind in kinds for rival in kind.rivals
    ]
    shots = f"nothing: up to {SHOTS} rows with answers before the prompt"
    return (*trained, Rival("few-shot", shots, ("--few-shot", str(SHOTS))))


RIVALS = rivals()
FULL, LORA, *_ = RIVALS
FAMILY = {rival.name for kind in known_methods().values() if issubclass(kind, LoRA) for rival in kind.rivals}  # LoRA's


def lora_of_rank(rank: int, rates: Sequence[float]) -> Rival:
    """LoRA at another rank, with α twice the rank: so the scale stays the same, and only the capacity differs."""
    flags = ("--rank", str(rank), "--alpha", str(2 * rank))
    return Rival(f"lora-r{rank}", f"LoRA, rank {rank}, α {2 * rank}", flags, tuple(rates))


def choose(names: Sequence[str]) -> list[Rival]:
    """The rivals of these names, in the order of RIVALS. ValueError for an unknown name."""
    known = {rival.name: rival for rival in RIVALS}
    for name in names:
        if name not in known:
            raise ValueError(f"--methods {name}: choose of {', '.join(known)}")
    return [rival for rival in RIVALS if rival.name in names]


def neighbour(rate: float, by: int) -> float:
    """The rate `by` places further in the series … 1e-3, 3e-3, 1e-2, 3e-2 …, which has two for each power of ten."""
    place = round(2 * math.log10(rate)) + by
    return float(f"{(1, 3)[place % 2]}e{place // 2}")
