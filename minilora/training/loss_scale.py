"""The loss scale: it keeps gradients in float16's range (Micikevicius et al., 2018, arXiv:1710.03740, section 3.2).

The loss is multiplied by S before the backward, and the gradients are divided by S after it. All gradients in between
are S times larger, and fewer of them are rounded to zero. S is a power of two, which changes no other digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.data.batches import Batch
from minilora.model.model import Model
from minilora.model.sites import Gradients
from minilora.training.optimizers import global_norm
from minilora.training.step import Run, accumulate, labelled_tokens

FIRST, LEAST, LARGEST = 2.0**16, 2.0, 2.0**24
GROWS_AFTER = 2000  # steps without overflow; this and the first scale are PyTorch's


def scaled_loss_and_gradients(
    S: float,
    model: Model,
    batches: Sequence[Batch],
    seeds: Sequence[int] | None = None,
    checkpointing: bool = False,
    run: Run = map,
) -> tuple[float, Gradients]:
    """`loss_and_gradients` by a backward in which every gradient is S times as large. (docs: H2)"""
    M = labelled_tokens(batches)
    total, gradients = accumulate(model, batches, S / M, seeds, checkpointing, run)
    for gradient in gradients.values():
        gradient *= 1 / S
    return total / M, gradients


@dataclass
class LossScale:
    """S, and the number of steps since a gradient overflowed. S = 1 is no scaling, and stays."""

    value: float = 1.0
    steps: int = 0

    def loss_and_gradients(self, *arguments: Any) -> tuple[float, Gradients]:
        """`loss_and_gradients` of these arguments, with S found as in `largest_fit`."""
        return self.largest_fit(lambda S: scaled_loss_and_gradients(S, *arguments))

    def largest_fit(self, compute: Callable[[float], tuple[float, Gradients]]) -> tuple[float, Gradients]:
        """Loss and gradients, by `compute` of S. (docs: H2)

        If a gradient overflows, S is halved and the step is computed again, so that no row is left out. After 2,000
        steps without overflow S is doubled. Gradients that are not finite are returned if S cannot help: the loss
        itself is not finite, or S is as small as it gets.
        """
        if self.steps >= GROWS_AFTER and 1 < self.value < LARGEST:
            self.value, self.steps = 2 * self.value, 0
        while True:
            loss, gradients = compute(self.value)
            if math.isfinite(global_norm(gradients)) or not math.isfinite(loss) or self.value <= LEAST:
                break
            self.value, self.steps = self.value / 2, 0
        self.steps += 1
        return loss, gradients
