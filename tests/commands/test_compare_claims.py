"""Every claim tells the figures that it names, and its verdict is seen to turn exactly at its threshold."""

from __future__ import annotations

from typing import Any

import pytest
from support.comparisons import comparison_of, failed_figures, few_shot_figures, method_figures, spectrum_figures

from minilora.compare import claims as judged
from minilora.compare.claims import HERE, NOT, THERE, UNKNOWN, Claim, as_page, claims
from minilora.compare.scale import at_gpt_3

FULL = method_figures(
    "full", rank=None, trainable_parameters=1_000_000, best_rate=0.002, update_bytes=12_000_000,
    peak_memory_bytes=500_000_000, file_bytes=4_000_000, seconds_per_step=0.31, loss=[0.4, 0.45],
    exact_match=[0.5, 0.52], drift_kl=[0.5, 0.75],
)  # fmt: skip
LORA = method_figures("lora")


def rank_figures(rank: int, trained: int, loss: list[float]) -> dict[str, Any]:
    return method_figures(f"lora-r{rank}", rank=rank, trainable_parameters=trained, loss=loss)


RANKS = [
    rank_figures(2, 1_500, [1.0, 1.5]),
    rank_figures(8, 6_000, [0.5, 0.55]),
    failed_figures("lora-r16") | {"rank": 16},
    rank_figures(32, 9_000, [0.61]),
    rank_figures(64, 90_000, [0.7, 0.71]),
]
OTHERS = [
    method_figures(name, trainable_parameters=2_000, loss=[loss, loss], exact_match=[0.3, 0.34])
    for name, loss in (
        ("rslora", 0.1), ("qlora", 1.0), ("dora", 0.11), ("random", 1.1), ("head", 1.2), ("bitfit", 1.3),
        ("prompt", 1.4),
    )
]  # fmt: skip


def found(
    lora: dict[str, Any] | None = None, full: dict[str, Any] | None = None, other: dict[str, Any] | None = None,
    name: str = "", **parts: Any,
) -> dict[str, Any]:  # fmt: skip
    """All figures, with some of LoRA, of full fine-tuning or of the method `name` changed."""
    others = [method | (other or {}) if method["method"] == name else method for method in OTHERS]
    few = few_shot_figures() | (other or {} if name == "few-shot" else {})
    usual = {"ranks": RANKS, "cipher": [FULL, LORA | {"loss": [0.9, 0.9]}], "spectrum": spectrum_figures()}
    return comparison_of(FULL | (full or {}), LORA | (lora or {}), *others, few, **usual | parts)


def the(claim: str, comparison: dict[str, Any]) -> Claim:
    (one,) = (one for one in claims(comparison) if claim in one.claim)
    return one


# --- What is told ---


@pytest.mark.parametrize(
    ("claim", "measured"),
    [
        (
            "under 1 %",
            "0.30% at r = 4, 0.60% at r = 8, 0.90% at r = 32 on every linear map of this model; 0.09% at r = 8, 0.18% "
            "at r = 16, 0.37% at r = 32 on q and v of SmolLM2-1.7B, and 0.53% at r = 8 on every linear map",
        ),
        (
            "little memory",
            "gradients and AdamW 0.3% of full fine-tuning's; the process's peak 83%, interpreter and evaluation "
            "included",
        ),
        ("small adapter", "0.01 MB against 4.00 MB"),
        ("trains fast", "a step takes 70% of full fine-tuning's time"),
        (
            "M = r(n + m)",
            "3,000, which is Σ r(n + m) over the maps: 0.3% here; SmolLM2-135M, every linear map: 0.91% at r = 4, "
            "1.82% at r = 8, 3.63% at r = 16",
        ),
        (
            "2dr numbers",
            "d = 12,288, r = 4: 98,304 instead of 150,994,944, 0.065%. At tinysmol's d = 256 and r = 8 4,096 instead "
            "of 65,536, 6.250%",
        ),
        (
            "10,000 times",
            "36,995 at r = 1, 18,498 at r = 2, 9,249 at r = 4 times fewer on q and v of GPT-3's shape; here 333 times",
        ),
        (
            "3 times less memory",
            "weights, gradients and AdamW of GPT-3's shape in float32: 2.79 TB against 0.70 TB, 4.0 times (the paper: "
            "1.2 TB against 0.35 TB). Here the peaks are 1.2 times apart",
        ),
        ("no latency", "1.25 ms a token by the base, 1.75 with the adapter beside it, 1.26 merged"),
        (
            "matches full",
            "held-out loss 0.625 ± 0.125 (lora) against 0.425 ± 0.025 (full); exact match 43.0% against 51.0%",
        ),
        (
            "better than the other",
            "held-out loss lora 0.625 ± 0.125, random 1.100 ± 0.000, head 1.200 ± 0.000, bitfit 1.300 ± 0.000, prompt "
            "1.400 ± 0.000",
        ),
        (
            "keeps what the base",
            "drift on text outside the task 0.250 ± 0.125 nats a token, full 0.625 ± 0.125",
        ),
        ("higher learning rate", "best 0.03 against 0.002: 15 times, of rates about 3 times apart"),
        *(
            (
                claim,
                f"held-out loss 0.625 ± 0.125 (lora) against {loss} ± 0.000 ({name}); exact match 43.0% against 32.0%",
            )
            for claim, loss, name in (
                ("randomly chosen", "1.100", "random"), ("the head alone", "1.200", "head"),
                ("BitFit", "1.300", "bitfit"), ("prompt tuning", "1.400", "prompt"),
            )
        ),
        (
            "few-shot",
            "held-out loss 0.625 ± 0.125 (lora) against 1.625 ± 0.125 (few-shot); exact match 43.0% against 21.0%",
        ),
        (
            "intrinsic rank",
            "the 8 largest of 16 singular values hold 53% of ‖ΔW‖² (of random numbers 9%), the effective rank is 6; ΔW "
            "cut to rank 8 keeps 98% of the gain in held-out loss, and rank 4 is enough for 95 %",
        ),
        (
            "small r may underfit",
            "held-out loss r = 2: 1.250 ± 0.250, r = 8: 0.525 ± 0.025, r = 32: 0.610, r = 64: 0.705 ± 0.005",
        ),
        (
            "4 bits",
            "held-out loss 1.000 ± 0.000 (qlora) against 0.625 ± 0.125 (lora); exact match 32.0% against 43.0%",
        ),
        ("extreme distribution", "the task enciphered, held-out loss: full 0.425 ± 0.025, lora 0.900 ± 0.000"),
    ],
)  # fmt: skip
def test_a_claim_tells_the_figures_that_it_names(claim: str, measured: str) -> None:
    assert the(claim, found()).measured == measured


def test_without_an_exact_match_the_losses_alone_are_told() -> None:
    told = the("matches full", found(lora={"exact_match": [], "loss": [0.5]})).measured
    assert told == "held-out loss 0.500 (lora) against 0.425 ± 0.025 (full)"


def test_the_page_has_a_line_for_every_claim_and_its_verdict() -> None:
    page = as_page({"tinysmol": claims(found())}).splitlines()
    assert page[:2] == ["| claim | tinysmol | verdict |", "|---|---|---|"]
    assert page[2:] == [f"| {claim} | {measured} | {verdict} |" for claim, measured, verdict in claims(found())]
    assert len(page) == 2 + 22


# --- Where a verdict turns ---


def same(value: float) -> dict[str, Any]:
    """The same loss for each seed: no spread."""
    return {"loss": [value, value]}


SETTLED = [RANKS[0] | {"trainable_parameters": 999_999}]  # rank 2: it is none of 4, 8, 16, 32

TURNS: list[tuple[str, dict[str, Any], str, dict[str, Any], str]] = [
    # of the ranks 4, 8, 16 and 32 the one that trains most decides
    ("under 1 %", {"lora": {"trainable_parameters": 9_999}}, HERE, {"lora": {"trainable_parameters": 10_000}}, THERE),
    ("under 1 %", {"ranks": SETTLED}, HERE, {"ranks": [rank_figures(16, 10_000, [1.0])]}, THERE),
    (
        "little memory",
        {"lora": {"peak_memory_bytes": 499_999_999}}, HERE, {"lora": {"peak_memory_bytes": 500_000_000}}, NOT,
    ),
    ("small adapter", {"lora": {"file_bytes": 799_999}}, HERE, {"lora": {"file_bytes": 800_000}}, NOT),
    ("trains fast", {"lora": {"seconds_per_step": 0.3099}}, HERE, {"lora": {"seconds_per_step": 0.31}}, NOT),
    (
        "M = r(n + m)",
        {"lora": {"trainable_parameters": 10_000}}, HERE, {"lora": {"trainable_parameters": 9_999}}, NOT,
    ),
    (
        "M = r(n + m)",
        {"lora": {"trainable_parameters": 50_000}}, HERE, {"lora": {"trainable_parameters": 50_001}}, NOT,
    ),
    ("10,000 times", {"lora": {"trainable_parameters": 100}}, HERE, {"lora": {"trainable_parameters": 101}}, THERE),
    (
        "3 times less memory",
        {"full": {"peak_memory_bytes": 900}, "lora": {"peak_memory_bytes": 300}}, HERE,
        {"full": {"peak_memory_bytes": 900}, "lora": {"peak_memory_bytes": 301}}, THERE,
    ),
    (
        "no latency",
        {"lora": {"latency": {"base": 1.0, "adapted": 9.0, "merged": 1.0499}}}, HERE,
        {"lora": {"latency": {"base": 1.0, "adapted": 0.5, "merged": 1.05}}}, NOT,
    ),
    # worse is what is above by more than both spreads together: full is 0.5 ± 0.125, LoRA ± 0.25
    (
        "matches full",
        {"full": {"loss": [0.375, 0.625]}, "lora": {"loss": [0.625, 1.125]}}, HERE,
        {"full": {"loss": [0.375, 0.625]}, "lora": {"loss": [0.626, 1.126]}}, NOT,
    ),
    ("better than the other", {"name": "random", "other": {"loss": [0.5, 0.5]}}, HERE,
     {"name": "random", "other": {"loss": [0.499, 0.499]}}, f"{NOT}: random did better"),
    (
        "keeps what the base",
        {"lora": {"drift_kl": [0.624, 0.625]}}, HERE, {"lora": {"drift_kl": [0.125, 1.125]}}, NOT,
    ),
    ("higher learning rate", {"lora": {"best_rate": 0.006}}, HERE, {"lora": {"best_rate": 0.0059}}, NOT),
    ("higher learning rate", {"lora": {"best_rate": 0.068}}, HERE, {"lora": {"best_rate": 0.0681}}, NOT),
    *(
        (claim, {"name": name, "other": same(0.751)}, HERE, {"name": name, "other": same(0.75)}, NOT)
        for claim, name in (
            ("randomly chosen", "random"), ("the head alone", "head"), ("BitFit", "bitfit"),
            ("prompt tuning", "prompt"), ("few-shot", "few-shot"),
        )
    ),
    (
        "4 bits",
        {"name": "qlora", "other": same(0.751)}, HERE,
        {"name": "qlora", "other": same(0.75)}, f"{NOT}: no loss beyond the spread",
    ),
    (
        "extreme distribution",
        {"cipher": [FULL | same(1.0), LORA | same(1.0501)]}, HERE,
        {"cipher": [FULL | same(1.0), LORA | same(1.05)]}, NOT,
    ),
    (
        "small r may underfit",
        {"ranks": [rank_figures(1, 1, [0.626, 0.876]), rank_figures(2, 1, [0.5, 0.5]), rank_figures(4, 1, [0.5, 0.5])]},
        f"{HERE}, at the lower end",
        {"ranks": [rank_figures(1, 1, [0.5, 0.75]), rank_figures(2, 1, [0.5, 0.5]), rank_figures(4, 1, [0.5, 0.5])]},
        NOT,
    ),
    (
        "small r may underfit",
        {"ranks": [rank_figures(1, 1, [0.5, 0.5]), rank_figures(2, 1, [0.5, 0.5]), rank_figures(4, 1, [0.6, 0.6])]},
        f"{HERE}, at the upper end",
        {"ranks": [rank_figures(1, 1, [0.7, 0.7]), rank_figures(2, 1, [0.5, 0.5]), rank_figures(4, 1, [0.6, 0.6])]},
        f"{HERE}, at both ends",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "on_one_side", "first", "on_the_other", "second"), TURNS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_verdict_turns_at_its_threshold(
    claim: str, on_one_side: dict[str, Any], first: str, on_the_other: dict[str, Any], second: str
) -> None:
    assert the(claim, found(**on_one_side)).verdict == first
    assert the(claim, found(**on_the_other)).verdict == second


def test_several_methods_that_did_better_are_all_named_and_loras_own_family_is_not() -> None:
    comparison = found()
    for method in comparison["methods"]:
        if method["method"] in ("head", "bitfit"):
            method["loss"] = [0.25, 0.25]
    assert the("better than the other", comparison).verdict == f"{NOT}: head and bitfit did better"


@pytest.mark.parametrize(
    ("loss", "verdict", "told"),
    [
        (0.6, f"{HERE}, of what ΔW does", "rank 2 is enough"),  # 95 % of the gain of 2.0
        (0.601, NOT, "rank 4 is enough"),
    ],
)
def test_the_intrinsic_rank_is_low_if_an_eighth_of_all_values_keeps_95_percent(
    loss: float, verdict: str, told: str
) -> None:
    spectrum = spectrum_figures()
    spectrum["cut"][2]["loss"] = loss
    claim = the("intrinsic rank", found(spectrum=spectrum))
    assert claim.verdict == verdict and told in claim.measured


def test_if_no_cut_is_enough_all_singular_values_are_needed() -> None:
    spectrum = spectrum_figures()
    for part in spectrum["cut"][2:5]:
        part["loss"] = 1.0
    claim = the("intrinsic rank", found(spectrum=spectrum))
    assert claim.verdict == NOT and claim.measured.endswith("rank 16 is enough for 95 %")


def test_what_does_not_hold_at_the_papers_scale_either_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of large models do not change, so they are replaced here by others on each side of a threshold."""
    big = at_gpt_3()
    for fewer, full_bytes, verdict in ((1e4, 3 * big.lora_bytes, THERE), (9_999.0, 3 * big.lora_bytes - 1, NOT)):
        changed = big._replace(fewer={1: fewer, 2: 1.0}, full_bytes=full_bytes)
        monkeypatch.setattr(judged, "at_gpt_3", lambda changed=changed: changed)
        assert the("10,000 times", found()).verdict == verdict
        assert the("3 times less memory", found()).verdict == verdict
    for share, verdict in ((0.0099, THERE), (0.01, NOT)):
        monkeypatch.setattr(judged, "lora_share", lambda *asked, share=share: share)
        assert the("under 1 %", found(lora={"trainable_parameters": 10_000})).verdict == verdict


# --- What is missing ---


def test_a_claim_whose_figures_are_missing_says_so() -> None:
    assert the("LoRA against full", comparison_of(LORA, *OTHERS)).verdict == UNKNOWN
    assert the("LoRA against full", comparison_of(failed_figures("full"), LORA)).verdict == UNKNOWN
    assert the("intrinsic rank", found(spectrum={})).verdict == UNKNOWN
    assert the("small r may underfit", found(ranks=[RANKS[0], failed_figures("lora-r8")])).verdict == UNKNOWN
    assert the("extreme distribution", found(cipher=[failed_figures("full"), LORA])).verdict == UNKNOWN
    without = claims(comparison_of(FULL, {k: v for k, v in LORA.items() if k != "latency"}))
    told = " ".join(one.claim for one in without)
    assert not any(claim in told for claim in ("no latency", "other methods", "4 bits", "BitFit", "few-shot"))
