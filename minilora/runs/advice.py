"""Advice where it is needed: sentences made of this run's own figures, for its end and for when it has to stop.

What is said when stands in the constants below, and nowhere else. Single batches are noisy, so the training loss is
always a mean over a tenth of the run; held-out losses are of the same rows each time and are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minilora.methods.setting import settings_of, values_of
from minilora.methods.targets import ALL_LINEAR
from minilora.runs.settings import Settings

LEAST_STEPS = 20  # a shorter run is a trial, of which nothing is said
SMALL = 0.05  # nats per token: a smaller loss has nothing left to fall, and a smaller rise is no harm
FLAT = 0.02  # the loss is flat if neither in training nor held out it surely fell by more than this share of itself
DOUBT = 0.05  # … or, where nothing is held out, if in training it surely fell by less than this share
RISE = 0.25  # training goes wrong if its loss ends higher above its lowest than this share of it …
NOISE = 4  # … and than so many standard errors of the difference; for a fall, half as many are "surely"
GAP = 0.05  # overfitting: the validation loss ends higher above its lowest than this share, and training fell meanwhile


class Span(NamedTuple):
    """The training loss over a tenth of the run, in nats per labelled token."""

    steps: range
    mean: float
    error: float  # the standard error of the mean

    @property
    def told(self) -> str:
        return f"{self.mean:.3g} in steps {self.steps.start} to {self.steps.stop - 1}"


def advise(
    lines: Sequence[dict[str, Any]], settings: Settings, base_loss: float = math.nan, adapted_loss: float = math.nan
) -> list[str]:
    """Advice after a run, in sentences drawn from metrics.jsonl; none if all went well.

    base_loss and adapted_loss are held out, before and after; NaN where nothing is.
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
        ways += {
            "widened": ["--frozen stored, bfloat16 weights as they are", "--frozen nf4, 4 bits a weight"],
            "stored": ["--frozen nf4, 4 bits a weight (now stored)"],
            "offloaded": ["--frozen nf4, 4 bits a weight (now offloaded)"],
        }.get("stored" if settings.mixed_precision != "no" and settings.frozen == "widened" else settings.frozen, [])
    return (
        f"out of memory. What usually helps, in this order: {'; '.join(ways)}. With the same flags, "
        "`python -m minilora.plan` counts what a run takes before it begins"
    )


def _spans(lines: Sequence[dict[str, Any]]) -> list[Span]:
    """Every tenth of the run, step by step along it; none for a short run."""
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
        f"The training loss rose: {lowest.told}, {last.told}. It was close to diverging. What usually helps, in this "
        f"order: {_calmer(settings)}."
    )


def _flat(spans: Sequence[Span], settings: Settings, base_loss: float, adapted_loss: float) -> str:
    first, last = spans[0], spans[-1]
    fall, noise = first.mean - last.mean, NOISE / 2 * math.hypot(first.error, last.error)
    if math.isfinite(base_loss):
        fell = fall > max(FLAT * first.mean, noise) or base_loss - adapted_loss > FLAT * base_loss
    else:
        fell = fall + noise > DOUBT * first.mean
    rose = -fall > RISE * first.mean  # another matter
    if fell or rose or last.mean < SMALL:
        return ""
    held_out = f"; held out {base_loss:.3g} before, {adapted_loss:.3g} after" if math.isfinite(base_loss) else ""
    ways = [
        f"a higher --learning-rate (now {settings.learning_rate:g}), three to ten times",
        *_more(settings),
        f"more steps (now {last.steps.stop - 1})",
    ]
    return (
        f"The training loss hardly fell: {first.told}, {last.told}{held_out}. What usually helps, in this order: "
        f"{'; '.join(ways)}. With --show-batch you see what is trained."
    )


def _gap(lines: Sequence[dict[str, Any]], spans: Sequence[Span], settings: Settings) -> str:
    valid = [(line["valid_loss"], line["step"]) for line in lines if line.get("valid_loss") is not None]
    if not valid:
        return ""
    (lowest, best_step), (end, end_step) = min(valid), valid[-1]
    if end - lowest <= max(SMALL, GAP * lowest):
        return ""
    then, now = min(spans, key=lambda span: abs(span.steps.stop - 1 - best_step)), spans[-1]  # that ends at best_step
    if now.mean >= then.mean:
        return ""
    ways = [
        "more rows, or more varied ones",
        f"stopping early: --patience 2 (now {settings.patience or 'never'}), or --steps {best_step}",
        *_less(settings),
    ]
    return (
        f"Overfitting: the validation loss was lowest, {lowest:.3g}, at step {best_step} and rose to {end:.3g} at step "
        f"{end_step}, while the training loss went from {then.mean:.3g} to {now.mean:.3g}. What was kept is step "
        f"{best_step}. What usually helps: {'; '.join(ways)}."
    )


def _calmer(settings: Settings, warmup: float | None = None) -> str:
    """Ways to smaller steps, with the settings as they are."""
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
    """Ways to train more numbers."""
    targets = " ".join(_chosen(settings).get("target_modules", [ALL_LINEAR]))
    more = [] if targets == ALL_LINEAR else [f"more --target-modules (now {targets})"]
    return [*more, *_capacity(settings, "higher")]


def _less(settings: Settings) -> list[str]:
    """Ways to learn less of each row by heart."""
    dropout = _chosen(settings).get("dropout", 1)
    return [*([f"--dropout 0.1 (now {dropout:g})"] if dropout < 0.1 else []), *_capacity(settings, "lower")]


def _capacity(settings: Settings, direction: str) -> list[str]:
    """The flags that set how many numbers the method trains, and their values; those that can go that way."""
    declared, chosen = settings_of(type(settings.method)), _chosen(settings)
    flags = {name: one.flag for name, one in declared.items() if one.declaration.capacity and name in chosen}
    return [
        f"a {direction} {flag} (now {chosen[name]:g})"
        for name, flag in flags.items()
        if direction == "higher" or chosen[name] > declared[name].declaration.at_least
    ]


def _chosen(settings: Settings) -> dict[str, Any]:
    """The method's settings; none where training takes up an adapter, which has its own."""
    return {} if settings.adapter else values_of(settings.method)
