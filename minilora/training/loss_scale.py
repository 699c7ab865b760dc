"""The loss scale: what keeps gradients in float16's range (Micikevicius et al., 2018, arXiv:1710.03740, section 3.2).

The loss is multiplied by S before the backward, and the gradients are divided by S after it. All in between are S times
larger, and fewer of them are rounded to zero. S is a power of two, which changes no other digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from minilora.model.sites import Gradients
from minilora.training.optimizers import global_norm

FIRST, LEAST, LARGEST = 2.0**16, 2.0, 2.0**24
GROWS_AFTER = 2000  # steps without overflow; this and the first scale are PyTorch's


@dataclass
class LossScale:
    """S, and how long nothing has overflowed. S = 1 is no scaling, and stays."""

    value: float = 1.0
    steps: int = 0

    def gradients(self, compute: Callable[[float], tuple[float, Gradients]]) -> tuple[float, Gradients, float]:
        """Loss, gradients and their norm, by `compute` of S. (docs: H2)

        Where a gradient overflows, S is halved and the step computed again: no row is left out. After 2,000 steps
        without overflow S is doubled. A norm that is not finite is returned where S cannot help: the loss itself is not
        finite, or S is as small as it gets.
        """
        if self.steps >= GROWS_AFTER and 1 < self.value < LARGEST:
            self.value, self.steps = 2 * self.value, 0
        while True:
            loss, gradients = compute(self.value)
            norm = global_norm(gradients)
            if math.isfinite(norm) or not math.isfinite(loss) or self.value <= LEAST:
                break
            self.value, self.steps = self.value / 2, 0
        self.steps += 1
        return loss, gradients, norm
