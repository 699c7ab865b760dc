"""Several adapters on one base: switched, combined, and side by side in one batch, while the base stays as it is."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.commands import CONFIG, assert_refused, contents, good, run
from support.strategies import QV, ROLES, TINY, VOCAB, configs, normal, random_adapter, random_weights, seeds

from minilora.adapters.combination import (
    Factors,
    Summand,
    combine,
    concatenate,
    relative_error,
    settings_of_scale_one,
    truncate,
)
from minilora.adapters.mixed import mixed
from minilora.formats import checkpoint
from minilora.formats.checkpoint import write_checkpoint
from minilora.formats.library import load_adapters, named_adapters
from minilora.formats.load import load_model
from minilora.formats.peft import read_adapter, write_adapter
from minilora.lora import delta
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA, LoRALinear
from minilora.methods.lora_embedding import adapter_names
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.targets import every_module
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.generation import complete
from minilora.model.model import Model, backward, forward
from minilora.model.names import EMBED, HEAD

some = settings(max_examples=30)
DENSE = Config.from_dict(CONFIG)
SETTINGS = {  # what folders of adapters are made with
    "a": LoRA(4, 8.0, target_modules=QV),
    "b": LoRA(2, 8.0, target_modules=("v_proj", "up_proj"), rslora=True, rank_pattern={"up_proj": 3}),
    "c": LoRA(2, 4.0, target_modules=("o_proj",), layers_to_transform=(1,)),
}
loras = st.builds(
    LoRA,
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1.0, 6.0]),
    dropout=st.just(0.5),
    target_modules=st.lists(
        st.sampled_from([*ROLES, "embed_tokens", "layers.0.self_attn.q_proj"]), min_size=1, max_size=3, unique=True
    ).map(tuple),
    rslora=st.booleans(),
    rank_pattern=st.sampled_from([{}, {"v_proj": 2}, {r"layers\.0\..*": 3}]),
    alpha_pattern=st.sampled_from([{}, {"mlp.*": 2.0}]),
)


def tensors(method: LoRA, base: Model, seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """An adapter as after some training."""
    trained = random_adapter(method.start(base, np.random.default_rng(seed), dtype), seed)
    return {name: tensor.astype(dtype) for name, tensor in trained.items()}


def outcome(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, T, V)."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = forward(model, tokens, positions, np.ones_like(tokens), keep=False)[0]
    return np.asarray(model.sites[HEAD].forward(hidden)[0]).reshape(*tokens.shape, -1)


def tokens_of(seed: int, rows: int, length: int = 4, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab, size=(rows, length))


# --- switching ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters on it that PEFT and minilora read."""
    folder = tmp_path_factory.mktemp("adapters")
    write_checkpoint(folder / "base", CONFIG, checkpoint.random_weights(DENSE, seed=0, std=0.3))
    base, _ = load_model(folder / "base")
    for seed, (name, method) in enumerate(SETTINGS.items()):
        write_adapter(folder / name, method, tensors(method, base, seed, np.float32), DENSE, str(folder / "base"))
    return folder


def test_adapters_share_the_frozen_weights_of_their_base_and_leave_them_as_they_are(folder: Path) -> None:
    base, _ = load_model(folder / "base")
    before = {name: site.weight.dense().copy() for name, site in base.sites.items() if hasattr(site, "weight")}
    models = load_adapters(base, named_adapters([str(folder / name) for name in SETTINGS]))
    assert list(models) == ["base", "a", "b", "c"] and models["base"] is base
    tokens = tokens_of(0, 2, vocab=DENSE.vocab_size)
    first = {name: outcome(model, tokens) for name, model in models.items()}
    for name in ("c", "a", "base", "b"):  # whatever ran before
        assert outcome(models[name], tokens).tobytes() == first[name].tobytes()
    assert len({logits.tobytes() for logits in first.values()}) == 4
    for model in models.values():
        for name, site in model.sites.items():
            frozen = site.base if isinstance(site, LoRALinear) else site
            assert frozen is base.sites[name]
    assert all(base.sites[name].weight.dense().tobytes() == weight.tobytes() for name, weight in before.items())


def test_another_adapter_costs_the_memory_of_its_own_numbers_only() -> None:
    config = replace(TINY, hidden_size=512, intermediate_size=512, head_dim=256)
    base = base_model(config, random_weights(config, 0))
    method = LoRA(2, target_modules=("all-linear",))
    trained = [tensors(method, base, seed, np.float32) for seed in range(5)]
    tracemalloc.start()
    models = [method.attach(base, each) for each in trained]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(models) == 5 and peak < 100_000 < base.sites[HEAD].weight.dense().nbytes * 10


# --- combining: the mathematics ---


@st.composite
def thin(draw: st.DrawFn) -> list[Factors]:
    out, inside, seed = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(seeds)
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    scales = draw(st.lists(st.sampled_from([-1.5, 0.0, 0.3, 2.0]), min_size=len(ranks), max_size=len(ranks)))
    return [
        Factors(normal(seed, rank, inside, stream=2 * i), normal(seed, out, rank, stream=2 * i + 1), c)
        for i, (rank, c) in enumerate(zip(ranks, scales, strict=True))
    ]


@given(parts=thin())
def test_the_concatenation_is_the_weighted_sum_of_the_changes(parts: list[Factors]) -> None:
    whole = concatenate(parts)
    assert len(whole.A) == sum(len(part.A) for part in parts) == whole.B.shape[1]
    expected = sum(delta(part.A, part.B, part.c) for part in parts)
    np.testing.assert_allclose(whole.B @ whole.A, expected, atol=1e-12)


@given(parts=thin(), rank=st.integers(1, 8))
def test_truncation_is_the_nearest_of_its_rank_and_its_error_is_the_singular_values_left_out(
    parts: list[Factors], rank: int
) -> None:
    A, B, _ = concatenate(parts)
    dW = B @ A
    nearest, truncation = truncate(A, B, rank)
    U, sigma, Vt = np.linalg.svd(dW, full_matrices=False)
    best = U[:, :rank] * sigma[:rank] @ Vt[:rank]
    np.testing.assert_allclose(nearest.B @ nearest.A, best, atol=1e-11)
    assert len(nearest.A) == nearest.B.shape[1] == truncation.kept <= rank
    left_out = np.sqrt((sigma[rank:] ** 2).sum())
    np.testing.assert_allclose(np.linalg.norm(dW - nearest.B @ nearest.A), left_out, atol=1e-11)
    if np.linalg.norm(dW) > 0:
        np.testing.assert_allclose(truncation.error, left_out / np.linalg.norm(dW), atol=1e-11)
        assert relative_error([truncation, truncation]) == pytest.approx(truncation.error)
    else:
        assert truncation.error == 0
    balance = np.linalg.norm(nearest.A, axis=1) - np.linalg.norm(nearest.B, axis=0)
    np.testing.assert_allclose(balance, 0, atol=1e-9)  # each factor has half of every singular value


def test_errors_of_several_modules_are_weighed_by_the_size_of_their_changes() -> None:
    eye = np.eye(2)
    _, large = truncate(10 * eye, eye, 2)
    _, small = truncate(eye, eye, 1)
    assert (large.error, small.error) == (pytest.approx(0), pytest.approx(np.sqrt(1 / 2)))
    assert relative_error([large, small]) == pytest.approx(np.sqrt(1 / 202))


def test_no_array_of_the_size_of_W_is_made_in_combining() -> None:
    n = 3000
    parts = [Factors(normal(i, 4, n), normal(i, n, 4), 0.5) for i in range(2)]
    tracemalloc.start()
    whole = concatenate(parts)
    truncate(whole.A, whole.B, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * n * 8 / 20


@given(
    config=configs(),
    ranks=st.lists(st.sampled_from([0, 2, 2, 3]), min_size=1, max_size=30),
    whole_ends=st.booleans(),
)
def test_the_written_settings_mean_these_ranks_and_the_scale_one(
    config: Config, ranks: list[int], whole_ends: bool
) -> None:
    modules = [name for name in every_module(config) if "norm" not in name]
    keys = [name.rpartition(".")[2] if whole_ends else name for name in modules]
    by_key = dict(zip(dict.fromkeys(keys), ranks * len(modules), strict=False))
    chosen = {name: by_key[key] for name, key in zip(modules, keys, strict=True) if by_key[key]}
    assume(chosen)
    found = settings_of_scale_one(config, chosen)
    assert found.places(config) == {module: (rank, 1.0) for module, rank in chosen.items()}
    if whole_ends:
        assert all("." not in name for name in (*found.target_modules, *found.rank_pattern))


def summed(config: Config, weights: dict[str, np.ndarray], parts: Sequence[tuple[Summand, float]]) -> Model:
    """The oracle: a model whose every matrix is W + Σ w ΔW, formed."""
    changed = dict(weights)
    for adapter, w in parts:
        for module, place in adapter.method.places(config).items():
            A, B = (adapter.tensors[name] for name in adapter_names(module))
            dW = w * delta(A, B, place.scale)
            changed[f"{module}.weight"] = changed[f"{module}.weight"] + (dW.T if module == EMBED else dW)
    return base_model(config, changed, np.float64)


@some
@given(config=configs(), seed=seeds, chosen=st.lists(loras, min_size=2, max_size=3), cut=st.sampled_from([None, 20, 1]))
def test_the_combined_adapter_computes_what_weights_with_all_changes_compute(
    config: Config, seed: int, chosen: list[LoRA], cut: int | None
) -> None:
    config = replace(config, tie_word_embeddings=False)
    weights = random_weights(config, seed)
    base = base_model(config, weights, np.float64)
    adapters = [Summand(str(i), method, tensors(method, base, seed + i)) for i, method in enumerate(chosen)]
    w = [0.7, -0.4, 1.5][: len(adapters)]
    combination = combine(config, adapters, w, cut)
    found = outcome(combination.method.attach(base, combination.tensors), tokens_of(seed, 2))
    expected = outcome(summed(config, weights, list(zip(adapters, w, strict=True))), tokens_of(seed, 2))
    assert {scale for _, scale in combination.method.places(config).values()} == {1.0}
    if cut == 1:
        assert {rank for rank, _ in combination.method.places(config).values()} == {1}
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    changed = [set(adapter.method.places(config)) for adapter in adapters]
    assert set(combination.overlapping) == {m for m in set.union(*changed) if sum(m in each for each in changed) > 1}
    assert combination.truncations.keys() == (set() if cut is None else set.union(*changed))


# --- combining: the command ---


def combined(folder: Path, out: Path, *flags: object) -> str:
    return good("combine", "--adapter", folder / "a", "--adapter-path", folder / "b", "--out", out, *flags)


def peft_logits(folder: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    torch, transformers, peft = (pytest.importorskip(each) for each in ("torch", "transformers", "peft"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between PEFT and transformers
        model = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens)).logits)


def oracle_logits(folder: Path, weights: dict[str, float], tokens: np.ndarray) -> np.ndarray:
    config, _ = checkpoint.read_config(folder / "base")
    plain = {name: w.astype(np.float64) for name, w in checkpoint.read_weights(folder / "base", config).items()}
    parts = [(Summand(name, *read_adapter(folder / name, config)[:2]), w) for name, w in weights.items()]
    return outcome(summed(config, plain, parts), tokens)


def test_peft_loads_the_combined_adapter_and_computes_the_weighted_sum(folder: Path, tmp_path: Path) -> None:
    tokens = tokens_of(0, 2, vocab=DENSE.vocab_size)
    combined(folder, tmp_path / "out", "--weights", 0.7, -0.3)
    expected = oracle_logits(folder, {"a": 0.7, "b": -0.3}, tokens)
    np.testing.assert_allclose(peft_logits(folder, tmp_path / "out", tokens), expected, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder / "base")
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert not np.allclose(expected, oracle_logits(folder, {"a": 0.7}, tokens), atol=1e-2)


def test_peft_combines_two_adapters_of_one_shape_to_the_same(folder: Path, tmp_path: Path) -> None:
    torch, transformers, peft = (pytest.importorskip(each) for each in ("torch", "transformers", "peft"))
    base, _ = load_model(folder / "base")
    for seed, name in enumerate(("one", "two")):
        method = LoRA(3, 6.0 + seed, target_modules=("q_proj", "down_proj"))
        write_adapter(tmp_path / name, method, tensors(method, base, seed, np.float32), DENSE, str(folder / "base"))
    tokens = tokens_of(0, 2, vocab=DENSE.vocab_size)
    both = ["--adapter", tmp_path / "one", "--adapter", tmp_path / "two", "--weights", 0.6, 0.9]
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "one", "one"
    )
    theirs.load_adapter(tmp_path / "two", "two")
    for kind, flags in (("cat", []), ("svd", ["--combination-type", "svd", "--svd-rank", 2])):
        good("combine", *both, *flags, "--out", tmp_path / kind)
        theirs.add_weighted_adapter(["one", "two"], [0.6, 0.9], kind, combination_type=kind, svd_rank=2)
        theirs.set_adapter(kind)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits
        found = peft_logits(folder, tmp_path / kind, tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def change_of(folders: Sequence[Path], module: str) -> np.ndarray:
    """The sum of the adapters' ΔW at a module, formed."""
    total = np.zeros(())
    for method, trained, *_ in (read_adapter(folder, DENSE) for folder in folders):
        if place := method.places(DENSE).get(module):
            total = total + delta(*(trained[name] for name in adapter_names(module)), place.scale)
    return total


def test_a_lower_rank_reports_the_error_that_it_has(folder: Path, tmp_path: Path) -> None:
    printed = combined(folder, tmp_path / "out", "--combination-type", "svd", "--rank", 2)
    report = json.loads((tmp_path / "out" / "combine.json").read_text())
    lost = whole = 0.0
    for module, error in report["relative_error_by_module"].items():
        dW = change_of([folder / "a", folder / "b"], module)
        off = np.linalg.norm(dW - change_of([tmp_path / "out"], module))
        assert 0.01 < error == pytest.approx(off / np.linalg.norm(dW), rel=1e-4)
        lost, whole = lost + off**2, whole + np.linalg.norm(dW) ** 2
    assert report["relative_error"] == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
    assert f"{report['relative_error']:.2%}" in printed and "6 modules of rank 2" in printed


def test_the_rank_is_that_of_the_largest_adapter_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    assert "rank 3 to 4" in combined(folder, tmp_path / "out", "--combination-type", "svd")
    report = json.loads((tmp_path / "out" / "combine.json").read_text())
    at_q, at_v = (report["relative_error_by_module"][f"model.layers.0.self_attn.{end}"] for end in ("q_proj", "v_proj"))
    assert at_q < 1e-6 < 0.01 < at_v  # of rank 4, and of 4 + 2


def test_modules_that_several_adapters_change_are_named(folder: Path, tmp_path: Path) -> None:
    printed = combined(folder, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "combine.json").read_text())
    assert report["overlapping_modules"] == [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    assert "2 of them are changed by more than one adapter" in printed and "v_proj" in printed
    assert [(each["name"], each["weight"]) for each in report["adapters"]] == [("a", 1.0), ("b", 1.0)]
    printed = good("combine", "--adapter", folder / "a", "--adapter", folder / "c", "--out", tmp_path / "apart")
    assert "no module is changed by more than one adapter" in printed


def copy_of(source: Path, target: Path, **changes: Any) -> Path:
    """An adapter whose config says something else."""
    target.mkdir(parents=True)
    for name, content in contents(source).items():
        (target / name).write_bytes(content)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({"base_model_name_or_path": "other/base"}, False),
        ({"revision": "an-older-one"}, False),
        ({"revision": None}, True),
        ({"base_model_name_or_path": None}, True),
        ({}, True),
    ],
)
def test_adapters_that_name_different_bases_are_not_combined_unless_forced(
    folder: Path, tmp_path: Path, change: dict[str, Any], fits: bool
) -> None:
    one = copy_of(folder / "a", tmp_path / "one", revision="abc")
    other = copy_of(folder / "b", tmp_path / "other", **{"revision": "abc"} | change)
    flags = ["--adapter", one, "--adapter", other, "--out", tmp_path / "out", "--model", folder / "base"]
    result = run("combine", *flags)
    if fits:
        assert result.code == 0
    else:
        assert_refused(result, "one was trained on", "--force")
        assert not (tmp_path / "out").exists()
        good("combine", *flags, "--force")
    assert read_adapter(tmp_path / "out", DENSE).method.scale == 1


def test_a_path_written_two_ways_is_one_base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    copy_of(folder / "b", tmp_path / "other", base_model_name_or_path="./base/")
    good("combine", "--adapter", folder / "a", "--adapter", tmp_path / "other", "--out", tmp_path / "out")


def test_what_cannot_be_combined_is_named(folder: Path, tmp_path: Path) -> None:
    base, _ = load_model(folder / "base")
    for name, method in {
        "saved": LoRA(2, modules_to_save=("norm",), target_modules=QV),
        "dora": DoRA(2, target_modules=QV),
    }.items():
        write_adapter(
            tmp_path / name, method, method.start(base, np.random.default_rng(0)), DENSE, str(folder / "base")
        )
    copy_of(folder / "a", tmp_path / "prefix", peft_type="PREFIX_TUNING")
    for name, named in {"saved": "modules_to_save (norm)", "dora": "dora", "prefix": "prefix"}.items():
        flags = ["--adapter", folder / "a", "--adapter", tmp_path / name, "--out", tmp_path / "out"]
        assert_refused(run("combine", *flags), named, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--adapter", "a"], "--adapter is given 1 times"),
        (["--adapter", "a", "--adapter", "b", "--weights", "1"], "--weights 1"),
        (["--adapter", "a", "--adapter", "b", "--weights", "1", "nan"], "--weights 1 nan"),
        (["--adapter", "a", "--adapter", "b", "--rank", "2"], "--rank 2 goes with --combination-type svd"),
        (["--adapter", "a", "--adapter", "b", "--rank", "-1", "--combination-type", "svd"], "--rank -1"),
        (["--adapter", "a", "--adapter", "a"], "'a' is taken"),
        (["--adapter", "base=a", "--adapter", "b"], "'base' is that of the model"),
        (["--adapter", "=a", "--adapter", "b"], "is empty"),
        (["--adapter", "a", "--adapter", "nowhere"], "nowhere: no such folder"),
        (["--adapter", "a", "--adapter", "b", "--out", "a"], "--out a exists"),
        (["--adapter", "a", "--adapter", "b", "--model", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_in_combining_is_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], named: str
) -> None:
    monkeypatch.chdir(folder)
    assert_refused(run("combine", "--out", "new", *flags), named)
    assert not (folder / "new").exists()


def test_names_are_chosen_or_those_of_the_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert named_adapters(["a", "mine=a", "./b/"]) == {"a": Path("a"), "mine": Path("a"), "b": Path("./b/")}


# --- one batch, several adapters ---


SAVED = LoRA(2, 4.0, target_modules=("q_proj",), modules_to_save=("layers.0.input_layernorm", "layers.1.mlp.up_proj"))
DORA = DoRA(2, 4.0, target_modules=("v_proj", "down_proj"))
HEADLESS = st.one_of(loras, st.sampled_from([SAVED, DORA]))


def attached(method: Any, base: Model, seed: int) -> Model:
    """The model with an adapter that does something. Gains and lengths stay near what they were."""
    fresh = method.start(base, np.random.default_rng(seed), np.float64)
    moved = {name: value + 0.3 * normal(seed, *value.shape, stream=i) for i, (name, value) in enumerate(fresh.items())}
    return method.attach(base, moved)


@some
@given(config=configs(), seed=seeds, chosen=st.lists(HEADLESS, min_size=1, max_size=3), data=st.data())
def test_each_row_of_a_mixed_batch_gets_what_its_own_adapter_gives_it_alone(
    config: Config, seed: int, chosen: list[LoRA], data: st.DataObject
) -> None:
    config = replace(config, num_hidden_layers=2, rope_layers=(True, False))
    base = base_model(config, random_weights(config, seed), np.float64)
    models = [base, *(attached(method, base, seed + i) for i, method in enumerate(chosen))]
    owner = data.draw(st.lists(st.sampled_from(range(len(models))), min_size=1, max_size=6))
    tokens = tokens_of(seed, len(owner))
    together = outcome(mixed([models[i] for i in owner]), tokens)
    for row, i in enumerate(owner):
        np.testing.assert_allclose(together[row], outcome(models[i], tokens[row : row + 1])[0], rtol=1e-9, atol=1e-9)


@some
@given(
    seed=seeds,
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), min_size=2, max_size=5),
    stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
)
def test_a_mixed_batch_is_continued_row_by_row_as_each_adapter_continues_it_alone(
    seed: int, prompts: list[list[int]], stops: frozenset[int]
) -> None:
    base = base_model(TINY, random_weights(TINY, seed), np.float64)
    models = [base, *(attached(LoRA(2, 4.0, target_modules=("all-linear",)), base, seed + i) for i in (1, 2))]
    of_row = [models[(seed + row) % 3] for row in range(len(prompts))]
    expected = [complete(model, [prompt], 6, stops)[0] for model, prompt in zip(of_row, prompts, strict=True)]
    assert complete(mixed(of_row), prompts, 6, stops) == expected


def test_the_frozen_product_of_a_mixed_batch_is_one_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    models = [base, *(attached(LoRA(2, target_modules=("all-linear",)), base, seed) for seed in (1, 2, 3))]
    seen: list[int] = []
    of_down = base.sites["model.layers.0.mlp.down_proj"].weight

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(of_down, name)

        def forward(self, x: np.ndarray) -> np.ndarray:
            seen.append(len(x))
            return np.asarray(of_down.forward(x))

    monkeypatch.setattr(base.sites["model.layers.0.mlp.down_proj"], "weight", Counted())
    outcome(mixed([models[i] for i in (0, 1, 2, 3, 1)]), tokens_of(0, 5))
    assert seen == [5 * 4]


def test_nothing_trains_in_a_mixed_batch_and_a_batch_of_one_model_is_that_model() -> None:
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    one, two = (attached(LoRA(2, target_modules=("all-linear",)), base, seed) for seed in (1, 2))
    assert mixed([one, one]) is one
    model, tokens = mixed([one, two]), tokens_of(0, 2)
    positions = np.broadcast_to(np.arange(4), tokens.shape)
    hidden, _, cache = forward(model, tokens, positions, np.ones_like(tokens))
    assert backward(model, np.ones_like(hidden), cache) == {} and not cache.blocks


def test_models_that_cannot_share_a_batch_are_refused() -> None:
    base, other = (base_model(TINY, random_weights(TINY, 0), np.float64) for _ in range(2))
    for method in (LoRA(2, target_modules=("lm_head",)), PrefixTuning(2), PromptTuning(2)):
        model = method.attach(base, method.start(base, np.random.default_rng(0), np.float64))
        for pair in ([base, model], [model, base]):
            with pytest.raises(ValueError, match="cannot share a batch"):
                mixed(pair)
        assert mixed([model, model]) is model
    with pytest.raises(ValueError, match="different bases"):
        mixed([base, other])
