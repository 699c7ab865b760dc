"""One run from settings to summary: load, attach the method, train, and judge before and after."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.backend import cores, peak_memory_bytes, to_host
from minilora.data.batches import Batch
from minilora.data.tokenizer import Tokenizer, save_tokenizer_files, tokenizer_files_to_copy
from minilora.formats.adapters import check_format, read_method, write_method
from minilora.formats.checkpoint import write_checkpoint
from minilora.formats.fingerprint import fingerprint
from minilora.formats.hub import Source, find_adapter, find_model
from minilora.formats.load import load_model
from minilora.methods.method import Method
from minilora.model.config import Config
from minilora.model.model import LOGITS_AT_ONCE, Model
from minilora.model.names import parameter_count
from minilora.runs.advice import advise, after_divergence, not_finite_at_start
from minilora.runs.evaluation import (
    AT_THE_SAME_TIME,
    LENGTH,
    TEXTS,
    answers,
    can_be_matched,
    drift,
    exact_match,
    outside_text,
)  # fmt: skip
from minilora.runs.folder import train_in
from minilora.runs.metrics import read_metrics
from minilora.runs.settings import Settings
from minilora.runs.stopping import stopping
from minilora.runs.task import Task, load_task
from minilora.training.flat import flatten
from minilora.training.loop import Diverged, Plan, steps_per_epoch
from minilora.training.loss_scale import FIRST
from minilora.training.message import checksum
from minilora.training.optimizers import OPTIMIZERS
from minilora.training.order import Order
from minilora.training.ranks import world
from minilora.training.schedules import warmup_steps
from minilora.training.state import State
from minilora.training.step import mean_loss

MOST_ANSWERS_AT_ONCE = 64


@dataclass(frozen=True)
class Run:
    """The parts of a run. `adapted` shares the arrays of `state.trainable`: training changes it, never `base`."""

    settings: Settings
    source: Source  # the base model's folder, hub id and revision
    folder: Path
    plan: Plan
    task: Task
    tokenizer: Tokenizer
    raw_config: dict[str, Any]
    method: Method
    base: Model
    adapted: Model
    state: State


@dataclass(frozen=True)
class Judgement:
    """A model's figures on the held-out part. The exact match is None if rows have no single right answer."""

    loss: float
    exact_match: float | None
    answers: list[str]


def prepare(settings: Settings, folder: Path) -> Run:
    """Do everything up to the first step. ValueError or OSError for mistakes that the user can mend."""
    source = find_model(settings.model, settings.revision)
    # The revision and the day are pinned, so that --resume uses the same ones.
    day = settings.date or date.today().isoformat()
    settings = replace(settings, model=source.hub_id or settings.model, revision=source.revision, date=day)
    model_folder = source.folder
    base, raw_config = load_model(model_folder, settings.dtype, settings.frozen, settings.mixed_precision)
    tokenizer = Tokenizer.load(model_folder, datetime.fromisoformat(settings.date)).fitting(base.config.vocab_size)

    if not settings.method.freezes_base:
        tokenizer_files_to_copy(model_folder)  # the outcome is a whole model; a link out of the folder is an error now

    rng = np.random.default_rng(settings.seed)
    if settings.adapter:
        start = find_adapter(settings.adapter)
        settings = replace(settings, adapter=start.name)
        method, trainable = read_method(start.folder, base, settings.dtype)
    else:
        method = settings.method.for_model(base.config, tokenizer.encode)
        trainable = method.start(base, rng, settings.dtype)
    rule = OPTIMIZERS[settings.optimizer]
    flat, factors = flatten(trainable, rule, settings.method.rate_factors(trainable))
    adapted = method.attach(base, flat.arrays)
    check_format(settings.format, method, base.config)
    check_tied(settings, base.config, adapted.config)
    task = load_task(settings, tokenizer, settings.max_length or default_max_length(adapted))

    optimizer = rule(flat.parts, settings.weight_decay, factors)
    made_from = {**task.digests, "base model": fingerprint(model_folder), "settings": settings.decisive()}
    state = State(flat, optimizer, Order(len(task.rows)), rng, made_from, cores=cores())
    if settings.mixed_precision == "fp16":
        state.loss_scale.value = FIRST
    return Run(
        settings, source, folder, make_plan(settings, task), task, tokenizer, raw_config, method, base, adapted, state
    )


def check_tied(settings: Settings, base: Config, adapted: Config) -> None:
    """ValueError if the method would untie the embedding and the head of the model without being asked to."""
    if base.tie_word_embeddings and not (adapted.tie_word_embeddings or settings.untie or settings.adapter):
        raise ValueError(
            "embedding and head of this model are one matrix, and this method trains one of them: say --untie to make "
            "them two (merged, the model grows by that matrix), or choose other modules"
        )


def default_max_length(model: Model) -> int:
    """The default of `--max-length`: the model's context length less the virtual tokens, but at most 1024."""
    return min(model.config.max_position_embeddings - model.virtual_tokens, 1024)


def make_plan(settings: Settings, task: Task) -> Plan:
    """The plan of training, in which steps replace epochs, shares and defaults."""
    an_epoch = steps_per_epoch(task.rows, settings.batch_size, settings.grad_accumulation)
    steps = settings.steps or math.ceil(settings.epochs * an_epoch)
    return Plan(
        steps=steps,
        batch_size=settings.batch_size,
        grad_accumulation=settings.grad_accumulation,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=warmup_steps(settings.warmup, steps),
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.activation_checkpointing,
        eval_every=settings.eval_every or max(1, math.ceil(steps / 10)),
        patience=settings.patience,
        save_every=settings.save_every,
    )


def train_run(run: Run) -> None:
    """Train, and write the outcome into the run folder. Raises Diverged, with advice, and keeps the last good state."""

    def on_save(state: State) -> None:
        if run.method.freezes_base:  # adapters are small, so the folder always holds a usable one
            write_outcome(run, state.best or {name: to_host(p) for name, p in state.trainable.items()})

    task, pad_id = run.task, run.tokenizer.pad_id
    try:
        report_to = run.settings.report_to
        with stopping() as stop:
            data = task.rows, task.valid
            train_in(run.folder, run.adapted, run.state, *data, run.plan, pad_id, on_save, report_to, stop)
    except Diverged as error:
        advice = (
            not_finite_at_start(run.settings) if error.at_start else after_divergence(run.settings, run.plan.warmup)
        )
        raise Diverged(f"{error} {advice}") from error
    if world().is_first:
        write_outcome(run, {name: to_host(p) for name, p in run.state.trainable.items()})


def write_outcome(run: Run, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write the adapter in the chosen format, or after full fine-tuning a whole checkpoint."""
    if not run.method.freezes_base:
        save_tokenizer_files(run.source.folder, run.folder)  # first: weights that are there belong to a whole model
        write_checkpoint(run.folder, run.raw_config, tensors)
    else:
        method, tensors = run.method.saved_form(run.adapted, tensors)
        source = run.settings.model, run.source.revision or None
        write_method(run.folder, method, tensors, run.base.config, *source, run.settings.format)


def judge(run: Run, model: Model) -> Judgement:
    """The held-out loss and, if rows have one right answer, the share that greedy generation gets right."""
    rows = run.task.held_out_rows[: run.settings.eval_rows]
    loss = mean_loss(model, run.task.held_out) if run.task.held_out else math.nan
    if not can_be_matched(rows):
        return Judgement(loss, None, [])
    with tqdm(total=len(rows), desc="answering", unit="row", dynamic_ncols=True, leave=False) as bar:
        at_once = min(MOST_ANSWERS_AT_ONCE, logits_at_once(run))
        texts = answers(model, run.tokenizer, rows, at_once, on_batch=bar.update)
    return Judgement(loss, exact_match(texts, rows), texts)


def logits_at_once(run: Run) -> int:
    """The rows of logits (each V wide) that a training step holds at once, as a mean: judging shall take no more."""
    return min(LOGITS_AT_ONCE, max(1, _in_a_micro_batch(run, "labels")))


def other_text(run: Run) -> list[Batch]:
    """The text outside the task to measure the drift on: no more of it at once than a micro-batch has, and in all no
    more tokens than training has read, so that the drift never outlasts training. Both are counts, not times: the
    figure is the same on any machine.
    """
    texts = min(TEXTS, max(1, run.state.tokens // LENGTH))
    return outside_text(run.tokenizer, texts, at_once=max(1, _in_a_micro_batch(run, "tokens") // LENGTH))


def _in_a_micro_batch(run: Run, what: str) -> int:
    """The mean number of tokens, or of labels, in a micro-batch."""
    rows = len(run.task.rows)
    return int(run.task.figures["train"][what] * min(run.settings.batch_size, rows) // rows)


def check_ranks(run: Run, device: str) -> None:
    """ValueError on every rank unless all ranks are about to make the same run."""
    held_out = checksum(array.tobytes() for batch in run.task.held_out for array in batch)
    found_here = {"held-out data": held_out, "device": device, "number of threads": run.state.cores}
    world().check_agreement({**run.state.made_from, **found_here})


def summarize(run: Run, before: Judgement, after: Judgement, started: float) -> dict[str, Any]:
    """The figures of `summary.json`. Losses are in nats per labelled token, the drift in nats per token."""
    text = other_text(run)
    return {
        "base_fingerprint": run.state.made_from["base model"],
        "base_loss": before.loss,
        "adapted_loss": after.loss,
        "base_exact_match": before.exact_match,
        "adapted_exact_match": after.exact_match,
        "drift_kl": drift(run.base, run.adapted, text, max(1, logits_at_once(run) // AT_THE_SAME_TIME)),
        "drift_tokens": sum(int(np.count_nonzero(batch.segments)) for batch in text),
        "data": run.task.figures,
        "trainable_parameters": sum(p.size for p in run.state.trainable.values()),
        "total_parameters": parameter_count(run.base.config),
        "steps": run.state.step,
        "best_step": run.state.best_step,
        "best_valid_loss": run.state.best_loss if run.state.best else None,
        "tokens": run.state.tokens,
        "tokens_per_second": round(run.state.tokens / run.state.seconds, 1),
        "training_seconds": round(run.state.seconds, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "advice": advise(read_metrics(run.folder), run.settings, before.loss, after.loss),
    }
