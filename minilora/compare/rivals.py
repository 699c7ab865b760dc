"""The methods that are compared, as flags of `train`; each method's file says as what, and at which learning rates.

All train the same rows for the same number of steps. A method with a size of its own gets the one that trains about as
many numbers as LoRA at rank 8 does on the shipped model, if it can: so they differ in where they put them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.method import Method, known_methods
from minilora.methods.setting import flag

SHOTS = 8  # rows before a prompt, as many of them as fit


class Rival(NamedTuple):
    """A method under the name it has in tables. Without `rates` it does not train: it is measured by `evaluate`."""

    name: str
    what: str
    flags: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()


def flags_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings as a user types them."""
    words: list[str] = []
    for name, value in settings.items():
        words += [flag(name)] if value is True else [flag(name), str(value)]
    return tuple(words)


def rivals() -> tuple[Rival, ...]:
    """Full fine-tuning, LoRA, then all others by their files; last what does not train."""
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
