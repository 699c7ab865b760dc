"""Every number in a comparison's tables is the one that its column names: distinct figures in, exact cells out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.comparisons import comparison_of, failed_figures, few_shot_figures, method_figures, spectrum_figures
from tqdm import tqdm

from minilora.adapters.change import effective_rank, share_of_largest
from minilora.compare import __main__ as compare
from minilora.compare import latency
from minilora.compare.figures import result
from minilora.compare.report import comparison_tables, cost_table, cut_table, share_table, worth_table
from minilora.compare.rivals import Rival, lora_of_rank
from minilora.compare.scale import at_gpt_3, lora_share
from minilora.compare.spectrum import (
    gain_kept,
    noise_like,
    singular_values,
    spectrum_of,
)
from minilora.compare.trials import Trial, best_rate
from minilora.figures.tables import Table
from minilora.runs.settings import make_settings

RIVAL = Rival("mine", "what it is", (), (0.01, 0.03, 0.1))


# --- From the trials ---


def summary(number: int, best_valid_loss: float) -> dict[str, Any]:
    """A trial's summary. No two of its figures are equal, nor are those of two trials."""
    return {
        "base_loss": 2 + number / 100, "adapted_loss": 1 + number / 100, "base_exact_match": number / 64,
        "adapted_exact_match": number / 8, "drift_kl": number / 16,
        "trainable_parameters": 7_000 + number, "total_parameters": 90_000 + number, "steps": 50 + number,
        "best_step": 40 + number, "best_valid_loss": best_valid_loss, "tokens": 10_000 + number,
        "tokens_per_second": 600.0 + number, "training_seconds": 17.0 + number, "seconds": 20.0 + number,
        "peak_memory_bytes": 400_000 - number,
    }  # fmt: skip


@pytest.fixture
def trials(tmp_path: Path) -> dict[Trial, dict[str, Any]]:
    """Three rates with seed 5, of which the middle one is best, and that one with seed 7."""
    done = {
        Trial(RIVAL, 0.01, 5): summary(1, 0.9),
        Trial(RIVAL, 0.03, 5): summary(2, 0.8),
        Trial(RIVAL, 0.1, 5): {"error": "the loss is nan"},
        Trial(RIVAL, 0.03, 7): summary(4, 0.85),
    }
    speeds = {"mine-0.03-5": [10.0, 20.0, 40.0], "mine-0.03-7": [25.0, 50.0], "mine-0.01-5": [1.0, 1.0, 1.0]}
    for name, of_steps in speeds.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps({"rank": 6, "dtype": "float64"}))
        lines: list[dict[str, Any]] = [
            {"step": i, "loss": 1.0, "tokens": 100, "labelled_tokens": 7, "tokens_per_second": speed}
            for i, speed in enumerate(of_steps, start=1)
        ]
        lines.insert(1, {"step": 1, "valid_loss": 3.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "adapter_model.safetensors").write_bytes(bytes(100 + len(of_steps)))
        (folder / "state.safetensors").write_bytes(bytes(5000))
    return done


def test_the_figures_of_a_method_are_those_of_its_best_rate(trials: dict[Trial, Any], tmp_path: Path) -> None:
    """The memory is the most of the seeds, the seconds of a step are 100 tokens over the median speed of all steps."""
    found = result(RIVAL, [5, 7], trials, lambda trial: tmp_path / trial.name)
    assert found == found | {
        "method": "mine", "what": "what it is", "folder": str(tmp_path / "mine-0.03-5"),
        "failed": {"mine-0.1-5": "the loss is nan"}, "seeds": [5, 7],
        "best_rate": 0.03, "at_edge": False, "rates": [0.01, 0.03, 0.1], "valid_losses": [0.9, 0.8, None],
        "rank": 6, "trainable_parameters": 7_002, "total_parameters": 90_002, "update_bytes": 3 * 7_002 * 8,
        "peak_memory_bytes": 399_998, "file_bytes": 103, "seconds_per_step": 100 / 25,
        "base_loss": 2.02, "base_exact_match": 2 / 64,
        "loss": [1.02, 1.04], "exact_match": [0.25, 0.5], "drift_kl": [0.125, 0.25],
    }  # fmt: skip


def test_after_full_fine_tuning_the_file_is_all_parts_of_the_checkpoint(
    trials: dict[Trial, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "mine-0.03-5"
    (folder / "adapter_model.safetensors").unlink()
    for part, length in ((1, 70), (2, 11)):
        (folder / f"model-0000{part}-of-00002.safetensors").write_bytes(bytes(length))
    assert result(RIVAL, [5], trials, lambda trial: tmp_path / trial.name)["file_bytes"] == 81


@pytest.mark.parametrize(
    ("losses", "at_edge"), [([0.8, 0.9, 1.0], True), ([0.9, 0.8, 1.0], False), ([1.0, 0.9, 0.8], True), ([0.9], False)]
)
def test_the_best_of_several_rates_is_at_an_edge_if_it_is_the_lowest_or_the_highest(
    tmp_path: Path, losses: list[float], at_edge: bool
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "tokens": 8, "tokens_per_second": 4.0}\n')
    done = {
        Trial(RIVAL, rate, 5): summary(i, loss) for i, (rate, loss) in enumerate(zip(RIVAL.rates, losses, strict=False))
    }
    assert result(RIVAL, [5], done, lambda trial: folder)["at_edge"] is at_edge


def test_what_does_not_train_has_the_figures_that_evaluate_prints(tmp_path: Path) -> None:
    few = Rival("few", "rows before the prompt")
    printed = {"loss": 1.1, "perplexity": 3.0, "exact_match": 0.2, "shots": 6, "examples": 9, "left_out": 2}
    done = {Trial(few, 0.0, 5): printed, Trial(few, 0.0, 7): printed | {"loss": 1.3, "exact_match": 0.4, "shots": 5}}
    found = result(few, [5, 7], done, lambda trial: tmp_path / trial.name)
    assert found == found | {
        "method": "few", "what": "rows before the prompt", "folder": str(tmp_path / "few-5"), "failed": {},
        "seeds": [5, 7], "trainable_parameters": 0, "loss": [1.1, 1.3], "exact_match": [0.2, 0.4], "shots": [6, 5],
    }  # fmt: skip


def test_lora_of_another_rank_has_alpha_twice_the_rank() -> None:
    for rank in (1, 4, 64):
        rival = lora_of_rank(rank, [0.01])
        assert rival.flags == ("--rank", str(rank), "--alpha", str(2 * rank))
        assert rival[:2] == (f"lora-r{rank}", f"LoRA, rank {rank}, α {2 * rank}") and rival.rates == (0.01,)


def test_of_two_rates_with_the_same_loss_the_lower_is_the_best() -> None:
    done = {Trial(RIVAL, rate, 5): summary(0, loss) for rate, loss in ((0.1, 0.5), (0.03, 0.5), (0.01, 0.6))}
    assert best_rate(RIVAL, 5, done) == 0.03
    assert best_rate(RIVAL, 5, {Trial(RIVAL, 0.1, 7): summary(0, 0.1)} | done) == 0.03  # another seed has no say


def test_a_trial_is_the_run_that_its_flags_say(tmp_path: Path) -> None:
    """All methods share the budget: no weight decay, and validation in the middle and at the end."""
    flags = "--model m --steps 31 --batch-size 6 --eval-rows 9 --seeds 5 7 --alpha 3"
    args, shared = compare.parse([*flags.split(), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    field = compare.Comparison(args, shared).field(tmp_path / "out", "rows", tqdm(disable=True))
    rival = Rival("mine", "", ("--rank", "4"), (0.03,))
    common = ["--model", "m", "--data", "rows", "--eval-rows", "9"]
    budget = ["--steps", "31", "--batch-size", "6", "--weight-decay", "0", "--eval-every", "15", "--save-every", "15"]
    own = ["--rank", "4", "--seed", "5"]
    folder = str(tmp_path / "out" / "trials" / "mine-0.03-5")
    assert field.command(Trial(rival, 0.03, 5))[3:] == [
        *(*common, *budget, "--alpha", "3", *own, "--learning-rate", "0.03", "--out", folder),
    ]
    assert field.command(Trial(rival, 0.0, 5))[2:] == ["minilora.evaluate", *common, *own, "--json"]


def test_the_latency_is_the_median_of_a_token_after_the_first_of_all_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three takes its turn with 64 tokens; the first turn only warms up."""
    turns = {"base": [64.0, 0.64, 1.28, 2.56], "adapted": [64.0, 6.4, 5.12, 3.2], "merged": [64.0, 0.128, 12.8, 0.32]}
    taken: list[tuple[str, list[int]]] = []

    def seconds(model: str, prompt: list[int]) -> float:
        taken.append((model, prompt))
        return turns[model][sum(one[0] == model for one in taken) - 1]

    monkeypatch.setattr(latency, "REPEATS", 3)
    monkeypatch.setattr(latency, "find_model", lambda *_: SimpleNamespace(folder=Path("source")))
    monkeypatch.setattr(latency, "load_model", lambda *_: ("base", None))
    monkeypatch.setattr("minilora.compare.latency.Tokenizer.load", lambda *_: None)
    monkeypatch.setattr(latency, "prompts", lambda *_: ([1, 2], [3]))
    monkeypatch.setattr(latency, "trained_model", lambda *_: ("base", "adapted"))
    monkeypatch.setattr(latency, "seconds", seconds)
    monkeypatch.setattr(latency, "merged_model", lambda *_: ("merged", ""))
    found = latency.latency({"folder": "run"}, make_settings({}))
    assert found == {"base": pytest.approx(20), "adapted": pytest.approx(80), "merged": pytest.approx(5)}
    assert taken == [("base", [1, 2]), ("adapted", [1, 2]), ("merged", [1, 2])] * 4
    taken.clear()
    monkeypatch.setattr(latency, "merged_model", lambda *_: (None, "virtual tokens"))
    found = latency.latency({"folder": "run"}, make_settings({}))
    assert found.keys() == {"base", "adapted", "not_merged"} and found["not_merged"] == "virtual tokens"
    taken.clear()
    turns["base"] = [1.0] * 8
    found = latency.latency({"shots": [4]}, make_settings({}))  # it is the base, after solved rows
    assert taken == [("base", [1, 2]), ("base", [3])] * 4 and found.keys() == {"base", "adapted", "not_merged"}


# --- The tables ---


def cells(table: Table, row: int) -> dict[str, str]:
    """A row's cells by the heads of their columns."""
    return dict(zip(table.head, table.rows[row], strict=True))


def holds(table: Table, row: int, expected: dict[str, str]) -> None:
    found = cells(table, row)
    assert {name: found.get(name) for name in expected} == expected


def test_each_column_of_worth_shows_the_figure_that_it_names() -> None:
    other = method_figures(
        "full", trainable_parameters=1_000_000, best_rate=3e-4, loss=[0.25], exact_match=[0.625], drift_kl=[0.75],
        seeds=[5], rank=None, at_edge=True,
    )  # fmt: skip
    table = worth_table("a title", [failed_figures("dora"), method_figures("lora"), other, few_shot_figures()])
    assert table.title == "a title"
    columns = {"": "base", "trains": "0", "of all": "", "rate": "", "held-out loss": "2.500", "exact match": "1.5%"}
    holds(table, 0, columns | {"drift KL": "0"})
    holds(table, 1, {"": "dora", "trains": "failed", "of all": "", "rate": "", "held-out loss": "", "drift KL": ""})
    columns = {"": "lora", "trains": "3,000", "of all": "0.30%", "rate": "0.03"}
    columns |= {"held-out loss": "0.625 ± 0.125", "exact match": "43.0 ± 3.0%", "drift KL": "0.250 ± 0.125"}
    holds(table, 2, columns)
    columns = {"": "full", "trains": "1,000,000", "of all": "100.00%", "rate": "0.0003", "held-out loss": "0.250"}
    holds(table, 3, columns | {"exact match": "62.5%", "drift KL": "0.750"})
    columns = {"": "few-shot", "trains": "0", "of all": "", "rate": "", "held-out loss": "1.625 ± 0.125"}
    holds(table, 4, columns | {"exact match": "21.0 ± 1.0%", "drift KL": ""})
    assert table.notes[0] == "± is half of the way from the least to the most of the seeds: 2 of them"
    assert table.notes[1:] == [
        "dora-1-5 broke off: the loss is nan",
        "the best rate is the lowest or the highest tried: full",
    ]


def test_rows_without_one_right_answer_leave_the_exact_match_empty() -> None:
    table = worth_table("", [method_figures("lora", exact_match=[], base_exact_match=None, seeds=[5])])
    assert cells(table, 0)["exact match"] == cells(table, 1)["exact match"] == ""
    assert table.notes[0].endswith(": here there is one seed, and so no spread")


def test_each_column_of_cost_shows_the_figure_that_it_names() -> None:
    """Below 100 MB three digits are shown, from there on whole numbers."""
    full = method_figures(
        "full", update_bytes=12_000_000, peak_memory_bytes=1_234_600_000, file_bytes=99_960_000,
        seconds_per_step=1.2346, latency={"base": 1.25, "adapted": 1.3, "not_merged": "it is whole"},
    )  # fmt: skip
    table = cost_table("a title", [failed_figures("dora"), method_figures("lora"), full, few_shot_figures()])
    assert table.title == "a title"
    assert table.head == ["", "gradients + AdamW, MB", "peak, MB", "file, MB", "step, ms", "token, ms", "merged, ms"]
    assert table.rows == [
        ["base", "", "", "", "", "1.25", ""],
        ["dora", "", "", "", "", "", ""],
        ["lora", "0.036", "413", "0.0123", "217", "1.75", "1.26"],
        ["full", "12", "1,235", "100", "1235", "1.30", ""],
        ["few-shot", "", "", "", "", "2.75", ""],
    ]
    assert table.notes == [
        "gradients + AdamW is counted: the numbers that train × 3 × 4 bytes; all else is measured",
        "full cannot be merged: it is whole",
    ]


def test_each_column_of_the_shares_shows_the_median_over_the_maps() -> None:
    """Rank 128 is left out: the columns end at 64."""
    table = share_table(spectrum_figures())
    assert table.head == ["median over the linear maps", *(f"r = {r}" for r in (1, 2, 4, 8, 16)), "effective rank"]
    assert table.rows == [
        ["full fine-tuning's ΔW", "12.0%", "23.0%", "34.0%", "53.0%", "100.0%", "6.1"],
        ["LoRA's ΔW", "43.0%", "64.0%", "82.0%", "93.0%", "100.0%", "2.4"],
        ["random numbers", "2.0%", "3.0%", "5.0%", "9.0%", "100.0%", "14.2"],
    ]
    assert table.title == "The share of ‖ΔW‖² in its r largest singular values"


def test_of_an_odd_number_of_maps_the_shares_are_those_of_the_middle_one() -> None:
    spectrum = spectrum_figures()
    spectrum["full"]["c"] = {"shares": {"1": 0.9, "2": 0.91, "4": 0.92, "8": 0.93}, "effective_rank": 99.0}
    assert share_table(spectrum).rows[0][1:] == ["13.0%", "25.0%", "37.0%", "55.0%", "100.0%", "6.7"]


def test_each_column_of_the_cuts_shows_the_figure_that_it_names() -> None:
    table = cut_table(spectrum_figures())
    for row, (rank, loss, match) in enumerate(
        [
            ("0, the base", "2.500", "1.5%"),
            ("1", "1.500", "11.0%"),
            ("2", "0.625", "34.5%"),
            ("4", "0.575", "35.0%"),
            ("8", "0.550", "36.0%"),
        ]
    ):
        holds(table, row, {"r": rank, "held-out loss": loss, "exact match": match})
    holds(table, 5, {"r": "all", "held-out loss": "0.500", "exact match": "43.0%"})


def test_each_table_has_the_results_of_its_own_part() -> None:
    found = comparison_of(
        method_figures("lora"), ranks=[method_figures("lora-r2")], cipher=[method_figures("full")],
        spectrum=spectrum_figures(),
    )  # fmt: skip
    assert [(table.title, table.rows[1][0]) for table in comparison_tables(found)] == [
        ("What the methods are worth", "lora"),
        ("What they cost", "lora"),
        ("LoRA's rank: worth", "lora-r2"),
        ("LoRA's rank: cost", "lora-r2"),
        ("The same task enciphered, far from all that the base knows", "full"),
        ("The share of ‖ΔW‖² in its r largest singular values", "LoRA's ΔW"),
        ("Full fine-tuning's ΔW cut to rank r afterwards", "1"),
    ]
    assert comparison_tables(comparison_of()) == []


# --- The spectrum ---


def test_the_spectrum_of_a_matrix_with_a_pencil() -> None:
    """Singular values 3, 1, 0. Their shares of ‖ΔW‖² are those of 9 and 1, the effective rank that of 3/4 and 1/4."""
    spectrum = spectrum_of(singular_values(np.array([[0, 3, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0]], np.float32)))
    assert spectrum["sigma"] == [1.0, round(1 / 3, 8), 0.0]
    assert spectrum["shares"] == {"1": 0.9, "2": 1.0}
    assert math.isclose(spectrum["effective_rank"], 4 / 3**0.75)  # exp(log 4 − ¾ log 3)
    assert math.isclose(spectrum["norm"], math.sqrt(10))


def test_shares_are_of_squares_and_the_effective_rank_is_of_the_values_themselves() -> None:
    sigma = np.array([3.0, 1.0])
    assert share_of_largest(sigma, 1) == 0.9
    assert math.isclose(effective_rank(sigma), 4 / 3**0.75)


def test_the_noise_has_the_shape_of_the_first_change_and_is_standard_normal() -> None:
    noise = noise_like({"a": np.zeros((300, 200)), "b": np.zeros((2, 3))})
    assert noise.shape == (300, 200)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_the_gain_that_a_part_of_the_change_keeps_with_a_pencil() -> None:
    """From 2.5 to 0.5 the loss falls by 2; to 1.5 it is half of that."""
    cuts = spectrum_figures()["cut"]
    assert [gain_kept(cuts, part) for part in cuts[:3]] == [0.0, 0.5, 0.9375]
    assert gain_kept(cuts, cuts[-1]) == 1.0


# --- The scale of GPT-3 ---


def test_gpt_3_and_the_shares_with_a_pencil() -> None:
    """A Llama of 96 layers, d = 12,288: LoRA on q and v has 96 · 2 · 2 d r numbers. Each trained one has three more."""
    big = at_gpt_3()
    layer, d = 4 * 12288**2 + 3 * 12288 * 32768 + 2 * 12288, 12288
    N = 96 * layer + 50257 * d + d
    assert big.d == d and big.full_bytes == 16 * N
    assert big.fewer == {r: N / (96 * 4 * d * r) for r in (1, 2, 4)}
    assert big.lora_bytes == 4 * N + 16 * 96 * 4 * d * 4
    assert lora_share("SmolLM2-1.7B", 16, ("q_proj", "v_proj")) == 24 * 4 * 2048 * 16 / 1_711_376_384
