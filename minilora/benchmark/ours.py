"""The measured side minilora: the same calls that `train` and `generate` make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minilora.backend import peak_memory_bytes, to_host, use
from minilora.benchmark.job import PAD, Figures, Job, JobRow, read_job_rows, steps_of
from minilora.benchmark.worker import Work, serve
from minilora.data.batches import Batch, collate
from minilora.data.store import Example
from minilora.formats.adapters import read_method
from minilora.formats.load import load_model
from minilora.model.generation import complete
from minilora.model.model import Model
from minilora.training.flat import Flat, flatten
from minilora.training.optimizers import AdamW, clip_gradients, global_norm
from minilora.training.parts import on_all_cores
from minilora.training.step import loss_and_gradients, mean_loss


def batch_of(rows: Sequence[JobRow]) -> Batch:
    """All rows of a step in one batch."""
    return collate([[Example(row.tokens, [i >= row.prompt for i in range(len(row.tokens))])] for row in rows], PAD)


class Training:
    """LoRA training steps on given rows: one step on all of them, or an epoch of several."""

    def __init__(self, job: Job, model: Model, flat: Flat) -> None:
        self.job, self.model, self.flat = job, model, flat
        self.rows = read_job_rows(job)
        self.start = {name: p.copy() for name, p in flat.parts.items()}
        self.optimizer = AdamW(flat.parts)

    def warm_up(self) -> None:
        """Take one step: on all rows if steps are measured, or on the two shortest rows before an epoch."""
        self.step(self.rows if self.job.kind == "step" else sorted(self.rows, key=lambda row: len(row.tokens))[:2])

    def reset(self) -> None:
        """Restore the adapter, so that every epoch begins with the same one. Steps go on from each other."""
        if self.job.kind == "epoch":
            for name, p in self.flat.parts.items():
                p[...] = self.start[name]
            self.optimizer = AdamW(self.flat.parts)

    def run(self) -> Figures:
        losses = [self.step(rows) for rows in steps_of(self.job, self.rows)]
        to_host(next(iter(self.flat.parts.values())))  # a GPU has finished once it has handed over its last update
        return {"losses": losses}

    def step(self, rows: Sequence[JobRow]) -> float:
        """One optimiser step, as the training loop makes it."""
        loss, gradients = loss_and_gradients(self.model, [batch_of(rows)], run=on_all_cores)
        gradients = self.flat.gathered(gradients)
        clip_gradients(gradients, global_norm(gradients), 1.0)
        self.optimizer.update(self.flat.parts, gradients, self.job.learning_rate)
        return loss

    def judge(self) -> Figures:
        """After an epoch, the loss of its first step's rows."""
        if self.job.kind == "step":
            return {}
        return {"final_loss": mean_loss(self.model, [batch_of(steps_of(self.job, self.rows)[0])])}


class Generation:
    """Greedy continuation of prompts, with the key/value cache."""

    def __init__(self, job: Job, model: Model) -> None:
        self.job, self.model = job, model
        self.prompts = [row.tokens for row in read_job_rows(job)]

    def warm_up(self) -> None:
        complete(self.model, self.prompts, min(4, self.job.new_tokens), frozenset())

    def reset(self) -> None:
        """Do nothing, because a run changes nothing."""

    def run(self) -> Figures:
        return {"answers": complete(self.model, self.prompts, self.job.new_tokens, frozenset())}

    def judge(self) -> Figures:
        return {}


def load(job: Job) -> Work:
    """Load the model of the job and, for training, its adapter."""
    use(job.device)
    model, _ = load_model(Path(job.model), frozen=job.frozen, mixed_precision=job.mixed_precision)
    if job.kind == "generate":
        return Generation(job, model)
    method, trainable = read_method(Path(job.adapter), model)
    flat, _ = flatten(trainable, AdamW, {})
    return Training(job, method.attach(model, flat.arrays), flat)


if __name__ == "__main__":
    serve(load, peak_memory_bytes)
