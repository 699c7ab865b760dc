"""Published claims about LoRA, the figures measured or counted here, and the verdict that follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

from minilora.compare.figures import MethodResult, mean_and_spread
from minilora.compare.rivals import FAMILY
from minilora.compare.scale import at_gpt_3, lora_share
from minilora.compare.spectrum import gain_kept

HERE, THERE, NOT = "holds here", "holds at that scale, by arithmetic", "does not hold here"
UNKNOWN = "not measured: `python -m minilora.compare --ranks 1 2 4 8 16 32 64 --cipher`"


class Claim(NamedTuple):
    """A sentence about LoRA, the numbers that bear on it, and the verdict that follows from them."""

    claim: str
    measured: str
    verdict: str


ClaimsByModel = dict[str, list[Claim]]


def as_page(by_model: ClaimsByModel) -> str:
    """The claims as a table in Markdown: for each model what was measured and the verdict, in columns of its own."""
    head = ["claim", *(f"{model} | verdict" for model in by_model)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|---|" * len(by_model)]
    found = [{claim.claim: claim for claim in judged} for judged in by_model.values()]
    for claim in dict.fromkeys(name for of_model in found for name in of_model):
        cells = [of_model.get(claim, Claim(claim, "…", "not measured")) for of_model in found]
        lines.append(f"| {claim} | " + " | ".join(f"{cell.measured} | {cell.verdict}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def claims(comparison: dict[str, Any]) -> list[Claim]:
    """All claims. If the comparison lacks the figures of a claim, its verdict says so."""
    by_name = {result["method"]: result for result in comparison["methods"] if result["seeds"]}
    full_and_lora = [by_name[name] for name in ("full", "lora") if name in by_name]
    judged: list[Claim] = []
    if len(full_and_lora) == 2 and all("drift_kl" in result for result in full_and_lora):
        full, lora = full_and_lora
        judged += [*of_cost(full, lora, comparison["ranks"]), *of_gpt_3(full, lora), *of_quality(full, lora, by_name)]
    else:
        judged.append(Claim("LoRA against full fine-tuning", "…", UNKNOWN))
    judged.append(of_intrinsic_rank(comparison["spectrum"]))
    judged += of_limits(by_name, comparison["ranks"], comparison["cipher"])
    return judged


# --- The cost of LoRA ---


def of_cost(full: MethodResult, lora: MethodResult, ranks: list[MethodResult]) -> Iterator[Claim]:
    """Few parameters, little memory, small files, short steps."""
    of_rank = {
        result["rank"]: result
        for result in (lora, *ranks)
        if result["seeds"] and result["rank"] in (lora["rank"], 8, 16, 32)
    }
    shares = {r: result["trainable_parameters"] / result["total_parameters"] for r, result in sorted(of_rank.items())}
    of_large = {r: lora_share("SmolLM2-1.7B", r, ("q_proj", "v_proj")) for r in (8, 16, 32)}
    yield Claim(
        "LoRA at r = 8, 16, 32 trains under 1 % of the parameters",
        f"{listed(shares)} on every linear map of this model; {listed(of_large)} on q and v of SmolLM2-1.7B, and "
        f"{lora_share('SmolLM2-1.7B', 8, ('all-linear',)):.2%} at r = 8 on every linear map",
        HERE if max(shares.values()) < 0.01 else THERE if max(of_large.values()) < 0.01 else NOT,
    )
    less, peak = lora["update_bytes"] / full["update_bytes"], lora["peak_memory_bytes"] / full["peak_memory_bytes"]
    yield Claim(
        "… in little memory",
        f"gradients and AdamW {less:.1%} of full fine-tuning's; the process's peak {peak:.0%}, interpreter and "
        "evaluation included",
        HERE if peak < 1 else NOT,
    )
    yield Claim(
        "… saves a small adapter instead of a copy of the model",
        f"{lora['file_bytes'] / 1e6:.2f} MB against {full['file_bytes'] / 1e6:.2f} MB",
        HERE if lora["file_bytes"] < full["file_bytes"] / 5 else NOT,
    )
    time = lora["seconds_per_step"] / full["seconds_per_step"]
    measured = f"a step takes {time:.0%} of full fine-tuning's time"
    yield Claim("… and trains fast", measured, HERE if time < 1 else NOT)
    wider = {r: lora_share("SmolLM2-135M", r, ("all-linear",)) for r in (4, 8, 16)}
    share = shares[lora["rank"]]
    yield Claim(
        "M = r(n + m) numbers, 1–5 % of N",
        f"{lora['trainable_parameters']:,}, which is Σ r(n + m) over the maps: {share:.1%} here; SmolLM2-135M, every "
        f"linear map: {listed(wider)}",
        HERE if 0.01 <= share <= 0.05 else NOT,
    )


def of_gpt_3(full: MethodResult, lora: MethodResult) -> Iterator[Claim]:
    """The paper's figures, counted again at its scale and measured at ours."""
    big = at_gpt_3()
    yield Claim(
        "2dr numbers instead of d²",
        f"d = {big.d:,}, r = 4: {2 * big.d * 4:,} instead of {big.d**2:,}, {2 * 4 / big.d:.3%}. At "
        "tinysmol's d = 256 and r = 8 4,096 instead of 65,536, 6.250%",
        "holds: it is arithmetic",
    )
    fewer = full["trainable_parameters"] / lora["trainable_parameters"]
    yield Claim(
        "10,000 times fewer parameters (GPT-3)",
        f"{listed(big.fewer, '{:,.0f}')} times fewer on q and v of GPT-3's shape; here {fewer:.0f} times",
        THERE if max(big.fewer.values()) >= 1e4 > fewer else HERE if fewer >= 1e4 else NOT,
    )
    memory = full["peak_memory_bytes"] / lora["peak_memory_bytes"]
    yield Claim(
        "3 times less memory (GPT-3)",
        f"weights, gradients and AdamW of GPT-3's shape in float32: {big.full_bytes / 1e12:.2f} TB against "
        f"{big.lora_bytes / 1e12:.2f} TB, {big.full_bytes / big.lora_bytes:.1f} times (the paper: 1.2 TB against "
        f"0.35 TB). Here the peaks are {memory:.1f} times apart",
        HERE if memory >= 3 else THERE if big.full_bytes >= 3 * big.lora_bytes else NOT,
    )
    if "latency" in lora:
        base, adapted, merged = (lora["latency"][name] for name in ("base", "adapted", "merged"))
        yield Claim(
            "no latency is added once merged",
            f"{base:.2f} ms a token by the base, {adapted:.2f} with the adapter beside it, {merged:.2f} merged",
            HERE if merged < 1.05 * base else NOT,
        )


# --- The quality of LoRA ---


def of_quality(full: MethodResult, lora: MethodResult, by_name: dict[str, MethodResult]) -> Iterator[Claim]:
    yield Claim("LoRA matches full fine-tuning", both_told(lora, full), HERE if not worse(lora, full) else NOT)
    excluded = {full["method"], *FAMILY}
    rivals = [result for name, result in by_name.items() if name not in excluded and result.get("trainable_parameters")]
    if rivals:
        better = [other["method"] for other in rivals if worse(lora, other)]
        yield Claim(
            "… is better than the other methods",
            "held-out loss " + ", ".join(f"{result['method']} {told(result, 'loss')}" for result in (lora, *rivals)),
            f"{NOT}: {' and '.join(better)} did better" if better else HERE,
        )
    yield Claim(
        "… keeps what the base could do",
        f"drift on text outside the task {told(lora, 'drift_kl')} nats a token, full {told(full, 'drift_kl')}",
        HERE if mean(lora, "drift_kl") < mean(full, "drift_kl") else NOT,
    )
    ratio = lora["best_rate"] / full["best_rate"]
    yield Claim(
        "LoRA wants a higher learning rate (about ten times)",
        f"best {lora['best_rate']:g} against {full['best_rate']:g}: {ratio:.2g} times, of rates about 3 times apart",
        HERE if 3 <= ratio <= 34 else NOT,
    )
    for name, claim in (
        ("random", "randomly chosen parameters are a worse choice"),
        ("head", "the head alone is not expressive"),
        ("bitfit", "BitFit is less expressive"),
        ("prompt", "prompt tuning has limited expressiveness"),
        ("few-shot", "few-shot prompting is insufficient"),
    ):
        if name in by_name:
            yield Claim(claim, both_told(lora, by_name[name]), HERE if worse(by_name[name], lora) else NOT)


# --- The intrinsic rank ---


def of_intrinsic_rank(spectrum: dict[str, Any]) -> Claim:
    claim = "the change of full fine-tuning has a low intrinsic rank"
    if not spectrum:
        return Claim(claim, "…", UNKNOWN)
    maps = [*spectrum["full"].values()]
    most, share = median(len(of_map["sigma"]) for of_map in maps), median(of_map["shares"]["8"] for of_map in maps)
    effective, noise = median(of_map["effective_rank"] for of_map in maps), spectrum["noise"]["shares"]["8"]
    kept = {part["rank"]: gain_kept(spectrum["cut"], part) for part in spectrum["cut"] if part["rank"]}
    enough = next((r for r, gain in kept.items() if gain >= 0.95), most)
    return Claim(
        claim,
        f"the 8 largest of {most:.0f} singular values hold {share:.0%} of ‖ΔW‖² (of random numbers {noise:.0%}), the "
        f"effective rank is {effective:.0f}; ΔW cut to rank 8 keeps {kept[8]:.0%} of the gain in held-out loss, and "
        f"rank {enough:.0f} is enough for 95 %",
        f"{HERE}, of what ΔW does" if enough <= most / 8 else NOT,
    )


# --- The limits ---


def of_limits(
    by_name: dict[str, MethodResult], ranks: list[MethodResult], cipher: list[MethodResult]
) -> Iterator[Claim]:
    good = [result for result in ranks if result["seeds"]]
    claim = "a small r may underfit; a large r costs memory and stability"
    if len(good) > 1:
        told_all = ", ".join(f"r = {result['rank']}: {told(result, 'loss')}" for result in good)
        best = min(good, key=lambda result: mean(result, "loss"))
        low, high = worse(good[0], best), worse(good[-1], best)
        verdict = f"{HERE}, at {'both ends' if low and high else 'the lower end' if low else 'the upper end'}"
        yield Claim(claim, f"held-out loss {told_all}", verdict if low or high else NOT)
    else:
        yield Claim(claim, "…", UNKNOWN)
    if {"lora", "qlora"} <= by_name.keys():
        lora, qlora = by_name["lora"], by_name["qlora"]
        verdict = HERE if worse(qlora, lora) else f"{NOT}: no loss beyond the spread"
        yield Claim("4 bits cost quality", both_told(qlora, lora), verdict)
    claim = "for extreme distribution shifts full fine-tuning may be necessary"
    enciphered = {result["method"]: result for result in cipher if result["seeds"]}
    if {"full", "lora"} <= enciphered.keys():
        measured = ", ".join(f"{name} {told(result, 'loss')}" for name, result in enciphered.items())
        verdict = HERE if mean(enciphered["lora"], "loss") > 1.05 * mean(enciphered["full"], "loss") else NOT
        yield Claim(claim, f"the task enciphered, held-out loss: {measured}", verdict)
    else:
        yield Claim(claim, "…", UNKNOWN)


# --- Numbers in words, and their comparison ---


def mean(result: MethodResult, name: str) -> float:
    return mean_and_spread(result[name])[0]


def worse(result: MethodResult, other: MethodResult) -> bool:
    """Whether the held-out loss of `result` is higher than that of `other` by more than the sum of their spreads."""
    (a, a_spread), (b, b_spread) = mean_and_spread(result["loss"]), mean_and_spread(other["loss"])
    return a - b > a_spread + b_spread


def told(result: MethodResult, name: str) -> str:
    value, spread = mean_and_spread(result[name])
    return f"{value:.3f} ± {spread:.3f}" if len(result[name]) > 1 else f"{value:.3f}"


def both_told(result: MethodResult, other: MethodResult) -> str:
    parts = [
        f"held-out loss {told(result, 'loss')} ({result['method']}) against {told(other, 'loss')} ({other['method']})"
    ]
    if result["exact_match"] and other["exact_match"]:
        parts.append(f"exact match {mean(result, 'exact_match'):.1%} against {mean(other, 'exact_match'):.1%}")
    return "; ".join(parts)


def listed(values: dict[int, float], form: str = "{:.2%}") -> str:
    return ", ".join(f"{form.format(value)} at r = {r}" for r, value in values.items())
