"""The benchmark: both sides do the very same work, the floor is counted rightly, and the tables say what was measured.

What is measured is times and memory, of which nothing is asked here: they belong to the machine.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.wrapped_numpy import wrap, wrapped_numpy

from minilora.backend import use_module, xp
from minilora.benchmark import __main__ as benchmark
from minilora.benchmark import formula, measure, ours, products, report, workloads
from minilora.benchmark.inputs import Inputs
from minilora.benchmark.job import Job, JobRow, read_job_rows, steps_of
from minilora.benchmark.workloads import (
    ALL,
    OURS,
    PEFT,
    PRODUCTS,
    QKV,
    QUICK,
    Case,
    Setup,
    Side,
    instruction_lengths,
    llama_cpp,
)
from minilora.data.batches import divide
from minilora.figures import machine, tables
from minilora.formats.checkpoint import random_weights
from minilora.formats.load import load_model
from minilora.formats.peft import read_adapter
from minilora.frozen.weight import DenseWeight
from minilora.lora import lora, lora_backward
from minilora.model.base import base_model
from minilora.model.model import forward
from minilora.model.names import HEAD
from minilora.training.step import loss_and_gradients

needs_peers = pytest.mark.skipif(bool(machine.missing_peers()), reason="needs torch, transformers and peft")
LENGTHS, PROMPTS = [9, 24, 5, 16], [6, 11, 2, 12]
CASE_FIELDS = {"workload", "title", "kind", "device", "tokens", "product_operations", "references", "sides"}
SIDE_FIELDS = {
    *("side", "program", "imported_bytes", "loaded_bytes", "needed_bytes", "peak_bytes", "tokens_per_second"),
    *("seconds", "median_seconds", "min_seconds", "max_seconds"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def model(inputs: Inputs) -> str:
    return inputs.model("tiny")


def training(inputs: Inputs, model: str, targets: tuple[str, ...] = ALL, **options: Any) -> Job:
    """A job of a few rows of different lengths, two of them a step."""
    rows = inputs.rows("few", model, LENGTHS, PROMPTS)
    usual = {"kind": "step"} if options.get("kind") == "step" else {"kind": "epoch", "batch_rows": 2}
    return Job(
        **usual | options,
        model=model,
        adapter=inputs.adapter(model, 4, targets),
        rows=rows,
    )


# --- Both sides do the same ---


@needs_peers
@pytest.mark.parametrize("targets", [QKV, ALL], ids=["q and v", "all-linear"])
def test_both_sides_have_the_same_loss_after_the_same_steps(
    inputs: Inputs, model: str, targets: tuple[str, ...]
) -> None:
    from minilora.benchmark import peft_side

    job = training(inputs, model, targets, kind="step", learning_rate=1e-2)
    losses = []
    for side in (ours.load(job), ours.load(replace(job, frozen="stored")), peft_side.load(job)):
        side.warm_up()
        losses.append([side.run()["losses"][0] for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert len(set(np.round(losses[0], 4))) == 3, "the steps move the adapter"


@needs_peers
def test_both_sides_have_the_same_losses_all_through_an_epoch_and_begin_the_next_one_alike(
    inputs: Inputs, model: str
) -> None:
    from minilora.benchmark import peft_side

    job = training(inputs, model, learning_rate=1e-2)
    mine, theirs = ours.load(job), peft_side.load(job)
    for side in (mine, theirs):
        side.warm_up()
    for _ in range(2):
        found = []
        for side in (mine, theirs):
            side.reset()
            found.append([*side.run()["losses"], side.judge()["final_loss"]])
        assert len(found[0]) == 3
        assert found[0] == pytest.approx(found[1], rel=1e-4)  # the Trainer rounds the losses that it logs


@needs_peers
def test_rows_grouped_by_length_are_the_same_rows_in_another_order(inputs: Inputs, model: str) -> None:
    from minilora.benchmark import peft_side

    side: Any = peft_side.load(training(inputs, model, grouped=True))
    side.reset()
    dealt = [len(side.trainer.train_dataset[i]["input_ids"]) for i in side.trainer._get_train_sampler()]
    assert dealt == sorted(LENGTHS, reverse=True)


@needs_peers
def test_both_sides_generate_the_same_tokens(inputs: Inputs, model: str) -> None:
    from minilora.benchmark import peft_side

    job = Job("generate", model, "", inputs.rows("prompts", model, [7, 7], [7, 7]), new_tokens=6)
    answers = [side.load(job).run()["answers"] for side in (ours, peft_side)]
    assert answers[0] == answers[1]
    assert [len(answer) for answer in answers[0]] == [6, 6]


# --- The data ---


@given(st.integers(1, 300), st.integers(2, 40), st.integers(0, 500), st.integers(0, 2**32))
def test_instruction_rows_stay_in_their_range_and_all_have_a_completion(
    count: int, shortest: int, spread: int, seed: int
) -> None:
    lengths, prompts = instruction_lengths(count, shortest, shortest + spread, seed)
    assert len(lengths) == len(prompts) == count
    assert all(shortest <= length <= shortest + spread for length in lengths)
    assert all(0 < prompt < length for prompt, length in zip(prompts, lengths, strict=True))
    assert instruction_lengths(count, shortest, shortest + spread, seed) == (lengths, prompts)


def test_a_quarter_of_the_instruction_data_is_completions_and_lengths_spread_widely() -> None:
    lengths, prompts = instruction_lengths(1000, 20, 500, seed=0)
    assert 0.22 < 1 - sum(prompts) / sum(lengths) < 0.28
    assert np.quantile(lengths, 0.1) < 50 and np.quantile(lengths, 0.9) > 230


def test_rows_come_back_as_written_and_every_row_is_in_one_step(inputs: Inputs, model: str) -> None:
    job = training(inputs, model, batch_rows=3)
    rows = read_job_rows(job)
    assert [(len(row.tokens), row.prompt) for row in rows] == list(zip(LENGTHS, PROMPTS, strict=True))
    assert all(isinstance(row, JobRow) for row in rows)
    assert [row for step in steps_of(job, rows) for row in step] == rows
    assert [len(step) for step in steps_of(job, rows)] == [3, 1]


# --- The floor ---


class Counting:
    """NumPy, counting the operations of its matrix products."""

    def __init__(self) -> None:
        self.operations = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
        assert out.shape == (len(a), b.shape[1])
        self.operations += 2 * len(a) * a.shape[1] * b.shape[1]
        return np.matmul(a, b, out=out)


@pytest.fixture
def counting() -> Iterator[Counting]:
    module = Counting()
    previous = use_module(module)
    yield module
    use_module(previous)


def test_the_floor_runs_the_very_products_that_are_counted(inputs: Inputs, model: str, counting: Counting) -> None:
    config = load_model(Path(model))[0].config
    prompts = inputs.rows("prompts", model, [7, 7], [7, 7])
    for job in (
        training(inputs, model),
        training(inputs, model, kind="step"),
        Job("generate", model, "", prompts, new_tokens=5),
    ):
        work = products.Products(job, config)
        counting.operations = 0
        work.run()
        assert counting.operations == formula.product_operations(job, config)


def test_the_count_of_products_with_a_pencil(inputs: Inputs, model: str) -> None:
    """tiny: in each of two layers q and o 32², k and v 16·32, gate, up and down 64·32; the tied head 512·32."""
    config = load_model(Path(model))[0].config
    linear, head = 2 * (2 * 32**2 + 2 * 16 * 32 + 3 * 64 * 32), 512 * 32
    labelled = sum(length - prompt for length, prompt in zip(LENGTHS, PROMPTS, strict=True))
    assert formula.product_operations(training(inputs, model), config) == 4 * (sum(LENGTHS) * linear + labelled * head)


def test_the_operations_of_steps_are_those_that_they_make(inputs: Inputs, model: str) -> None:
    """The products alone, six operations a token for each number of the adapters, and attention."""
    job = training(inputs, model)
    config = load_model(Path(model))[0].config
    adapter = read_adapter(Path(job.adapter), config)
    with wrapped_numpy() as module:
        base = base_model(config, {name: wrap(module, w) for name, w in random_weights(config, 0).items()})
        trainable = adapter.method.start(base, wrap(module, np.random.default_rng(0)))
        adapted = adapter.method.attach(base, {name: xp.asarray(p) for name, p in trainable.items()})
        module.flops = 0
        for rows in steps_of(job, read_job_rows(job)):
            loss_and_gradients(adapted, divide(ours.batch_of(rows), 1))
    assert formula.operations(job, config) == module.flops
    adapters = sum(array.size for array in load_file(Path(job.adapter, "adapter_model.safetensors")).values())
    attention = 6 * 2 * 32 * sum(length**2 for length in LENGTHS)  # of T² pairs half are seen, in six products
    assert module.flops > formula.product_operations(job, config) + 6 * sum(LENGTHS) * adapters + attention


class Traced(np.ndarray):
    """An array that counts the operations of every product it comes into."""

    operations = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *arrays: Any, out: Any = None, **options: Any) -> Any:
        plain = [a.view(np.ndarray) if isinstance(a, Traced) else a for a in arrays]
        if ufunc is np.matmul:
            Traced.operations += 2 * plain[0].shape[0] * plain[0].shape[1] * plain[1].shape[1]
        if out:
            options["out"] = tuple(o.view(np.ndarray) for o in out)
        return getattr(ufunc, method)(*plain, **options).view(Traced)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_an_adapter_takes_part_in_six_operations_a_token_for_each_of_its_numbers(
    N: int, m: int, n: int, r: int
) -> None:
    rng = np.random.default_rng(0)
    x, dy, W, A, B = (rng.random(shape) for shape in ((N, n), (N, m), (m, n), (r, n), (m, r)))
    Traced.operations = 0
    _, cache = lora(x.view(Traced), DenseWeight(W), A, B, 2.0)
    lora_backward(dy.view(Traced), DenseWeight(W), A, B, 2.0, cache)
    assert Traced.operations == 4 * N * m * n + 6 * N * (A.size + B.size)


def test_the_bytes_that_must_live_are_those_of_the_arrays(inputs: Inputs, model: str) -> None:
    job = training(inputs, model)
    loaded: Any = ours.load(job)
    base, _ = load_model(Path(model))
    sites = [site for name, site in base.sites.items() if name != HEAD]
    weights = sum(site.weight.dense().nbytes if hasattr(site, "weight") else site.gain.nbytes for site in sites)
    needed = formula.needed_bytes(job, base.config)
    assert needed["weights"] == weights
    assert formula.needed_bytes(replace(job, frozen="stored"), base.config)["weights"] == weights / 2
    assert formula.needed_bytes(replace(job, dtype="bfloat16"), base.config)["activations"] == needed["activations"] / 2
    moments = [*loaded.optimizer.m.values(), *loaded.optimizer.v.values()]
    parameters = [*loaded.flat.arrays.values()]
    assert needed["adapter"] == sum(a.nbytes for a in moments + parameters + parameters)  # a gradient is as large
    all_rows, one_row = (replace(job, batch_rows=rows) for rows in (len(LENGTHS), 1))
    both = formula.needed_bytes(all_rows, base.config)["activations"]
    one = formula.needed_bytes(one_row, base.config)["activations"]
    assert both / one == pytest.approx(sum(LENGTHS) / max(LENGTHS), rel=0.02), "the fullest step"
    assert one == pytest.approx(4 * max(LENGTHS) * (2 * (2 * 32 + 2 * 32 + 2 * 16 + 4 + 2 * 64) + 32), rel=0.05)

    generating = Job("generate", model, "", inputs.rows("prompts", model, [7, 7], [7, 7]), new_tokens=5)
    tokens = np.zeros((2, 12), int)
    _, past, _ = forward(base, tokens, tokens, tokens + 1, keep=False)
    keys_values = sum(k.nbytes + v.nbytes for k, v in past.layers)
    assert formula.needed_bytes(generating, base.config) == {"weights": weights, "keys_values": keys_values}


# --- Measuring ---


def test_sides_take_turns_and_one_that_fails_is_told_of_and_left_out(inputs: Inputs, model: str) -> None:
    broken = Side("broken", "ours", {"frozen": "molten"})
    case = Case("W1", "few rows", training(inputs, model, kind="step"), (OURS[0], broken, PRODUCTS), 2, ("minilora",))
    turns: list[str] = []
    result = measure.measure(case, case.sides, turns.append)
    assert turns == [
        "minilora, warming up",
        "matrix products alone, warming up",
        *("minilora", "matrix products alone") * 2,
    ]
    mine, failed, floor = result["sides"]
    assert "molten" in failed["error"] and "seconds" not in failed
    assert len(mine["seconds"]) == len(floor["seconds"]) == 2
    table = report.case_table(result)
    assert any("broken" in note and "molten" in note for note in table.notes)
    assert "failed" in next(row for row in table.rows if row[0] == "broken")


def outcome_of(*sides: tuple[str, str, float, int]) -> measure.Result:
    """An outcome of name, program, seconds and peak bytes of each side; 100 tokens, 1000 bytes that must live."""
    return {
        "workload": "W1",
        "title": "as drawn",
        "kind": "step",
        "references": ["peer", "absent"],
        "sides": [
            {"side": name, "program": program, "needed_bytes": {"weights": 900, "adapter": 100}, "peak_bytes": peak}
            | dict.fromkeys(("median_seconds", "min_seconds", "max_seconds"), seconds)
            | {"seconds": [seconds], "tokens_per_second": 100 / seconds}
            for name, program, seconds, peak in sides
        ],
    }


times, peaks = st.floats(0.01, 100), st.integers(1000, 10**12)


@given(times, times, times, peaks, peaks)
def test_ratios_are_those_of_speed_and_of_memory(a: float, b: float, floor: float, p: int, q: int) -> None:
    outcome = outcome_of(("mine", "ours", a, p), ("peer", "peft_side", b, q), ("floor", "products", floor, 1))
    measure.compare(outcome)
    mine, theirs, alone = outcome["sides"]
    assert mine["speed_against"] == pytest.approx({"peer": b / a})
    assert mine["memory_against"] == {"peer": p / q}
    assert mine["times_floor_seconds"] == a / floor and mine["times_floor_bytes"] == p / 1000
    assert theirs["speed_against"] == {"peer": 1} and theirs["memory_against"] == {"peer": 1}
    assert alone["times_floor_seconds"] == 1 and "memory_against" not in alone
    table = report.case_table(outcome)
    line = dict(zip(table.head, table.rows[0], strict=True))
    assert line["speed / [1]"] == f"{mine['speed_against']['peer']:.2f}×"
    assert line["memory / [1]"] == f"{p / q:.2f}×" and line["time / floor"] == f"{a / floor:.2f}×"
    assert "speed / [2]" not in line and table.rows[1][0] == "peer [1]"


def test_the_same_tokens_are_counted_against_the_first_reference() -> None:
    outcome = outcome_of(("mine", "ours", 1.0, 1), ("peer", "peft_side", 1.0, 1))
    outcome["sides"][0]["answers"], outcome["sides"][1]["answers"] = [[1, 2], [3, 4]], [[1, 2], [4, 3]]
    measure.compare(outcome)
    assert [side["same_tokens"] for side in outcome["sides"]] == [0.5, 1.0]
    assert not any("answers" in side for side in outcome["sides"]), "the tokens themselves are of no further use"


def test_the_median_of_the_runs_counts_and_of_an_epoch_the_loss_after_it() -> None:
    runs = [{"seconds": t, "losses": [loss], "peak_bytes": int(t)} for t, loss in ((5.0, 3.0), (1.0, 2.0), (2.0, 1.0))]
    result: measure.Result = {"runs": list(runs)}
    measure.side_summary(result, tokens=10)
    assert (result["median_seconds"], result["min_seconds"], result["max_seconds"]) == (2, 1, 5)
    assert (result["tokens_per_second"], result["losses"], result["loss"]) == (5, [3, 2, 1], 1)
    epoch: measure.Result = {"runs": [{"seconds": 1.0, "losses": [3.0, 2.0], "final_loss": 1.5, "peak_bytes": 1}]}
    measure.side_summary(epoch, tokens=10)
    assert (epoch["losses"], epoch["loss"]) == ([3, 2], 1.5)


@needs_peers
def test_in_processes_of_their_own_both_sides_have_the_same_loss_and_the_table_their_ratios(
    inputs: Inputs, model: str
) -> None:
    sides = (OURS[0], PEFT[0], PRODUCTS)
    case = Case("W1", "few rows", training(inputs, model, kind="step"), sides, 1, ("PEFT float32", "PEFT bfloat16"))
    result = measure.measure(case, sides)
    mine, theirs, floor = result["sides"]
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert mine["speed_against"] == pytest.approx({"PEFT float32": theirs["median_seconds"] / mine["median_seconds"]})
    assert mine["tokens_per_second"] == pytest.approx(sum(LENGTHS) / mine["median_seconds"])
    assert floor["times_floor_seconds"] == 1
    table = report.case_table(result)
    assert "speed / [1]" in table.head and "speed / [2]" not in table.head


@pytest.mark.skipif(not (find_spec("xllamacpp") and find_spec("gguf")), reason="pip install -e '.[peers]'")
def test_llama_cpp_continues_the_same_prompts_from_the_same_weights(inputs: Inputs, tmp_path: Path) -> None:
    from support.gguf_models import write_model

    model = str(write_model(tmp_path / "model"))
    sides = (OURS[0], *llama_cpp(inputs, model))
    assert [side.name for side in sides[1:]] == ["llama.cpp float32", "llama.cpp bfloat16"]
    assert not [*llama_cpp(inputs, inputs.model("tiny"))], "it has fewer tokens than the tokenizer beside it"
    job = Job("generate", model, "", inputs.rows("two prompts", model, [5, 5], [5, 5]), new_tokens=6)
    result = measure.measure(Case("W3", "few tokens", job, sides, 1, ("llama.cpp float32",)), sides)
    mine, theirs, _ = result["sides"]
    assert mine["tokens_per_second"] == pytest.approx(12 / mine["median_seconds"])
    assert theirs["tokens_per_second"] == pytest.approx(12 / theirs["median_seconds"])


# --- The command ---


class Run:
    def __init__(self, folder: Path, *flags: str, without_peers: bool = True) -> None:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            if without_peers:
                patch.setattr(machine, "find_spec", lambda name: None if name == "peft" else find_spec(name))
            self.code = benchmark.main(["--quick", "--threads", "1", "--out", str(folder), *flags])
        self.folder, self.out, self.err = folder, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All workloads that need no GPU, as they are where PEFT is not installed."""
    folder = tmp_path_factory.mktemp("quick")
    page = folder / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    flags = ("--workload", "W1", "W2", "W3", "W4", "W5", "--repeats", "1", "--markdown", str(page))
    return Run(folder / "out", *flags)


def test_every_workload_writes_all_its_figures_and_a_missing_peer_is_left_out(quick: Run) -> None:
    assert quick.code == 0, quick.err
    assert re.search(r"PEFT left out: (.*, )?peft not installed", quick.out)  # perhaps others are missing as well
    results = json.loads((quick.folder / "benchmark.json").read_text())
    assert results["machine"]["numpy"] == np.__version__ and results["machine"]["threads"] == 1
    assert {"processor", "cores", "blas", "memory_bytes", "gpu", "torch"} <= results["machine"].keys()
    assert results["settings"]["quick"] and results["notes"]
    count = {"W1": 2, "W2": 1, "W3": 1, "W4": 1, "W5": 1 + sum(map(len, QUICK.growth.values()))}
    found = [outcome["workload"] for outcome in results["workloads"]]
    assert {name: found.count(name) for name in found} == count
    for outcome in results["workloads"]:
        programs = [side["program"] for side in outcome["sides"]]
        if outcome["workload"] == "W4":
            assert outcome["summary"]["steps"] == 2 and outcome["sides"][0]["seconds"]
            continue
        assert CASE_FIELDS <= outcome.keys()
        assert "peft_side" not in programs and "ours" in programs
        for side in outcome["sides"]:
            assert SIDE_FIELDS <= side.keys()
            assert ("times_floor_seconds" in side) == ("products" in programs)
            assert ("loss" in side) == (outcome["kind"] != "generate" and side["program"] == "ours")
        if outcome["workload"] == "W5":
            assert {"axis", "value", "operations"} <= outcome.keys()
            assert outcome["sides"][0]["predicted_bytes"] > outcome["sides"][0]["imported_bytes"]
            assert outcome["sides"][0]["predicted_seconds"] > 0


def test_the_table_is_printed_and_written_and_the_pictures_are_drawn(quick: Run) -> None:
    written = (quick.folder / "benchmark.md").read_text()
    for text in (quick.out, written):
        assert "W1: a step on 2 × 16 tokens, rank 8 on all-linear" in text
        assert "time / floor" in text and "W5: how time and memory grow" in text
    page = (quick.folder.parent / "page.md").read_text()
    assert page == f"before\n{tables.BEGIN}\n\n{written}\n{tables.END}\nafter\n"
    for name in ("benchmark.png", "growth.png"):
        assert (quick.folder / name).read_bytes().startswith(b"\x89PNG")


def test_growth_changes_one_thing_at_a_time(inputs: Inputs) -> None:
    cases = list(workloads.growth(Setup(inputs, QUICK, "tiny", "cpu", 1, 1)))
    base = cases[0]
    counts = {case.axis: formula.operations(case.job, workloads.config_of(case)) for case in cases}
    for case in cases[1:]:
        config, rows = workloads.config_of(case), read_job_rows(case.job)
        found = {
            "tokens": sum(len(row.tokens) for row in rows),
            "rank": json.loads(Path(case.job.adapter, "adapter_config.json").read_text())["r"],
            "layers": config.num_hidden_layers,
            "context": len(rows[0].tokens),
        }
        assert found[case.axis] == case.value
        usual = {"tokens": 32, "rank": 8, "layers": 2, "context": 16}
        assert {name for name in found if found[name] != usual[name]} <= {case.axis}
    assert counts["rank"] < counts[base.axis] and counts["layers"] < counts[base.axis]
    assert counts["context"] < counts[base.axis], "less attention, all else being equal"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--workload", "W1", "--repeats", "0"), "--repeats and --threads must be at least 1"),
        (("--workload", "W1", "--model", "nowhere"), "nowhere is neither a file nor a known configuration"),
        (("--workload", "W1", "--markdown", __file__), "has no lines <!-- begin of results -->"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_measured(
    tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    run = Run(tmp_path / "out", *flags)
    assert run.code == 2
    assert words in run.err and run.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not machine.gpu_trouble(), reason="here is a GPU")
def test_without_a_gpu_its_workload_is_left_out_and_asking_for_it_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path / "out", "--workload", "W6")
    assert run.code == 0
    assert "W6 left out: no usable GPU" in run.out
    run = Run(tmp_path / "out", "--workload", "W1", "--device", "cuda")
    assert run.code == 2
    assert "--device cuda: no usable GPU" in run.err
