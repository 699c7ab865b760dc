"""The floor: only the matrix products with frozen weights that a job cannot do without.

A LoRA step needs x Wᵀ forwards and dy W backwards for every frozen matrix, and no dW: 4 operations for each weight and
token; the head only where there is a label. Generation needs the forward product alone. Each weight is an array of its
own, so that it comes from memory as it does in the model; nothing else is read, computed or allocated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minilora.backend import Array, peak_memory_bytes, random_generator, to_host, use, xp
from minilora.benchmark.formula import Pass, passes_of
from minilora.benchmark.job import Figures, Job
from minilora.benchmark.worker import Work, serve
from minilora.formats.checkpoint import read_config
from minilora.model.config import Config
from minilora.model.names import EMBED, parameter_shapes

MOST_HEAD_ROWS = 1024  # more rows at once are no faster, and their logits are large


class Products:
    """Random matrices of the model's shapes, and arrays for the inputs and outputs of the products."""

    def __init__(self, job: Job, config: Config) -> None:
        self.backward = job.kind != "generate"
        self.passes = passes_of(job)
        rng = random_generator(0)
        matrices = {name: shape for name, shape in parameter_shapes(config).items() if len(shape) == 2}
        head = matrices.pop(f"{EMBED}.weight")
        self.head = self._random(rng, head, job.dtype)
        self.weights = [self._random(rng, shape, job.dtype) for name, shape in matrices.items() if "layers" in name]
        rows = max(work.tokens for work in self.passes)
        head_rows = min(MOST_HEAD_ROWS, max(work.labelled for work in self.passes))
        widths = {width for W in self.weights for width in W.shape}
        self.given = {width: self._random(rng, (rows, width), job.dtype) for width in widths}
        self.result = {width: xp.empty_like(x) for width, x in self.given.items()}
        self.given_logits = self._random(rng, (head_rows, len(self.head)), job.dtype)
        self.logits = xp.empty_like(self.given_logits)

    @staticmethod
    def _random(rng: object, shape: tuple[int, ...], dtype: str) -> Array:
        array: Array = rng.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)  # type: ignore[attr-defined]
        return array

    def warm_up(self) -> None:
        self.once(self.passes[-1])

    def reset(self) -> None:
        """Nothing: a run leaves no trace."""

    def run(self) -> Figures:
        for work in self.passes:
            self.once(work)
        to_host(self.logits[:1, :1])  # a GPU is done when it has handed over the last result
        return {}

    def once(self, work: Pass) -> None:
        """The products of one forward, and one backward if there is one."""
        N = work.tokens
        for W in self.weights:
            xp.matmul(self.given[W.shape[1]][:N], W.T, out=self.result[W.shape[0]][:N])
        for start in range(0, work.labelled, MOST_HEAD_ROWS):
            M = min(MOST_HEAD_ROWS, work.labelled - start)
            hidden = self.head.shape[1]
            xp.matmul(self.given[hidden][:M], self.head.T, out=self.logits[:M])
            if self.backward:
                xp.matmul(self.given_logits[:M], self.head, out=self.result[hidden][:M])
        if self.backward:
            for W in reversed(self.weights):
                xp.matmul(self.given[W.shape[0]][:N], W, out=self.result[W.shape[1]][:N])

    def judge(self) -> Figures:
        return {}


def load(job: Job) -> Work:
    use(job.device)
    config, _ = read_config(Path(job.model))
    return Products(job, config)


if __name__ == "__main__":
    serve(load, peak_memory_bytes)
