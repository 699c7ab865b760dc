"""The training loop. It knows a model, what trains in it, and rows of examples; not which method made the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from minilora.backend import fill, to_host
from minilora.data.batches import Batch, Rows, batches_of, count_labels
from minilora.model.model import Model
from minilora.training.optimizers import clip_gradients, global_norm
from minilora.training.parts import on_all_cores
from minilora.training.schedules import learning_rate
from minilora.training.state import State
from minilora.training.step import loss_and_gradients, mean_loss


@dataclass(frozen=True)
class Plan:
    """The loop's settings. 0 means never for fields ending in `_every`, and no limit for patience."""

    steps: int
    batch_size: int = 8
    grad_accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: int = 0
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    eval_every: int = 0
    patience: int = 0
    save_every: int = 0


class Diverged(ArithmeticError):
    """The loss or its gradient is no longer a finite number; `at_start`, it never was."""

    def __init__(self, message: str, at_start: bool = False) -> None:
        super().__init__(message)
        self.at_start = at_start


def train(
    model: Model,
    state: State,
    rows: Rows,
    valid: Sequence[Batch],
    plan: Plan,
    pad_id: int,
    record: Callable[..., None],
    save: Callable[[State], None],
    stop: Callable[[], int] = lambda: 0,
) -> None:
    """Train until `plan.steps` steps are done or validation stops improving; then `state` holds the outcome.

    As soon as `stop` gives the number of a signal, the state after the step under way is saved, and KeyboardInterrupt
    raised with that number.

    With validation, the parameters end as they were at the lowest validation loss. `record` gets the figures of each
    step and validation by name, `save` a state that is good to go on from. Raises Diverged before a state would be
    saved whose loss is not finite.
    """
    bar = tqdm(total=plan.steps, initial=state.step, desc="training", unit="step", dynamic_ncols=True)
    started = time.perf_counter() - state.seconds

    def save_if_finite(batches: list[Batch]) -> None:
        loss = mean_loss(model, batches) if batches else 0.0  # of the very parameters to be saved
        if not math.isfinite(loss):
            raise Diverged(_stopped(state, loss, math.nan))
        state.seconds = time.perf_counter() - started
        save(state)

    try:
        batches: list[Batch] = []
        if state.step == 0:
            save_if_finite(batches)
        while state.step < plan.steps and not _out_of_patience(state, plan) and not stop():
            step_started = time.perf_counter()
            batches = next_batches(state, rows, plan, pad_id)
            loss, norm, rate = take_step(model, state, batches, plan)
            tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
            state.tokens += tokens
            speed = tokens / (time.perf_counter() - step_started)
            record(
                step=state.step,
                epoch=state.order.epoch,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                **({"loss_scale": state.loss_scale.value} if state.loss_scale.value > 1 else {}),
                tokens=tokens,
                labelled_tokens=sum(count_labels(batch) for batch in batches),
                tokens_per_second=round(speed, 1),
            )
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {speed:,.0f} tokens/s", refresh=False)
            if valid and plan.eval_every and (state.step % plan.eval_every == 0 or state.step == plan.steps):
                valid_loss = mean_loss(model, valid)
                record(step=state.step, valid_loss=valid_loss)
                bar.write(f"step {state.step}: validation loss {valid_loss:.4f}")
                _remember_best(state, valid_loss)
            if plan.save_every and state.step % plan.save_every == 0:
                save_if_finite(batches)
        save_if_finite(batches)
    finally:
        bar.close()
    if signal := stop():
        raise KeyboardInterrupt(signal)
    for name, array in state.best.items():
        fill(state.trainable[name], array)


def take_step(model: Model, state: State, batches: list[Batch], plan: Plan) -> tuple[float, float, float]:
    """One step of the optimiser; the loss, the norm of its gradient before clipping, and the learning rate.

    Raises Diverged, with all parameters as they were, if the loss or the norm is not finite.
    """
    first_seed = int(state.rng.integers(2**62))  # one draw for each step, whatever its number of micro-batches
    seeds = range(first_seed, first_seed + len(batches))
    compute = state.loss_scale.loss_and_gradients if state.loss_scale.value > 1 else loss_and_gradients
    loss, gradients = compute(model, batches, seeds, plan.activation_checkpointing, on_all_cores)
    gradients = state.flat.gathered(gradients)
    norm = global_norm(gradients)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(_stopped(state, loss, norm), at_start=state.step == 0 and not math.isfinite(loss))
    clip_gradients(gradients, norm, plan.max_grad_norm)
    rate = learning_rate(state.step, plan.steps, plan.learning_rate, plan.schedule, plan.warmup)
    state.optimizer.update(state.flat.parts, gradients, rate)
    state.step += 1
    return loss, norm, rate


def next_batches(state: State, rows: Rows, plan: Plan, pad_id: int) -> list[Batch]:
    """The micro-batches of one step. Rows of like length go together, so that little of a batch is padding."""
    chosen = [rows[i] for i in state.order.take(plan.batch_size * plan.grad_accumulation, state.rng)]
    return batches_of(chosen, plan.batch_size, pad_id)


def steps_per_epoch(rows: Rows, batch_size: int, grad_accumulation: int) -> int:
    """The last step of an epoch may be a smaller one; it counts."""
    return math.ceil(len(rows) / (batch_size * grad_accumulation))


def _remember_best(state: State, valid_loss: float) -> None:
    if valid_loss < state.best_loss:
        state.best_loss, state.best_step, state.evaluations_without_gain = valid_loss, state.step, 0
        state.best = {name: to_host(p).copy() for name, p in state.trainable.items()}
    else:
        state.evaluations_without_gain += 1


def _out_of_patience(state: State, plan: Plan) -> bool:
    return plan.patience > 0 and state.evaluations_without_gain >= plan.patience


def _stopped(state: State, loss: float, norm: float) -> str:
    return (
        f"step {state.step + 1}: the loss is {loss} and the gradient's norm {norm}. Training stopped; the run folder "
        "keeps the last good state."
    )
