"""The measured side transformers + PEFT, as their documentation says to use them.

The only file of minilora that imports PyTorch. It runs in a process of its own, and imports nothing of minilora that
computes (not even `backend`, which tunes the process's memory allocator).
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found,unused-ignore]
import transformers  # type: ignore[import-not-found,unused-ignore]
from peft import PeftModel  # type: ignore[import-not-found,unused-ignore]

from minilora.benchmark.job import PAD, Figures, Job, JobRow, read_job_rows, steps_of
from minilora.benchmark.worker import Work, serve

IGNORE = -100  # the label of a token that is not trained


class InOrder(transformers.Trainer):  # type: ignore[misc,unused-ignore]
    """The Trainer without shuffling: it takes the rows in their order, as the other side does."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        rows: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(rows)


class Training:
    """LoRA training: a plain step of PyTorch, or an epoch of the Trainer."""

    def __init__(self, job: Job, model: Any, collate: Any) -> None:
        self.job, self.model, self.collate = job, model, collate
        self.rows = read_job_rows(job)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]
        self.optimizer = self.adamw()
        self.trainer: Any = None
        self.folder = tempfile.TemporaryDirectory()

    def adamw(self) -> Any:
        return torch.optim.AdamW(self.parameters, lr=self.job.learning_rate, weight_decay=0.0)

    def warm_up(self) -> None:
        self.step(self.rows if self.job.kind == "step" else sorted(self.rows, key=lambda row: len(row.tokens))[:2])

    def reset(self) -> None:
        """Restore the adapter and make a new Trainer, so that all epochs begin alike. Steps go on from each other."""
        if self.job.kind == "epoch":
            with torch.no_grad():
                for p, start in zip(self.parameters, self.start, strict=True):
                    p.copy_(start)
            self.optimizer = None
            self.trainer = self.make_trainer()

    def run(self) -> Figures:
        if self.job.kind == "step":
            losses = [self.step(self.rows)]
        else:
            self.trainer.train()
            losses = [line["loss"] for line in self.trainer.state.log_history if "loss" in line]
        wait(self.job)
        return {"losses": losses}

    def step(self, rows: Sequence[JobRow]) -> float:
        batch = {name: tensor.to(self.job.device) for name, tensor in self.collate(features(rows)).items()}
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def make_trainer(self) -> Any:
        """The Trainer with its ordinary collator, and the optimiser that the other side has.

        Rows are grouped by length here. The Trainer's own grouping sorts within 50 batches, and so hardly groups a few
        rows; sorting all rows gives the peer the advantage that it has on a large data set.
        """
        rows = sorted(self.rows, key=lambda row: -len(row.tokens)) if self.job.grouped else self.rows
        arguments = transformers.TrainingArguments(
            output_dir=self.folder.name,
            per_device_train_batch_size=self.job.batch_rows,
            num_train_epochs=1,
            learning_rate=self.job.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            use_cpu=self.job.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        return InOrder(model=self.model, args=arguments, train_dataset=features(rows), data_collator=self.collate)

    def judge(self) -> Figures:
        """After an epoch, the loss of its first step's rows."""
        if self.job.kind == "step":
            return {}
        batch = self.collate(features(steps_of(self.job, self.rows)[0]))
        with torch.no_grad():
            loss = self.model(**{name: t.to(self.job.device) for name, t in batch.items()}, use_cache=False).loss
        return {"final_loss": float(loss)}


class Generation:
    """`generate` of transformers: greedy, with its key/value cache."""

    def __init__(self, job: Job, model: Any) -> None:
        self.job, self.model = job, model.eval()
        self.model.generation_config.eos_token_id = None  # so that every row gets all of its tokens
        self.prompts = torch.tensor([row.tokens for row in read_job_rows(job)], device=job.device)

    def warm_up(self) -> None:
        self.generate(min(4, self.job.new_tokens))

    def reset(self) -> None:
        """Do nothing, because a run changes nothing."""

    def run(self) -> Figures:
        answers = self.generate(self.job.new_tokens)
        wait(self.job)
        return {"answers": answers}

    def generate(self, count: int) -> list[list[int]]:
        tokens = self.model.generate(
            input_ids=self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=PAD,
        )
        answers: list[list[int]] = tokens[:, self.prompts.shape[1] :].tolist()
        return answers

    def judge(self) -> Figures:
        return {}


def features(rows: Sequence[JobRow]) -> list[dict[str, list[int]]]:
    """Rows as the Trainer takes them: the labels are the tokens, −100 on the prompt; the model shifts them."""
    return [
        {"input_ids": row.tokens, "labels": [IGNORE] * row.prompt + row.tokens[row.prompt :]}
        for row in rows
    ]  # fmt: skip


def load(job: Job) -> Work:
    """The model as `from_pretrained` gives it (attention and all), in the job's dtype; the adapter in float32."""
    torch.set_num_threads(job.threads)
    folder = Path(job.model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job.dtype))
    model.to(job.device)
    if job.kind == "generate":
        return Generation(job, model)
    model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    model.train()
    if job.compiled:
        model = torch.compile(model)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    return Training(job, model, transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE))


def wait(job: Job) -> None:
    """Wait until the GPU has finished."""
    if job.device == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most memory held: by PyTorch's pool on the GPU if one is in use, else by the process."""
    gpu: Any = torch.cuda
    if gpu.is_available() and gpu.is_initialized():
        return int(gpu.max_memory_reserved())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


if __name__ == "__main__":
    serve(load, peak_bytes)
