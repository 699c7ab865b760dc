"""A run that went wrong says so at its end, with its own figures, and what to change; one that went well is silent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import CONFIG, PAIRS, TEXTS, assert_refused, good, read, run, write_rows
from support.strategies import seeds

from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.methods.lora import LoRA
from minilora.methods.method import known_methods
from minilora.methods.setting import settings_of
from minilora.model.config import Config
from minilora.runs.advice import LEAST_STEPS, advise, after_divergence, out_of_memory
from minilora.runs.settings import DEFAULT_JOB, Settings, all_settings
from minilora.training import loop

DEFAULT = Settings(**DEFAULT_JOB)
levels, lengths = st.floats(0.2, 10), st.integers(LEAST_STEPS, 300)


def settings_of_any_method(method: str, **values: Any) -> Settings:
    """The settings with those of the values that the method has."""
    cls = known_methods()[method]
    own = {name: values.pop(name) for name in settings_of(cls) if name in values}
    run = settings_of(Settings)
    return Settings(cls(**cls.names[method] | own), **{name: value for name, value in values.items() if name in run})


METHODS = [name for name in known_methods() if name != "qlora"]
every_settings = st.builds(
    settings_of_any_method,
    method=st.sampled_from(["lora", "dora"]) | st.sampled_from(METHODS),
    adapter=st.sampled_from(["", "", "runs/rows-1"]),
    rank=st.integers(2, 64),
    alpha=st.floats(1, 64),
    dropout=st.sampled_from([0.0, 0.05, 0.3]),
    target_modules=st.sampled_from([("all-linear",), ("q_proj", "v_proj")]),
    batch_size=st.integers(1, 64),
    grad_accumulation=st.integers(1, 8),
    activation_checkpointing=st.booleans(),
    max_grad_norm=st.sampled_from([0.0, 1.0, 5.0]),
    patience=st.integers(0, 3),
    learning_rate=st.floats(1e-7, 1),
    frozen=st.sampled_from(all_settings()["frozen"].declaration.choices),
)


def lines(train: Sequence[float], valid: Mapping[int, float] | None = None) -> list[dict[str, Any]]:
    """As `metrics.jsonl` has them; a loss that is no number is null there."""
    steps = [{"step": i, "loss": float(x) if math.isfinite(x) else None} for i, x in enumerate(train, start=1)]
    return steps + [{"step": step, "valid_loss": loss} for step, loss in (valid or {}).items()]


def noise(seed: int, count: int, size: float) -> np.ndarray:
    """Factors around 1, as single batches differ."""
    return np.exp(size * np.random.default_rng(seed).normal(size=count))


def falling(count: int, start: float = 4.0, end: float = 0.5) -> np.ndarray:
    return np.geomspace(start, end, count)


OVERFIT = lines(falling(50, 3, 0.1), {10: 2.0, 20: 1.5, 30: 1.75, 40: 2.0, 50: 2.25})
FLAT, ROSE = lines([2.0] * 50), lines([*falling(25), *falling(25)[::-1]])


# --- What is said when ---


@given(seed=seeds, count=lengths, start=levels, fall=st.floats(2, 100), size=st.floats(0, 0.2), held_out=st.booleans())
def test_a_loss_that_falls_is_advised_nothing(
    seed: int, count: int, start: float, fall: float, size: float, held_out: bool
) -> None:
    train = falling(count, start, start / fall) * noise(seed, count, size)
    valid = {step: start / fall * (1 + 1 / step) for step in range(5, count, 5)}
    losses = (start, start / fall) if held_out else (math.nan, math.nan)
    assert advise(lines(train, valid), DEFAULT, *losses) == []


@given(seed=seeds, count=lengths, level=levels)
def test_a_loss_that_stays_where_it_was_is_told_with_its_figures(seed: int, count: int, level: float) -> None:
    settings = replace(DEFAULT, learning_rate=1e-7, method=LoRA(rank=4))
    (said,) = advise(lines(level * noise(seed, count, 0.005)), settings, level, 0.99 * level)
    assert "hardly fell" in said and f"held out {level:.3g} before, {0.99 * level:.3g} after" in said
    assert "a higher --learning-rate (now 1e-07)" in said and "a higher --rank (now 4)" in said
    assert f"more steps (now {count})" in said


def test_the_figures_are_means_of_the_first_and_last_tenth() -> None:
    (said,) = advise(lines([1.0] * 5 + [1.5] * 40 + [0.995] * 5), DEFAULT)
    assert "1 in steps 1 to 5, 0.995 in steps 46 to 50" in said


def test_a_loss_that_falls_held_out_or_that_has_nothing_left_to_fall_is_not_flat() -> None:
    assert advise(FLAT, DEFAULT, 2.0, 1.95) == []
    assert advise(lines([0.04] * 50), DEFAULT) == []
    assert len(advise(FLAT, DEFAULT, 2.0, 1.97)) == len(advise(FLAT, DEFAULT)) == 1


@pytest.mark.parametrize(("fall", "told"), [(0.1, True), (0.2, False)])
def test_a_fall_in_training_counts_if_it_is_more_than_noise(fall: float, told: bool) -> None:
    batches = 0.1 * np.array([-1, 1, -1, 1, 0])  # whose mean has the standard error 0.1/√5
    train = 2 + np.concatenate([batches, np.zeros(40), batches - fall])
    assert bool(advise(lines(train), DEFAULT, 2.0, 2.0)) == told


@given(seed=seeds, count=lengths)
def test_where_noise_hides_what_happened_and_nothing_is_held_out_nothing_is_said(seed: int, count: int) -> None:
    wild = np.where(np.random.default_rng(seed).permutation(count) % 2, 0.5, 3.0)
    assert advise(lines(wild), DEFAULT) == []


@given(seed=seeds, count=st.integers(40, 300), start=levels, factor=st.floats(2, 5), size=st.floats(0, 0.05))
def test_a_loss_that_ends_far_above_its_lowest_is_told_as_nearly_diverging(
    seed: int, count: int, start: float, factor: float, size: float
) -> None:
    half = count // 2
    path = [*falling(half, start, start / factor), *falling(count - half, start / factor, start * factor)]
    said = advise(lines(path * noise(seed, count, size)), DEFAULT)
    assert len(said) == 1 and "The training loss rose" in said[0]
    assert "a lower --learning-rate (now 0.005)" in said[0] and "a longer --warmup (now 0.03)" in said[0]


@given(best=st.integers(2, 7), level=levels, rise=st.floats(1.3, 5))
def test_validation_that_rises_while_training_falls_is_told_as_overfitting(
    best: int, level: float, rise: float
) -> None:
    valid = {5 * i: level * (1 + abs(i - best) * (rise - 1) / (10 - best)) for i in range(1, 11)}
    (said,) = advise(lines(falling(50, 2 * level, level / 10), valid), DEFAULT, 3 * level, level)
    assert said.startswith(f"Overfitting: the validation loss was lowest, {level:.3g}, at step {5 * best} and rose to ")
    assert f"rose to {valid[50]:.3g} at step 50" in said and f"The weights of step {5 * best} were kept." in said
    assert "--patience 2 (now never)" in said and f"--steps {5 * best}" in said and "--dropout 0.1 (now 0)" in said


def test_the_training_loss_that_overfitting_is_told_with_is_that_of_the_best_step_and_of_the_last() -> None:
    (said,) = advise(lines([3.0] * 25 + [2.0] * 20 + [1.0] * 5, {25: 2.0, 50: 4.0}), DEFAULT)
    assert "while the training loss went from 3 to 1. The weights of step 25 were kept." in said


@pytest.mark.parametrize(("lowest", "end", "told"), [(4, 4.9, False), (4, 5.1, True), (0.02, 0.06, False)])
def test_a_loss_that_ends_a_little_above_its_lowest_is_not_diverging(lowest: float, end: float, told: bool) -> None:
    assert bool(advise(lines([*falling(20, 9, lowest), *[lowest] * 10, *[end] * 20]), DEFAULT)) == told


@pytest.mark.parametrize(("lowest", "end", "told"), [(4, 4.15, False), (4, 4.25, True), (0.01, 0.05, False)])
def test_a_small_rise_is_no_overfitting(lowest: float, end: float, told: bool) -> None:
    assert bool(advise(lines(falling(50, 3, 0.01), {25: lowest, 50: end}), DEFAULT)) == told


def test_a_rise_that_training_shares_is_no_overfitting() -> None:
    shared = advise(lines([*falling(25, 3, 1), *falling(25, 1, 3)], {25: 1.0, 50: 3.0}), DEFAULT)
    assert len(shared) == 1 and "The training loss rose" in shared[0]


def test_a_short_run_and_one_without_figures_are_advised_nothing() -> None:
    assert advise(FLAT[: LEAST_STEPS - 1], DEFAULT) == [] != advise(FLAT[:LEAST_STEPS], DEFAULT)
    assert advise([], DEFAULT) == advise(lines([math.nan] * 50), DEFAULT) == []


# --- With this run's settings ---


def everything_said(settings: Settings) -> list[str]:
    (flat,), (rose,), (overfit,) = (advise(curve, settings) for curve in (FLAT, ROSE, OVERFIT))
    return [flat, rose, overfit, after_divergence(settings, 7), out_of_memory(settings, 300)]


@given(settings=every_settings)
def test_every_flag_that_is_named_is_one_of_train_and_what_it_is_now_is_right(settings: Settings) -> None:
    for said in everything_said(settings):
        flags = {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", said)}
        assert flags <= {*all_settings(), "show_batch"}
        for name, shown in re.findall(r"--([a-z][\w-]*)(?: [\d.]+| q_proj)? \(now ([^)]*)\)", said):
            value = settings.values()[name.replace("-", "_")]
            if isinstance(value, float):
                assert shown == ("7 steps" if said.startswith("What") and name == "warmup" else f"{value:g}")
            elif isinstance(value, int):
                assert shown.split(" and ")[0] == ("never" if name == "patience" and not value else str(value))
            else:
                assert shown == " ".join(value)


@given(settings=every_settings)
def test_nothing_is_advised_that_the_method_has_not_or_that_is_done_already(settings: Settings) -> None:
    said = " ".join(everything_said(settings))
    method = settings.method.name
    own = {} if settings.adapter else {name: settings.values()[name] for name in settings_of(type(settings.method))}
    assert all((f"--{name}" in said) == (name in own) for name in ("rank", "alpha"))
    assert ("--dropout" in said) == (own.get("dropout", 1) < 0.1)
    assert ("--target-modules" in said) == (own.get("target_modules", ("all-linear",)) != ("all-linear",))
    assert ("--max-grad-norm" in said) == (settings.max_grad_norm != 1)
    assert ("--bottleneck-size" in said) == (method == "bottleneck" and not settings.adapter)
    assert ("--num-virtual-tokens" in said) == (method in ("prefix", "prompt") and not settings.adapter)
    assert ("--random-share" in said) == (method == "random" and not settings.adapter)
    assert ("--activation-checkpointing" in said) == (not settings.activation_checkpointing)
    assert ("--grad-accumulation" in said) == (settings.batch_size > 1)
    assert ("--frozen stored" in said) == (settings.frozen == "widened" and method != "full")
    in_memory = settings.frozen not in ("nf4", "mapped")
    assert ("--frozen nf4" in said) == ("--frozen mapped" in said) == (in_memory and method != "full")


# --- In real runs ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, CONFIG, random_weights(Config.from_dict(CONFIG), seed=0, std=0.3), "float32")
    train_tokenizer(TEXTS * 3, CONFIG["vocab_size"], folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows to learn, and another of which they say nothing."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", PAIRS[:4])
    write_rows(folder / "valid.jsonl", PAIRS[4:])
    return folder


@pytest.mark.parametrize(
    ("flags", "beginnings"),
    [
        ("--learning-rate 1e-7 --epochs 30", ["The training loss hardly fell"]),
        ("--learning-rate 0.01 --epochs 60 --schedule constant --rank 16", ["Overfitting"]),
        (
            "--learning-rate 0.3 --warmup 60 --steps 60 --eval-every 100",
            ["The training loss rose"],
        ),
    ],
)
def test_a_run_that_went_wrong_prints_its_advice_and_keeps_it_in_the_summary(
    model: Path, data: Path, tmp_path: Path, flags: str, beginnings: list[str]
) -> None:
    out = good("train", "--model", model, "--data", data, "--out", tmp_path / "run", *flags.split())
    advice = read(tmp_path / "run" / "summary.json")["advice"]
    assert len(advice) == len(beginnings)
    for said, beginning in zip(advice, beginnings, strict=True):
        assert said.startswith(beginning) and said in out


def test_a_run_that_went_well_has_nothing_to_say(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.jsonl", PAIRS)
    write_rows(tmp_path / "valid.jsonl", PAIRS)
    flags = "--learning-rate 0.01 --steps 60 --out".split()
    out = good("train", "--model", model, "--data", rows.parent, *flags, tmp_path / "run")
    assert read(tmp_path / "run" / "summary.json")["advice"] == [] and "What usually helps" not in out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_diverges_stops_with_advice_of_its_own_settings(model: Path, data: Path, tmp_path: Path) -> None:
    flags = "--optimizer sgd --learning-rate 1e30 --max-grad-norm 0 --warmup 2 --alpha 12 --steps 5".split()
    result = run("train", "--model", model, "--data", data, "--out", tmp_path / "run", *flags)
    assert_refused(
        result, "keeps the last good state. What usually helps", "--learning-rate (now 1e+30)",
        "--warmup (now 2 steps)", "--max-grad-norm 1 (now 0)", "--alpha (now 12)", "--rank (now 8)",
    )  # fmt: skip


def test_a_run_that_needs_more_memory_than_there_is_stops_with_advice_of_its_own_settings(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "loss_and_gradients", lambda *_, **__: np.ones(2**58))
    result = run("train", "--model", model, "--data", data, "--out", tmp_path / "run", "--batch-size", 8)
    assert_refused(
        result, "out of memory", "--batch-size 4 with --grad-accumulation 2", "longest row, 15 tokens",
        "--frozen stored", "--frozen nf4", "--frozen mapped", "minilora.plan",
    )  # fmt: skip


def test_a_divergence_in_float16_is_first_met_with_bfloat16() -> None:
    in_half, plain = (after_divergence(Settings(mixed_precision=name), 7) for name in ("fp16", "no"))
    assert in_half.replace("--mixed-precision bf16, whose range is float32's; ", "") == plain != in_half
