"""`plan --ranks`: the model of a step on many ranks against closed forms, and its message against a real one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import assert_refused, good, run
from support.strategies import sizes

from minilora.plan import ranks as model
from minilora.plan.ranks import LINKS, Link, Rates, allreduce_seconds, message_bytes, relay_seconds, scaling
from minilora.plan.report import ranks_table
from minilora.plan.scale import COUNTS, LORA_RANKS, MODELS
from minilora.training.message import Layout

LINK, RATES = Link(1e-3, 1e9), Rates(1e12, 5e9)
counts, times = st.integers(1, 40), st.floats(1e-3, 10)
messages = st.integers(64, 10**8)


@given(shapes=st.lists(st.tuples(sizes, sizes), max_size=5))
def test_the_message_has_the_length_of_a_real_one(shapes: list[tuple[int, int]]) -> None:
    named = {f"A{i}": shape for i, shape in enumerate(shapes)}
    layout = Layout({name: np.zeros(shape, np.float32) for name, shape in named.items()})
    assert message_bytes(named) == layout.bytes


@given(k=counts, t=times, message=messages)
def test_one_rank_sends_nothing(k: int, t: float, message: int) -> None:
    for way in (relay_seconds, allreduce_seconds):
        assert way(1, k, t, message, LINK, RATES) == pytest.approx(k * t)


@given(n=st.integers(2, 40), rounds=st.integers(1, 5), t=times, message=messages)
def test_where_all_rounds_but_the_last_hide_the_step_has_a_closed_form(
    n: int, rounds: int, t: float, message: int
) -> None:
    hop, touch = LINK.alpha + message / LINK.beta, model.TOUCHED * message / RATES.memory
    t += n * (hop + touch)
    broadcast = (math.ceil(math.log2(n)) + n - 1) * LINK.alpha + 2 * (n - 1) / n * message / LINK.beta
    expected = rounds * (t + touch) + (n - 1) * (hop + touch) + broadcast
    assert relay_seconds(n, rounds * n, t, message, LINK, RATES) == pytest.approx(expected)


@given(n=counts, k=counts, t=times, message=messages)
def test_no_step_is_faster_than_its_computation_and_none_is_more_than_efficient(
    n: int, k: int, t: float, message: int
) -> None:
    found = scaling(n, k, t, message, LINK, RATES)
    assert found.seconds >= math.ceil(k / n) * t * (1 - 1e-12)
    assert 0 < found.efficiency <= 1 + 1e-12 and 0 < found.allreduce <= 1 + 1e-12


def test_a_message_without_length_over_a_link_without_latency_costs_nothing() -> None:
    assert scaling(8, 32, 0.5, 0, Link(0.0, 1e9), RATES)[1:] == (pytest.approx(2.0), pytest.approx(1), pytest.approx(1))


def test_the_command_times_the_flags_step_on_more_and_more_ranks() -> None:
    flags = ("--model", "SmolLM2-135M", "--batch-size", 4, "--max-length", 64, "--rank", 8)
    cluster = ("--ranks", 6, "--interconnect", "25GbE", "--tflops", 0.5)
    found = json.loads(good("plan", *flags, "--grad-accumulation", 12, *cluster, "--json"))
    ranks, this = found["ranks"], found["this"]
    assert [step["ranks"] for step in ranks["steps"]] == [1, 2, 4, 6]
    assert (ranks["micro_batches"], ranks["link"]) == (12, LINKS["25GbE"]._asdict())
    assert ranks["micro_batch_seconds"] == pytest.approx(this["flops"]["total"] / 12 / 0.5e12)
    assert ranks["steps"][0]["seconds"] == pytest.approx(this["flops"]["total"] / 0.5e12)
    assert ranks["message_bytes"] == pytest.approx(4 * this["trainable_parameters"], rel=1e-3)
    assert ranks["memory_of_each"] == this["memory"]["total"] + 2 * ranks["message_bytes"]
    efficiencies = [step["efficiency"] for step in ranks["steps"]]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[0] == 1
    few = json.loads(good("plan", *flags, "--ranks", 2, "--interconnect", "NVLink", "--json"))["ranks"]
    assert few["micro_batches"] == 2 and few["rates"]["flops"] > 1e8 < few["rates"]["memory"], "measured here"


@pytest.mark.parametrize("threads", [4, 1])
def test_ranks_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("minilora.plan.figures.usable_cores", lambda: 4)
    monkeypatch.setattr("minilora.plan.figures.cores", lambda: threads)
    flags = ("--model", "SmolLM2-135M", "--batch-size", 4, "--max-length", 64, "--grad-accumulation", 8)
    found = json.loads(good("plan", *flags, "--ranks", 4, "--json"))["ranks"]
    alone, *shared = (step["seconds"] for step in found["steps"])
    expected = [alone, alone] if threads == 4 else [alone / 2, alone / 4]
    assert shared == pytest.approx(expected, rel=0.3) and all(a > b for a, b in zip(shared, expected, strict=True))


def test_the_table_has_a_line_for_each_number_of_ranks() -> None:
    figures: dict[str, Any] = {
        "micro_batches": 1024, "flags": 1, "micro_batch_seconds": 0.25, "rates": {"flops": 4e11, "memory": 1e10},
        "message_bytes": 9_770_000, "interconnect": "25GbE", "link": {"alpha": 30e-6, "beta": 3.125e9},
        "memory_of_each": 2_000_000_000,
        "steps": [scaling(n, 1024, 0.25, 9_770_000, LINKS["25GbE"], Rates(4e11, 1e10))._asdict() for n in (1, 2)],
    }  # fmt: skip
    first, head, one, two = ranks_table(figures)
    assert first == (
        "1,024 micro-batches, one for each rank (--grad-accumulation), each of 0.25 s, at 400 GFLOP/s; "
        "a message of 9.77 MB over 25GbE, 30 µs and 3.12 GB/s; 2.00 GB a rank"
    )
    assert head.split() == ["ranks", "seconds", "a", "step", "efficiency", "by", "allreduce"]
    assert one.split() == ["1", "256", "100.0%", "100.0%"] and two.split()[0] == "2"


def test_mistakes_are_told_by_flag() -> None:
    for flags, named in (
        (("--ranks", 0), "--ranks 0"),
        (("--ranks", 2, "--tflops", -1), "--tflops"),
        (("--interconnect", "NVLink"), "give --ranks"),
        (("--ranks", 2, "--interconnect", "token-ring"), "--interconnect"),
        (("--ranks", 10_000), "name an --interconnect"),
    ):
        assert_refused(run("plan", "--model", "SmolLM2-135M", *flags), named)


def test_the_page_of_scaling_is_drawn_and_counted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.plan.scale.MODELS", {"SmolLM2-135M": "#08519c"})
    page = tmp_path / "scale.md"
    page.write_text("<!-- begin of results -->\n<!-- end of results -->\n")
    out = good("plan.scale", "--plot", tmp_path / "scale.png", "--markdown", page)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    for rank in LORA_RANKS:
        assert f"SmolLM2-135M, r = {rank}" in out and f"| SmolLM2-135M, r = {rank} |" in page.read_text()
    assert COUNTS[-1] == 1024 and [*MODELS][-1] == "Llama-3.1-70B"
