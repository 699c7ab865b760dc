"""Advice at the end of a run, or when it has to stop: sentences made from the figures of the run.

The constants below are the only thresholds. Single batches are noisy, so the training loss is always a mean over a
tenth of the run. Held-out losses are measured on the same rows each time, and are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minilora.methods.setting import settings_of, values_of
from minilora.methods.targets import ALL_LINEAR
from minilora.runs.settings import Settings

LEAST_STEPS = 20  # a shorter run is a trial and gets no advice
SMALL = 0.05  # nats per token: a smaller loss is low enough, and a smaller rise does no harm
FLAT = 0.02  # the loss is flat if neither the training nor the held-out loss surely fell by more than this share
DOUBT = 0.05  # if nothing is held out, it is flat if the training loss surely fell by less than this share
RISE = 0.25  # training goes wrong if its loss ends above its lowest by more than this share of the lowest …
NOISE = 4  # … and by more than this many standard errors of the difference; a fall is sure from half as many on
GAP = 0.05  # a run overfits if its validation loss ends above its lowest by more than this share, and training fell


class Span(NamedTuple):
    """The training loss over a tenth of the run, in nats per labelled token."""

    steps: range
    mean: float
    error: float  # the standard error of the mean

    @property
    def in_words(self) -> str:
        return f"{self.mean:.3g} in steps {self.steps.start} to {self.steps.stop - 1}"


def advise(
    lines: Sequence[dict[str, Any]], settings: Settings, base_loss: float = math.nan, adapted_loss: float = math.nan
) -> list[str]:
    """Advice after a run, in sentences, from the lines of metrics.jsonl; none if all went well.

    base_loss and adapted_loss are the held-out losses before and after training, or NaN if nothing is held out.
    """
    spans = _spans(lines)
    if not spans:
        return []
    sentences = (_rose(spans, settings), _flat(spans, settings, base_loss, adapted_loss), _gap(lines, spans, settings))
    return [sentence for sentence in sentences if sentence]


def after_divergence(settings: Settings, warmup: int) -> str:
    """Advice for a loss that is no longer a number; `warmup` is in steps."""
    wider = "--mixed-precision bf16, whose range is float32's; " if settings.mixed_precision == "fp16" else ""
    return f"What usually helps, in this order: {wider}{_calmer(settings, warmup)}."


def not_finite_at_start(settings: Settings) -> str:
    """Advice for a loss that was no number before the first step was taken: no rate could have helped."""
    given = f"{settings.model} and {settings.adapter}" if settings.adapter else settings.model
    ways = [
        *(["--mixed-precision bf16, whose range is float32's"] if settings.mixed_precision == "fp16" else []),
        f"another copy of {given}: `python -m minilora.evaluate` should give it a loss",
        *(["--dtype float64"] if settings.dtype == "float32" and settings.mixed_precision == "no" else []),
    ]
    return (
        "No step had been taken, so it is not the learning rate: the numbers of the model overflow. What usually "
        f"helps, in this order: {'; '.join(ways)}."
    )


def out_of_memory(settings: Settings, longest: int) -> str:
    """Advice for too little memory; `longest` is the length of the longest row, in tokens."""
    ways = []
    if settings.batch_size > 1:
        half, twice = settings.batch_size // 2, settings.grad_accumulation * 2
        ways.append(
            f"--batch-size {half} with --grad-accumulation {twice}, the same training (now {settings.batch_size} and "
            f"{settings.grad_accumulation})"
        )
    if not settings.activation_checkpointing:
        ways.append("--activation-checkpointing")
    ways.append(f"a --max-length below that of your longest row, {longest} tokens, which leaves such rows out")
    if settings.method.freezes_base:
        mapped = "--frozen mapped, weights left in their file"
        ways += {
            "widened": ["--frozen stored, bfloat16 weights as they are", "--frozen nf4, 4 bits a weight", mapped],
            "stored": ["--frozen nf4, 4 bits a weight (now stored)", mapped],
            "offloaded": ["--frozen nf4, 4 bits a weight (now offloaded)", mapped],
        }.get("stored" if settings.mixed_precision != "no" and settings.frozen == "widened" else settings.frozen, [])
    return (
        f"out of memory. What usually helps, in this order: {'; '.join(ways)}. With the same flags, "
        "`python -m minilora.plan` counts what a run takes before it begins"
    )


def _spans(lines: Sequence[dict[str, Any]]) -> list[Span]:
    """Every tenth of the run: a window that slides along it step by step. Empty for a short run."""
    steps, losses = [], []
    for line in lines:
        if line.get("loss") is not None:
            steps.append(line["step"])
            losses.append(line["loss"])
    if len(losses) < LEAST_STEPS:
        return []
    size = max(5, len(losses) // 10)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(losses), size)
    means, errors = windows.mean(axis=1), windows.std(axis=1, ddof=1) / math.sqrt(size)
    return [
        Span(range(steps[i], steps[i + size - 1] + 1), float(means[i]), float(errors[i])) for i in range(len(windows))
    ]


def _rose(spans: Sequence[Span], settings: Settings) -> str:
    last, lowest = spans[-1], min(spans, key=lambda span: span.mean)
    noise = NOISE * math.hypot(last.error, lowest.error)
    if last.mean - lowest.mean <= max(SMALL, RISE * lowest.mean, noise):
        return ""
    return (
        f"The training loss rose: {lowest.in_words}, {last.in_words}. It was close to diverging. What usually "
        f"helps, in this order: {_calmer(settings)}."
    )


def _flat(spans: Sequence[Span], settings: Settings, base_loss: float, adapted_loss: float) -> str:
    first, last = spans[0], spans[-1]
    fall, noise = first.mean - last.mean, NOISE / 2 * math.hypot(first.error, last.error)
    if math.isfinite(base_loss):
        fell = fall > max(FLAT * first.mean, noise) or base_loss - adapted_loss > FLAT * base_loss
    else:
        fell = fall + noise > DOUBT * first.mean
    rose = -fall > RISE * first.mean  # `_rose` reports it
    if fell or rose or last.mean < SMALL:
        return ""
    held_out = f"; held out {base_loss:.3g} before, {adapted_loss:.3g} after" if math.isfinite(base_loss) else ""
    ways = [
        f"a higher --learning-rate (now {settings.learning_rate:g}), three to ten times",
        *_more(settings),
        f"more steps (now {last.steps.stop - 1})",
    ]
    return (
        f"The training loss hardly fell: {first.in_words}, {last.in_words}{held_out}. What usually helps, in this "
        f"order: {'; '.join(ways)}. With --show-batch you see what is trained."
    )


def _gap(lines: Sequence[dict[str, Any]], spans: Sequence[Span], settings: Settings) -> str:
    valid = [(line["valid_loss"], line["step"]) for line in lines if line.get("valid_loss") is not None]
    if not valid:
        return ""
    (lowest, best_step), (end, end_step) = min(valid), valid[-1]
    if end - lowest <= max(SMALL, GAP * lowest):
        return ""
    at_best, last = min(spans, key=lambda span: abs(span.steps.stop - 1 - best_step)), spans[-1]
    if last.mean >= at_best.mean:
        return ""
    ways = [
        "more rows, or more varied ones",
        f"stopping early: --patience 2 (now {settings.patience or 'never'}), or --steps {best_step}",
        *_less(settings),
    ]
    return (
        f"Overfitting: the validation loss was lowest, {lowest:.3g}, at step {best_step} and rose to {end:.3g} at step "
        f"{end_step}, while the training loss went from {at_best.mean:.3g} to {last.mean:.3g}. The weights of step "
        f"{best_step} were kept. What usually helps: {'; '.join(ways)}."
    )


def _calmer(settings: Settings, warmup: float | None = None) -> str:
    """Ways to make smaller steps, with the current settings."""
    ways = [
        f"a lower --learning-rate (now {settings.learning_rate:g})",
        f"a longer --warmup (now {settings.warmup if warmup is None else f'{warmup} steps'})",
    ]
    if not 0 < settings.max_grad_norm <= 1:
        ways.append(f"--max-grad-norm 1 (now {settings.max_grad_norm:g})")
    chosen = _chosen(settings)
    if "alpha" in chosen:
        ways += [f"a lower --alpha (now {chosen['alpha']:g})", *_capacity(settings, "lower")]
    return "; ".join(ways)


def _more(settings: Settings) -> list[str]:
    """Ways to train more parameters."""
    targets = " ".join(_chosen(settings).get("target_modules", [ALL_LINEAR]))
    more = [] if targets == ALL_LINEAR else [f"more --target-modules (now {targets})"]
    return [*more, *_capacity(settings, "higher")]


def _less(settings: Settings) -> list[str]:
    """Ways to learn less of each row by heart."""
    dropout = _chosen(settings).get("dropout", 1)
    return [*([f"--dropout 0.1 (now {dropout:g})"] if dropout < 0.1 else []), *_capacity(settings, "lower")]


def _capacity(settings: Settings, direction: str) -> list[str]:
    """The flags that set how many parameters the method trains, and their values, if they can go in `direction`."""
    declared, chosen = settings_of(type(settings.method)), _chosen(settings)
    flags = {name: known.flag for name, known in declared.items() if known.declaration.capacity and name in chosen}
    return [
        f"a {direction} {flag} (now {chosen[name]:g})"
        for name, flag in flags.items()
        if direction == "higher" or chosen[name] > declared[name].declaration.at_least
    ]


def _chosen(settings: Settings) -> dict[str, Any]:
    """The method's settings; empty if training starts from an adapter, which has settings of its own."""
    return {} if settings.adapter else values_of(settings.method)
