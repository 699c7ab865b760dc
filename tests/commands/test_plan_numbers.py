"""What `plan` publishes: at the size of real rows against closed forms, and each cell of its tables by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import PAIRS, good

from minilora.counting.step_count import Flops, StepCount, Storage, count_step
from minilora.data.batches import collate
from minilora.data.examples import Example, encode_row
from minilora.data.tokenizer import Tokenizer
from minilora.formats.known_configs import KNOWN_CONFIGS
from minilora.methods.bitfit import BitFit
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.model.config import Config
from minilora.plan.figures import run_figures
from minilora.plan.planned_run import MicroBatch, PlannedRun
from minilora.plan.report import comparison, flops_table, heading, memory_table, size
from minilora.runs.settings import make_settings

SMOLLM = Config.from_dict(KNOWN_CONFIGS["SmolLM2-135M"])
B, L, D, F, V, H, K, d = 2, 30, 576, 1536, 49152, 9, 3, 64  # rows, and the sizes of SmolLM2-135M
QV = LoRA(8, target_modules=("q_proj", "v_proj"))
LABELLED = 1500


def counted(length: int, method: Method = QV, labelled: int = LABELLED, rows: int = B, **options: Any) -> StepCount:
    batch = MicroBatch(rows, length, labelled).draw(SMOLLM, np.random.default_rng(0))
    return count_step(SMOLLM, method, batch, **options)


def pairs(length: int) -> int:
    """The queries and keys of a row that are multiplied: 64 queries at a time, with all keys up to the last of them."""
    starts = range(0, length, 64)
    return sum(min(64, length - start) * min(start + 64, length) for start in starts)


# --- FLOPs ---


@pytest.mark.parametrize("length", [2, 64, 65, 200, 1024])
def test_the_flops_of_a_step_follow_a_closed_form_at_any_length(length: int) -> None:
    """Two products of q, k and v forwards and five backwards, two operations for each of d features and each head."""
    N, labelled = B * length, length  # half of the labels
    weights = L * (2 * D * D + 2 * D * K * d + 3 * D * F)
    adapters = L * 8 * (2 * D + D + K * d)
    count = counted(length, labelled=labelled)
    attention = 2 * B * L * H * d * pairs(length)
    head = 2 * labelled * D * V
    assert count.forward == Flops(2 * N * weights, 2 * N * adapters, 2 * attention, head)
    assert count.backward == Flops(2 * N * weights, 4 * N * adapters, 5 * attention, head)


def test_of_1024_tokens_in_16_blocks_a_little_more_than_half_of_all_pairs_are_multiplied() -> None:
    assert pairs(1024) == 64 * 64 * (16 * 17 // 2) == 1024 * 1024 * 17 // 32


def test_with_checkpointing_the_backward_makes_every_product_of_the_layers_forward_again() -> None:
    usual, again = counted(1024), counted(1024, checkpointing=True)
    assert again.forward == usual.forward
    added = Flops(*(a - b for a, b in zip(again.backward, usual.backward, strict=True)))
    assert added == usual.forward._replace(head=0)


def test_full_fine_tuning_makes_a_product_more_for_each_weight() -> None:
    full, lora = counted(1024, Full()), counted(1024)
    assert full.forward == lora.forward._replace(trained=0)
    assert full.backward._replace(trained=0) == lora.backward._replace(trained=0)
    assert full.backward.trained == full.forward.weights + full.forward.head


def test_micro_batches_multiply_the_products_and_parts_do_not() -> None:
    one = counted(128)
    three = counted(128, micro_batches=3)
    assert three.forward == Flops(*(3 * n for n in one.forward))
    assert three.backward == Flops(*(3 * n for n in one.backward))
    assert counted(128, parts=2)[-3:] == one[-3:]


def test_packed_examples_are_not_multiplied_with_each_other() -> None:
    """Four examples of 256 tokens in a row cost what they cost as rows of their own."""
    examples = [Example([7] * 256, [True] * 256) for _ in range(4)]
    packed, apart = (count_step(SMOLLM, QV, collate(rows, 0)) for rows in ([examples], [[e] for e in examples]))
    assert packed.forward == apart.forward and packed.backward == apart.backward
    assert packed.forward.attention == 2 * 2 * L * H * d * 4 * pairs(256)


# --- Bytes ---


def kept_by_a_token(method: Method) -> int:
    """Numbers a layer keeps of a token: the norms' inputs and inverse lengths, q, k, v, attention's output and row
    sums, gate and up; LoRA on q and v keeps the input of both, which is one array, and two h."""
    frozen = 2 * (D + 1) + H * d + 2 * K * d + H * d + H + 2 * F
    return frozen + (D + 2 * 8 if method is QV else 0)


@pytest.mark.parametrize("method", [QV, BitFit()], ids=["q and v", "BitFit"])
@pytest.mark.parametrize("length", [64, 65, 1024])
def test_what_the_forward_keeps_follows_a_closed_form_at_any_length(method: Method, length: int) -> None:
    """Beside the layers: the last norm's input, RoPE's cos and sin, and who sees whom."""
    N, labelled = B * length, length
    layers = 4 * L * N * kept_by_a_token(method)
    rest = 4 * N * (D + 1) + 2 * 4 * N * d // 2 + B * pairs(length) + 4
    assert counted(length, method, labelled).activations == layers + rest


def test_the_bytes_that_grow_with_nothing_but_the_method() -> None:
    """AdamW has two moments and the number of its steps. In 16 bits a matrix takes half, a norm's gain does not."""
    adapters = L * 8 * (2 * D + D + K * d)
    numbers = V * D + L * (2 * D * D + 2 * D * K * d + 3 * D * F + 2 * D) + D
    count = counted(1024)
    assert (count.weights, count.trainable, count.gradients) == (4 * numbers, 4 * adapters, 4 * adapters)
    assert count.optimizer == 2 * 4 * adapters + 8
    assert count.between_steps == 4 * numbers + 12 * adapters + 8
    assert count.total == count.between_steps + max(count.moments.values())
    stored = counted(1024, storage=Storage(frozen="stored"))
    assert stored.weights == 2 * numbers + 2 * (2 * L + 1) * D
    full = counted(64, Full(), labelled=2)
    assert (full.trainable, full.optimizer, full.gradients) == (4 * numbers, 8 * numbers + 8, 4 * numbers)


def test_a_chunk_of_the_loss_is_256_rows_of_logits_and_of_the_hidden_states_and_their_gradient() -> None:
    """And the loss: a number, or two where that of the next chunk is added."""
    assert counted(1024).loss_chunk == 256 * 4 * (V + 2 * D) + 8
    assert counted(1024, labelled=100).loss_chunk == 100 * 4 * (V + 2 * D) + 4


def test_parts_side_by_side_take_their_bytes_as_often_as_there_are_parts() -> None:
    """Two rows in two parts: each keeps what one row alone does."""
    alone, parts = counted(1024, labelled=750, rows=1), counted(1024, labelled=1500, parts=2)
    assert parts.activations == 2 * alone.activations and parts.loss_chunk == 2 * alone.loss_chunk
    for moment, most in alone.moments.items():
        assert parts.moments[moment] == (most if moment == "the update" else 2 * most)


def test_with_several_micro_batches_the_gradients_so_far_live_beside_those_that_are_made() -> None:
    one, two = counted(256, labelled=400), counted(256, labelled=400, micro_batches=2)
    for moment, most in one.moments.items():
        assert two.moments[moment] == most + (0 if moment == "the update" else one.gradients)


# --- The figures of a run ---


def planned(**settings: Any) -> PlannedRun:
    usual = {"batch_size": 2, "grad_accumulation": 1, "max_length": 64}
    made = make_settings(usual | settings)
    return PlannedRun("a model", made, SMOLLM, None, QV, MicroBatch(2, 64, 100), Storage())


def test_the_figures_are_those_of_the_counted_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.training.parts.cores", lambda: 1)
    found, count = run_figures(planned()), counted(64, labelled=100)
    adapters = L * 8 * (2 * D + D + K * d)
    this = found["this"]
    assert this["trainable_parameters"] == adapters and found["full"]["trainable_parameters"] == found["parameters"]
    assert this["memory"] == {
        name: getattr(count, name)
        for name in (
            "weights", "trainable", "optimizer", "gradients", "activations", "loss_chunk", "moments", "fullest",
            "between_steps", "total",
        )
    }  # fmt: skip
    total = count.forward.total + count.backward.total
    assert this["flops"] == {"forward": count.forward._asdict(), "backward": count.backward._asdict(), "total": total}
    assert this["head_share"] == (count.forward.head + count.backward.head) / total
    assert this["calls"] == count.calls
    assert found["checkpoint_file"] - 2 * found["parameters"] in range(8, 50_000)  # and a header
    assert this["saved_file"] - 4 * adapters in range(8, 50_000)
    assert found["full"]["saved_file"] - 4 * found["parameters"] in range(8, 50_000)
    assert found["work"] == {"rows": 2, "length": 64, "labelled": 100}


@pytest.mark.parametrize(("cores", "parts"), [(1, 1), (2, 2), (4, 2), (8, 1)])
def test_the_plan_divides_a_batch_as_training_does(cores: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.training.parts.cores", lambda: cores)
    memory = run_figures(planned())["this"]["memory"]
    assert memory["moments"] == counted(64, labelled=100, parts=parts).moments
    on_a_gpu = run_figures(planned(device="cuda"))["this"]["memory"]["moments"]
    assert on_a_gpu == counted(64, labelled=100, on_cpu=False).moments


# --- The tables ---


def column(start: int, **moments: int) -> dict[str, Any]:
    """A method's figures, no two of which are equal: start + 1 MB, start + 2 MB, …"""
    names = ("weights", "trainable", "optimizer", "between_steps", "gradients", "activations", "loss_chunk", "total")
    memory: dict[str, Any] = {name: (start + i) * 10**6 for i, name in enumerate(names, start=1)}
    return {
        "trainable_parameters": start * 25, "saved_file": (start + 9) * 10**6,
        "memory": memory | {"moments": moments, "fullest": max(moments, key=lambda name: moments[name])},
    }  # fmt: skip


FIGURES = {
    "parameters": 1_000_000, "checkpoint_file": 2_500_000, "interpreter": 77_000_000,
    "this": column(100, first=3_000_000, second=4_000_000),
    "full": column(400, first=9_000_000, third=8_000_000),
}  # fmt: skip


def cells(line: str) -> tuple[str, list[str]]:
    """A line's name and its cells, which are 17 wide."""
    return line[:37].rstrip(), [line[i : i + 17].strip() for i in range(37, len(line), 17)]


def test_each_line_of_the_memory_shows_the_figures_that_it_names() -> None:
    found = dict(cells(line) for line in memory_table(planned(), FIGURES))
    assert cells(memory_table(planned(), FIGURES)[0]) == ("", ["lora", "full", "full / lora"])
    assert found["parameters that train"] == ["2,500", "10,000", "0.250%"]
    names = (
        "frozen weights", "trained parameters", "state of adamw", "between steps", "gradients", "kept for the backward",
        "a chunk of the loss", "the most at any time", "the saved file",
    )  # fmt: skip
    for i, name in enumerate(names, start=1):
        assert found[name] == [f"{100 + i}.00 MB", f"{400 + i}.00 MB", f"{(400 + i) / (100 + i):.2f}×"]
    assert found["  at first"] == ["3.00 MB", "→ 9.00 MB", "3.00×"]
    assert found["  at second"] == ["→ 4.00 MB", "", ""] and found["  at third"] == ["", "8.00 MB", ""]
    assert found["interpreter and libraries, about"] == ["77.00 MB", "77.00 MB", ""]


def test_each_line_of_the_flops_shows_the_figures_that_it_names() -> None:
    figures: dict[str, Any] = {
        name: {
            "flops": {
                "forward": {"weights": n, "trained": 2 * n, "attention": 3 * n, "head": 4 * n},
                "backward": {"weights": 5 * n, "trained": 6 * n, "attention": 7 * n, "head": 8 * n},
                "total": 36 * n,
            },
            "calls": 1_100 * n, "head_share": n / 32,
        }
        for name, n in (("this", 1), ("full", 10))
    }  # fmt: skip
    assert cells(flops_table(figures)[0]) == (
        "FLOPs of a step", ["forward", "backward", "full: forward", "backward"],
    )  # fmt: skip
    found = dict(map(cells, flops_table(figures)[:-1]))
    assert found["frozen products"] == ["1", "5", "10", "50"]
    assert found["products for training"] == ["2", "6", "20", "60"]
    assert found["attention"] == ["3", "7", "30", "70"]
    assert found["head"] == ["4", "8", "40", "80"]
    assert found["sum"] == ["10", "26", "100", "260"]
    assert found["calls"] == ["1,100", "", "11,000", ""]
    assert flops_table(figures)[-1] == "36 in all, full 360; head 3.1%"


def test_the_heading_says_the_model_and_the_rows() -> None:
    run = planned()._replace(storage=Storage("float64", "stored", "float16"))
    assert heading(run, FIGURES) == [
        "a model: 30 layers of width 576, 1,000,000 parameters, 2.50 MB in float16",
        "2 × 64 tokens, 100 with a label; computed in float64, frozen weights stored",
        "rows: full rows",
    ]
    three = planned(grad_accumulation=3)._replace(storage=Storage(frozen="nf4", mixed_precision="bf16"))
    assert heading(three, FIGURES)[1] == (
        "3 × 2 × 64 tokens, 300 with a label; computed in float32, frozen weights nf4, products with them in bf16"
    )
    half = planned()._replace(storage=Storage(mixed_precision="fp16"))
    assert heading(half, FIGURES)[1].endswith("frozen weights fp16, products with them in fp16")


def test_counted_and_measured_stand_side_by_side() -> None:
    """The process's own peak is compared with what it had imported and the counted step together."""
    measured = {"imported": 30_000_000, "between_steps": 40_000_000, "peak": 60_000_000, "resident": 80_000_000}
    lines = comparison({"between_steps": 50_000_000, "total": 90_000_000}, measured)
    assert list(map(cells, lines)) == [
        ("", ["counted", "measured", "counted/measured"]),
        ("between steps", ["50.00 MB", "40.00 MB", "1.250"]),
        ("the most at any time", ["90.00 MB", "60.00 MB", "1.500"]),
        ("the process, by the system's account", ["120.00 MB", "80.00 MB", "1.500"]),
    ]


def test_bytes_are_in_decimal_units() -> None:
    found = [size(count) for count in (12, 999_994, 10**6, 10**9 - 1, 10**9, 1_234_500_000_000)]
    assert found == ["0.01 kB", "999.99 kB", "1.00 MB", "1,000.00 MB", "1.00 GB", "1.23 TB"]


def test_with_data_the_plan_is_that_of_the_longest_micro_batch(model: Path, data: Path) -> None:
    """Padding included, and with the labels that its rows have: not of rows as long as the context."""
    tokenizer = Tokenizer.load(model)
    lengths = {row["prompt"]: len(encode_row(row, tokenizer).tokens) for row in PAIRS}
    longest = max(lengths.values())
    flags = ("--model", model, "--data", data / "train-only", "--json")
    alone = json.loads(good("plan", *flags, "--batch-size", 1))
    assert alone["work"]["rows"] == 1 and alone["work"]["length"] == longest
    (row,) = (row for row in PAIRS if lengths[row["prompt"]] == longest)
    assert alone["work"]["labelled"] == sum(encode_row(row, tokenizer).trained)
    together = json.loads(good("plan", *flags, "--batch-size", len(PAIRS)))
    assert together["work"]["length"] == longest and together["work"]["rows"] == len(PAIRS)
    assert together["this"]["memory"]["total"] > alone["this"]["memory"]["total"]
    told = good("plan", *flags[:-1], "--batch-size", 1)
    assert f"1 × {longest} tokens" in told and f"the longest micro-batch of {data / 'train-only'}" in told
    shape = good("plan", "--model", "SmolLM2-135M", "--data", data / "train-only", "--batch-size", 1)
    assert "1 × 1024 tokens" in shape and "no tokenizer" in shape
