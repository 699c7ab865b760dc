"""The comparison: each method gets its best rate of those tried, nothing is run twice, what is told was measured."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import PAIRS, Result, contents, read, write_rows

from minilora.adapters.change import effective_rank, share_of_largest
from minilora.adapters.merging import merged_parameters
from minilora.cli.train_flags import choose_settings, parse
from minilora.compare import __main__ as compare
from minilora.compare import latency, rivals, trials
from minilora.compare.claims import HERE, NOT, Claim, claims
from minilora.compare.figures import mean_and_spread
from minilora.compare.inputs import enciphered
from minilora.compare.inputs import write_rows as write_task
from minilora.compare.plots import apart
from minilora.compare.report import comparison_tables
from minilora.compare.rivals import LORA, RIVALS, Rival, choose, lora_of_rank, neighbour
from minilora.compare.scale import at_gpt_3, lora_share
from minilora.compare.spectrum import (
    changes_of_full,
    changes_of_lora,
    factored,
    singular_values,
    truncated,
)
from minilora.compare.trials import MOST_RATES, Summary, Trial, best_rate, next_trial
from minilora.data.batches import count_labels
from minilora.data.tokenizer import Tokenizer
from minilora.figures.tables import BEGIN, END
from minilora.formats.adapters import load_adapter
from minilora.formats.load import load_model
from minilora.runs.evaluation import python_source
from minilora.training.step import mean_loss

ladder = st.integers(-8, 0).map(lambda k: neighbour(1.0, k))


# --- Which trials are run ---


def competed(rival: Rival, seeds: list[int], loss_of: Callable[[float], float]) -> dict[Trial, Summary]:
    """All trials of a search in which a rate always leads to the same loss; nan stands for divergence."""
    done: dict[Trial, Summary] = {}
    while trial := next_trial(rival, seeds, done):
        assert trial not in done
        loss = loss_of(trial.rate)
        done[trial] = {"best_valid_loss": loss} if math.isfinite(loss) else {"error": "the loss is nan"}
        assert len(done) < 20
    return done


@given(ladder, st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), st.integers(-6, 6))
def test_a_search_ends_between_other_rates_or_has_tried_the_most(start: float, seeds: list[int], away: int) -> None:
    best = neighbour(start, away)
    rates = tuple(neighbour(start, k) for k in range(3))
    done = competed(LORA._replace(rates=rates), seeds, lambda rate: abs(math.log(rate / best)))
    tried = sorted(trial.rate for trial in done if trial.seed == seeds[0])
    found = best_rate(LORA._replace(rates=rates), seeds[0], done)
    assert tried[0] < found < tried[-1] or len(tried) == MOST_RATES
    if tried[0] < found < tried[-1]:
        assert math.isclose(found, best)
    assert [(trial.rate, trial.seed) for trial in done][len(tried) :] == [(found, seed) for seed in seeds[1:]]


@given(ladder)
def test_a_rate_at_which_training_breaks_off_is_never_the_best(start: float) -> None:
    rival = LORA._replace(rates=tuple(neighbour(start, k) for k in range(3)))
    done = competed(rival, [0, 1], lambda rate: math.nan if rate > start else 1.0)
    assert best_rate(rival, 0, done) <= start


@given(st.integers(0, 9), st.integers(-3, 3))
def test_a_search_that_was_cut_off_goes_on_as_if_it_had_not_been(cut: int, away: int) -> None:
    def loss(rate: float) -> float:
        return abs(math.log(rate / 1e-2) + away)

    whole = competed(LORA, [0, 1, 2], loss)
    half = dict(list(whole.items())[:cut])
    following = next_trial(LORA, [0, 1, 2], half)
    assert following == (list(whole)[cut] if cut < len(whole) else None)


def test_what_does_not_train_is_measured_once_with_each_seed() -> None:
    (few,) = choose(["few-shot"])
    assert [trial[1:] for trial in competed(few, [3, 5], lambda rate: 0.0)] == [(0.0, 3), (0.0, 5)]


@given(ladder, st.integers(-4, 4))
def test_rates_stand_on_a_ladder_of_two_rungs_for_each_power_of_ten(rate: float, by: int) -> None:
    assert neighbour(neighbour(rate, by), -by) == rate
    assert math.isclose(neighbour(rate, 2), 10 * rate)
    assert f"{neighbour(rate, by):.0e}"[0] in "13"


@pytest.mark.parametrize("rival", [*RIVALS, lora_of_rank(4, (1e-2,))], ids=lambda rival: rival.name)
def test_train_understands_the_flags_of_every_rival(rival: Rival, tmp_path: Path) -> None:
    assert rival.rates == tuple(neighbour(rate, 0) for rate in rival.rates)
    if rival.rates:
        flags = [*rival.flags, "--learning-rate", str(rival.rates[0]), "--out", str(tmp_path / "run")]
        settings, _, _ = choose_settings(parse(flags))
        assert settings.learning_rate == rival.rates[0]


def test_an_unknown_method_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"--methods lara: choose of full, lora"):
        choose(["lora", "lara"])


def test_the_enciphered_task_is_the_same_task_letter_by_letter(tmp_path: Path) -> None:
    plain, cipher = write_task(tmp_path / "plain", 5), write_task(tmp_path / "cipher", 5, cipher=True)
    for split in ("train", "valid", "test"):
        before, after = (
            [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            for folder in (plain, cipher)
        )
        assert before != after and before == [enciphered(row) for row in after]


# --- The command ---


def run(*flags: object) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(latency, "REPEATS", 1)  # times are not what is tested
        code = compare.main([str(flag) for flag in flags])
    return Result(code, out.getvalue(), err.getvalue())


class Compared(NamedTuple):
    flags: list[object]
    out: Path
    first: Result  # the call that was cut off
    second: Result


@pytest.fixture(scope="module")
def compared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Full, LoRA and few-shot with one rate each: cut off in the middle of the first training, and called again."""
    folder = tmp_path_factory.mktemp("compare")
    for part in ("train", "valid", "test"):
        write_rows(folder / "data" / f"{part}.jsonl", 2 * PAIRS)
    (folder / "docs").mkdir()
    for page in ("comparison.md", compare.CLAIMS_PAGE):
        (folder / "docs" / page).write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    flags: list[object] = ["--methods", "full", "lora", "few-shot", "--model", model, "--data", folder / "data"]
    flags += ["--steps", 80, "--batch-size", 2, "--eval-rows", 2, "--seeds", 0, "--out", folder / "out"]
    flags += ["--docs", folder / "docs", "--rank", 2]
    look = trials.Field._show

    def cut_off(field: trials.Field, before: int, trial: Path) -> None:
        look(field, before, trial)
        if trials.steps_done(trial) >= 45:  # the state was saved at 40
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "RIVALS", tuple(rival._replace(rates=rival.rates[:1]) for rival in RIVALS))
        patch.setattr(trials.Field, "_show", cut_off)
        first = run(*flags)
        patch.setattr(trials.Field, "_show", look)
        second = run(*flags)
    return Compared(flags, folder / "out", first, second)


def test_a_comparison_that_was_cut_off_goes_on_where_it_stopped(compared: Compared) -> None:
    assert compared.first.code == 130
    assert compared.second.code == 0, compared.second.err
    trial = compared.out / "trials" / "full-0.0003-0"
    assert (
        "of them done" in trial.with_name(f"{trial.name}.log").read_text()
    )  # of the second run, which is thus a resumed one
    lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 81))


def test_the_figures_are_those_of_the_trials(compared: Compared) -> None:
    found = read(compared.out / "comparison.json")
    full, lora, few = found["methods"]
    for result, tensors in ((full, "model.safetensors"), (lora, "adapter_model.safetensors")):
        summary = read(Path(result["folder"]) / "summary.json")
        assert result["loss"] == [summary["adapted_loss"]] and result["drift_kl"] == [summary["drift_kl"]]
        assert result["exact_match"] == [summary["adapted_exact_match"]]
        assert result["update_bytes"] == 12 * summary["trainable_parameters"]
        assert result["file_bytes"] == (Path(result["folder"]) / tensors).stat().st_size
        assert result["latency"].keys() == {"base", "adapted", "merged"}
    assert few["trainable_parameters"] == 0 and "merged" not in few["latency"] and few["shots"][0] >= 1
    assert read(Path(lora["folder"]) / "settings.json")["rank"] == 2  # what is not ours goes to every trial
    assert full["seconds_per_step"] > 0


def test_no_two_cuts_of_the_change_are_worth_the_same_as_all_of_it_and_nothing_of_it(compared: Compared) -> None:
    cuts = read(compared.out / "comparison.json")["spectrum"]["cut"]
    full = read(compared.out / "comparison.json")["methods"][0]
    assert cuts[0]["rank"] == 0 and math.isclose(cuts[0]["loss"], full["base_loss"], rel_tol=1e-6)
    assert cuts[-1]["rank"] is None and cuts[-1]["loss"] < cuts[1]["loss"] < cuts[0]["loss"]


def test_tables_and_pictures_stand_between_the_lines_of_the_pages(compared: Compared) -> None:
    docs = compared.out.parent / "docs"
    for page in ("comparison.md", compare.CLAIMS_PAGE):
        text = (docs / page).read_text()
        assert text.startswith("before\n") and text.endswith("after\n")
    for line in (docs / "comparison.md").read_text().splitlines():
        if line.startswith("!["):
            assert (docs / line[line.index("(") + 1 : -1]).read_bytes().startswith(b"\x89PNG")
    assert (docs / "comparison.md").read_text().count("![") == 4
    assert "| the change of full fine-tuning has a low intrinsic rank |" in (docs / "claims.md").read_text()


def test_the_perplexity_of_python_is_that_of_the_trained_model(compared: Compared, model: Path) -> None:
    full, lora = read(compared.out / "comparison.json")["methods"][:2]
    tokenizer, (base, _) = Tokenizer.load(model), load_model(model)
    batches = python_source(tokenizer)
    assert sum(map(count_labels, batches)) > 1000
    for result, trained in (
        (full, load_model(Path(full["folder"]))[0]),
        (lora, load_adapter(base, Path(lora["folder"]))),
    ):
        assert math.isclose(result["base_python_perplexity"], math.exp(mean_loss(base, batches)))
        assert math.isclose(result["python_perplexity"], math.exp(mean_loss(trained, batches)))
        assert result["python_perplexity"] != result["base_python_perplexity"]
    worth = (compared.out / "comparison.md").read_text()
    assert f"| {lora['python_perplexity']:.1f} |" in worth and f"| {lora['base_python_perplexity']:.1f} |" in worth


def test_the_page_of_claims_keeps_the_columns_of_other_models(compared: Compared, tmp_path: Path, model: Path) -> None:
    (tmp_path / "claims.md").write_text(f"{BEGIN}\n{END}\n")
    compare.write_claims(tmp_path, {"one": [Claim("it is small", "2 MB", HERE), Claim("only here", "1", NOT)]})
    compare.write_claims(tmp_path, {"two": [Claim("it is small", "3 MB", NOT)]})
    page = (tmp_path / "claims.md").read_text()
    assert "| claim | one | verdict | two | verdict |" in page
    assert f"| it is small | 2 MB | {HERE} | 3 MB | {NOT} |" in page
    assert f"| only here | 1 | {NOT} | … | not measured |" in page
    assert f"| {model.stem} | verdict |" in (compared.out / "claims.md").read_text()


def test_what_is_done_is_not_done_again(compared: Compared) -> None:
    before = contents(compared.out / "trials")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "RIVALS", tuple(rival._replace(rates=rival.rates[:1]) for rival in RIVALS))
        patch.setattr(trials, "watch", lambda *args: pytest.fail("a trial was run again"))
        assert run(*compared.flags).code == 0
    assert contents(compared.out / "trials") == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", 9], "another budget"),
        (["--seeds", 1, 1], "--seeds [1, 1]"),
        (["--methods", "lara"], "--methods lara"),
        (["--ranks", 0], "--ranks [0]"),
        (["--cipher"], "--cipher"),
        (["--alpha", 3], "another budget"),
        (["--dropout", 2], "--dropout 2"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_a_line_that_names_it(compared: Compared, flags: list[object], told: str) -> None:
    result = run(*compared.flags, *flags)
    assert result.code == 2
    assert told in result.err.splitlines()[-1] and result.err.splitlines()[-1].startswith("error: ")


# --- The spectrum ---


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_effective_rank_of_k_equal_singular_values_is_k(k: int, seed: int) -> None:
    assert math.isclose(effective_rank(np.array([3.0] * k + [0.0] * 4)), k)
    sigma = np.random.default_rng(seed).random(k) + 0.1
    assert 1 <= effective_rank(sigma) <= k + 1e-9
    assert math.isclose(effective_rank(sigma), effective_rank(5 * sigma))


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_share_of_the_largest_is_what_the_nearest_matrix_of_that_rank_keeps(r: int, seed: int) -> None:
    change = np.random.default_rng(seed).standard_normal((6, 9))
    kept, sigma = truncated(factored(change), r), singular_values(change)
    assert np.linalg.matrix_rank(kept) == r
    assert math.isclose(share_of_largest(sigma, r), (kept**2).sum() / (change**2).sum())
    assert math.isclose(((change - kept) ** 2).sum(), (sigma[r:] ** 2).sum(), abs_tol=1e-12)


def test_the_changes_looked_at_are_those_that_merging_makes(compared: Compared, model: Path) -> None:
    full, lora = (Path(one["folder"]) for one in read(compared.out / "comparison.json")["methods"][:2])
    base, _ = load_model(model)
    trained, _ = load_model(full)
    adapted = load_adapter(base, lora)
    merged = {name.removesuffix(".weight"): value for name, value in merged_parameters(base, adapted)}
    of_full, of_lora = changes_of_full(model, full), changes_of_lora(model, lora)
    assert of_full.keys() == of_lora.keys() == merged.keys() and len(merged) == 14
    for module in merged:
        W = base.sites[module].weight.dense()  # type: ignore[union-attr]
        assert np.allclose(W + of_full[module], trained.sites[module].weight.dense(), atol=1e-6)  # type: ignore[union-attr]
        assert np.allclose(W + of_lora[module], merged[module], atol=1e-6)
        assert np.abs(of_lora[module]).max() > 0 and np.linalg.matrix_rank(of_lora[module]) <= 2


# --- What is told ---


def synthetic(name: str, trained: int, loss: list[float], match: list[float], **others: Any) -> dict[str, Any]:
    """A method's figures, without a run."""
    return {
        "method": name, "what": name, "folder": "", "failed": {}, "seeds": list(range(len(loss))),
        "best_rate": 1e-2, "rank": 8, "at_edge": False, "rates": [3e-3, 1e-2, 3e-2], "valid_losses": [0.3, 0.2, 0.4],
        "trainable_parameters": trained, "total_parameters": 1000, "update_bytes": 12 * trained,
        "peak_memory_bytes": 300e6 + trained, "file_bytes": 4 * trained, "seconds_per_step": 0.1,
        "base_loss": 3.0, "base_exact_match": 0.0, "loss": loss, "exact_match": match, "drift_kl": [0.1] * len(loss),
        "latency": {"base": 1.0, "adapted": 1.5, "merged": 1.0},
    } | others  # fmt: skip


def comparison(*methods: dict[str, Any], ranks: Any = (), cipher: Any = (), spectrum: Any = ()) -> dict[str, Any]:
    return {"methods": list(methods), "ranks": list(ranks), "cipher": list(cipher), "spectrum": dict(spectrum)}


def test_a_table_has_the_mean_over_the_seeds_and_half_of_their_range() -> None:
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, 2.5)
    worth, cost = comparison_tables(comparison(synthetic("lora", 40, [0.25, 0.75], [0.5, 0.6])))
    assert worth.rows[0] == ["base", "0", "", "", "3.000", "0.0%", "0"]
    assert worth.rows[1] == ["lora", "40", "4.00%", "0.01", "0.500 ± 0.250", "55.0 ± 5.0%", "0.100 ± 0.000"]
    assert cost.rows[1] == ["lora", "0.00048", "300", "0.00016", "100", "1.50", "1.00"]


def test_a_table_says_what_broke_off_what_is_at_an_edge_and_what_cannot_be_merged() -> None:
    broken = {"method": "full", "what": "", "folder": "", "failed": {"full-1-0": "the loss is nan"}, "seeds": []}
    latency = {"base": 1.0, "adapted": 2.0, "not_merged": "virtual"}
    edge = synthetic("prompt", 5, [1.0], [], at_edge=True, latency=latency)
    worth, cost = comparison_tables(comparison(broken, edge))
    assert worth.rows[1] == ["full", "failed", "", "", "", "", ""]
    assert worth.rows[2][4:6] == ["1.000", ""]
    notes = "\n".join(worth.notes + cost.notes)
    for told in (
        "full-1-0 broke off: the loss is nan",
        "tried: prompt",
        "prompt cannot be merged: virtual",
        "one seed",
    ):
        assert told in notes


def verdict(claim: str, found: dict[str, Any]) -> str:
    (one,) = (one for one in claims(found) if claim in one.claim)
    return one.verdict


@pytest.mark.parametrize(
    ("claim", "good", "bad"),
    [
        ("matches full", {"loss": [0.2, 0.22]}, {"loss": [0.5, 0.52]}),
        ("keeps what the base", {"drift_kl": [0.05]}, {"drift_kl": [0.3]}),
        ("trains fast", {"seconds_per_step": 0.05}, {"seconds_per_step": 0.2}),
        ("little memory", {"peak_memory_bytes": 1e6}, {"peak_memory_bytes": 1e9}),
        ("1–5 %", {"trainable_parameters": 40}, {"trainable_parameters": 90}),
        ("once merged", {}, {"latency": {"base": 1.0, "adapted": 1.5, "merged": 1.4}}),
        ("ten times)", {"best_rate": 1e-1}, {"best_rate": 1e-2}),
        ("randomly", {"loss": [0.3]}, {"loss": [0.9]}),
        ("other methods", {"loss": [0.3]}, {"loss": [0.9]}),
    ],
)  # fmt: skip
def test_a_verdict_turns_with_the_numbers(claim: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    full = synthetic("full", 1000, [0.21, 0.23], [0.7, 0.7])
    others = [synthetic("random", 40, [0.8], [0.1]), synthetic("bottleneck", 40, [0.7], [0.2])]
    lora = synthetic("lora", 40, [0.2, 0.2], [0.7, 0.7])
    verdicts = [verdict(claim, comparison(full, lora | changed, *others)) for changed in (good, bad)]
    assert verdicts[0] == HERE and verdicts[1].startswith(NOT)


def test_what_was_not_measured_is_said_to_be_missing_and_by_which_command_it_is_measured() -> None:
    told = claims(comparison())
    assert {one.claim for one in told} >= {
        "LoRA against full fine-tuning",
        "the change of full fine-tuning has a low intrinsic rank",
        "a small r may underfit; a large r costs memory and stability",
    }
    assert all("python -m minilora.compare" in one.verdict for one in told)


def test_gpt_3_counted() -> None:
    big = at_gpt_3()
    assert big.d == 12288
    assert math.isclose(big.fewer[4], 175e9 / (96 * 2 * 4 * 2 * 12288), rel_tol=0.01)
    assert 3 < big.full_bytes / big.lora_bytes < 4.01
    assert lora_share("SmolLM2-135M", 8, ("all-linear",)) == 2442240 / 134515008


# --- Pictures ---


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(0.1, 2))
def test_names_are_moved_apart_in_their_order_and_no_further_than_needed(heights: list[float], gap: float) -> None:
    moved = apart(heights, gap)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    ordered = [moved[i] for i in order]
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(ordered))
    assert math.isclose(sum(moved), sum(heights), abs_tol=1e-6)
    apart_already = [gap * 2 * i for i in range(len(heights))]
    assert apart(apart_already, gap) == apart_already
