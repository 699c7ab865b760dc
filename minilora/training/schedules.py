"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def warmup_steps(warmup: float, steps: int) -> int:
    """`--warmup` below 1 is a share of all steps, otherwise a number of steps. (docs: T6)"""
    return round(warmup * steps) if warmup < 1 else int(warmup)


def learning_rate(step: int, steps: int, peak: float, schedule: str = "cosine", warmup: int = 0) -> float:
    """The rate of step 0 … steps − 1: a linear climb over `warmup` steps to `peak`, then down towards 0. (docs: T5)

    Step k of the warm-up has peak · (k + 1)/(warmup + 1), so no step is wasted on rate 0. After it, with progress u
    running from 0 at the first step to 1 just after the last: cosine ½(1 + cos πu) (Loshchilov & Hutter, 2016,
    arXiv:1608.03983), linear 1 − u, constant 1.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule {schedule!r} is unknown: choose {', '.join(SCHEDULES)}")
