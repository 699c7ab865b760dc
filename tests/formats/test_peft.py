"""PEFT's adapters, both ways: what it writes we load, what we write it loads, and nothing is dropped or invented.

The cases with PEFT itself are drawn and measured by peft_table.py, which prints them as a table too.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.commands import ADAPTER, PAIRS, TEXTS, good, write_rows
from support.commands import CONFIG as COMMAND_CONFIG
from support.models import logits_of
from support.small_checkpoints import CONFIG, Q0, RAW, SMOLLM3, UNTIED, adapter, quick, same
from support.strategies import QV

from minilora.data.batches import Batch
from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.adapters import load_adapter, read_method
from minilora.formats.checkpoint import DTYPES, random_weights, write_checkpoint
from minilora.formats.files import read_json, write_json
from minilora.formats.load import load_model
from minilora.formats.peft import read_adapter, write_adapter
from minilora.methods.lora import LoRA
from minilora.methods.miss import MiSS
from minilora.methods.targets import target_module_names
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.ops.cross_entropy import IGNORE
from minilora.training.step import loss_and_gradients

PREFIX = LoRA.key_prefix

# What PEFT says when it saves an adapter on the embedding.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")


# --- Our own files ---

lora_settings = st.builds(
    LoRA,
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1.0, 8.0, 12.5]),
    dropout=st.sampled_from([0.0, 0.05]),
    target_modules=st.sampled_from(
        [("q_proj", "v_proj"), ("mlp.up_proj",), (Q0, "down_proj"), ("q_proj", "embed_tokens", "lm_head"), ".*_proj"]
    ),
    init=st.sampled_from(["kaiming", "gaussian"]),
    rslora=st.booleans(),
    exclude_modules=st.sampled_from([(), ("v_proj",), r".*\.1\..*\.(v|o)_proj"]),
    rank_pattern=st.sampled_from([{}, {".*[0-9].*": 3, ".*": 2}]),
    alpha_pattern=st.sampled_from([{}, {".*[0-9].*": 0.5, ".*": 7.0}]),
    modules_to_save=st.sampled_from([(), ("norm",), ("model.norm", "k_proj")]),
)


@quick
@given(chosen=lora_settings)
def test_an_adapter_is_read_back_exactly(tmp_path: Path, chosen: LoRA) -> None:
    tensors = adapter(CONFIG, chosen)
    write_adapter(tmp_path, chosen, tensors, CONFIG, "some/base")
    read, read_tensors, base, copies = read_adapter(tmp_path, CONFIG)
    assert (read, base, copies) == (chosen, "some/base", {})
    assert list(read.alpha_pattern) == list(chosen.alpha_pattern)  # the first that fits decides
    assert same(read_tensors, tensors)


def test_all_linear_is_written_as_its_seven_names(tmp_path: Path) -> None:
    chosen = LoRA(target_modules=("all-linear",), layers_to_transform=(1,))
    tensors = adapter(CONFIG, chosen)
    write_adapter(tmp_path, chosen, tensors, CONFIG, "")
    read, read_tensors, *_ = read_adapter(tmp_path, CONFIG)
    assert same(read_tensors, tensors) and len(read.target_modules) == 7
    assert read.places(CONFIG) == chosen.places(CONFIG)


def test_patterns_that_name_nothing_adapted_are_left_out_for_peft_would_warn_of_them(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"up_proj": 3, "q_proj": 4}, "alpha_pattern": {"lm_head|.*norm.*": 1.0}}
    chosen = LoRA(rank=2, target_modules=QV, modules_to_save=("norm",), **patterns)
    write_adapter(tmp_path, chosen, adapter(CONFIG, chosen), CONFIG, "")
    raw = read_json(tmp_path / "adapter_config.json")
    assert raw["rank_pattern"] == {"q_proj": 4} and "alpha_pattern" not in raw
    assert read_adapter(tmp_path, CONFIG).method.places(CONFIG) == chosen.places(CONFIG)


# --- Files as others write them ---


def change_adapter(folder: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray | None] | None = None) -> None:
    """A q, v adapter of rank 2 with some fields and tensors changed."""
    chosen = LoRA(rank=2, target_modules=QV)
    changed = {**adapter(CONFIG, chosen), **(tensors or {})}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    write_adapter(folder, chosen, kept, CONFIG, "base")
    path = folder / "adapter_config.json"
    write_json(path, {**read_json(path), **fields})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_an_adapter_in_any_dtype_is_read_as_float32(tmp_path: Path, dtype: str) -> None:
    narrow = {
        name: tensor.astype(DTYPES[dtype]) for name, tensor in adapter(CONFIG, LoRA(rank=2, target_modules=QV)).items()
    }
    change_adapter(tmp_path, {}, dict(narrow))
    _, tensors, *_ = read_adapter(tmp_path, CONFIG)
    assert same(tensors, {name: tensor.astype(np.float32) for name, tensor in narrow.items()})


@pytest.mark.parametrize(
    "target",
    [
        None,
        ["v_proj", "q_proj"],
        r".*\.(q|v)_proj",
        r"model\.layers\.\d+\.self_attn\.[qv]_proj",
        ["q_proj", "v_proj", "c"],
    ],
)
def test_every_way_to_name_the_targets_chooses_the_same_modules(tmp_path: Path, target: Any) -> None:
    change_adapter(tmp_path, {"target_modules": target})
    read, tensors, *_ = read_adapter(tmp_path, CONFIG)
    modules = target_module_names(CONFIG, ("q_proj", "v_proj"))
    assert set(tensors) == {f"{module}.lora_{half}.weight" for module in modules for half in "AB"}
    assert target_module_names(CONFIG, read.target_modules) == modules


def test_all_linear_in_a_file_means_the_seven_projections_and_not_the_head(tmp_path: Path) -> None:
    chosen = LoRA(target_modules=("all-linear",))
    write_adapter(tmp_path, chosen, adapter(CONFIG, chosen), CONFIG, "")
    path = tmp_path / "adapter_config.json"
    write_json(path, {**read_json(path), "target_modules": "all-linear"})
    assert len(read_adapter(tmp_path, CONFIG)[1]) == 2 * 7 * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["x"]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("ensure_weight_tying", True),
        ("arrow_config", {"top_k": 3}),
        ("use_bdlora", {"nblocks": 2}),
        ("velora_config", {"num_groups": 64}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"n": 1}),
        ("a_field_of_the_future", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", ["gaussian"]),
        ("r", 0),
        ("r", "8"),
        ("r", 2.5),
        ("lora_alpha", None),
        ("target_modules", "("),
        ("target_modules", []),
        ("target_modules", ["c_attn"]),
        ("target_modules", {"q_proj": 1}),
        ("layers_pattern", "h"),
        ("layers_to_transform", ["1"]),
        ("layers_to_transform", {"1": 1}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "8"}),
        ("alpha_pattern", {"[": 8}),
        ("exclude_modules", "("),
        ("modules_to_save", ["score"]),
        ("modules_to_save", ["mlp"]),
        ("modules_to_save", "lm_head"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    change_adapter(tmp_path, {field: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{field}|{field}.*expected"):
        read_adapter(tmp_path, CONFIG)


def test_a_field_that_is_missing_has_the_default_of_peft(tmp_path: Path) -> None:
    """PEFT's own defaults, which differ from ours: it takes α = 8 and q and v alone where we take 16 and all maps."""
    raw: dict[str, Any] = {"peft_type": "LORA"}
    assert LoRA.from_fields(tmp_path, raw, CONFIG) == LoRA(
        rank=8, alpha=8, dropout=0, init="kaiming", rslora=False, target_modules=("q_proj", "v_proj")
    )
    assert LoRA.from_fields(tmp_path, raw | {"r": 2}, CONFIG).scale == 4
    assert MiSS.from_fields(tmp_path, {"peft_type": "MISS"}, CONFIG) == MiSS(
        rank=64, dropout=0, target_modules=("q_proj", "v_proj")
    )


def test_the_defaults_of_a_missing_field_are_those_of_the_peft_that_is_installed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora, miss = peft.LoraConfig(), peft.MissConfig()
    read = LoRA.from_fields(tmp_path, {"peft_type": "LORA"}, CONFIG)
    assert (read.rank, read.alpha, read.dropout) == (lora.r, lora.lora_alpha, lora.lora_dropout)
    shards = MiSS.from_fields(tmp_path, {"peft_type": "MISS"}, CONFIG)
    assert (shards.rank, shards.dropout) == (miss.r, miss.miss_dropout)


def test_layers_to_transform_with_a_pattern_is_refused_as_peft_does(tmp_path: Path) -> None:
    change_adapter(tmp_path, {"target_modules": ".*(q|v)_proj", "layers_to_transform": [0]})
    with pytest.raises(ValueError, match=r"adapter_config\.json: layers_to_transform goes with a list"):
        read_adapter(tmp_path, CONFIG)


def test_fields_without_effect_are_passed_over(tmp_path: Path) -> None:
    fields = {"revision": "main", "peft_version": "9.9", "inference_mode": False, "auto_mapping": {"x": 1}}
    fields |= {"layers_pattern": "layers", "exclude_modules": None, "rank_pattern": None, "use_dora": False}
    change_adapter(tmp_path, {**fields, "init_lora_weights": "eva", "eva_config": {"rho": 2}, "future": None})
    assert read_adapter(tmp_path, CONFIG)[0] == LoRA(rank=2, target_modules=QV)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q0}.lora_A.weight": None}, rf"missing: {PREFIX}{Q0}\.lora_A"),
        ({f"{Q0}.lora_B.bias": np.zeros(12)}, rf"unexpected: {PREFIX}{Q0}\.lora_B\.bias"),
        ({f"{Q0}.lora_A.default.weight": np.zeros((2, 12))}, r"unexpected: .*lora_A\.default"),
        ({f"{Q0}.base_layer.weight": np.zeros((12, 12))}, r"unexpected: .*q_proj\.base_layer"),
        ({"model.norm.weight": np.zeros(12)}, r"unexpected: .*model\.norm"),
        ({f"{Q0}.lora_B.weight": np.zeros((2, 12))}, rf"wrong shape: {PREFIX}{Q0}\.lora_B\.weight \(2, 12\), expected"),
        (
            {"lm_head.weight": np.zeros((23, 12))},
            rf"wrong shape: {PREFIX}lm_head\.weight \(23, 12\), expected \(24, 12",
        ),
        ({f"{Q0}.lora_A.weight": np.zeros((2, 12), np.int8)}, rf"{PREFIX}{Q0}\.lora_A\.weight is stored as I8"),
    ],
)
def test_tensors_that_do_not_fit_an_adapter_are_named(tmp_path: Path, changes: Any, message: str) -> None:
    change_adapter(tmp_path, {}, changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path, CONFIG)


def test_an_adapter_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_adapter(tmp_path / "absent", CONFIG)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: no such file"):
        read_adapter(tmp_path, CONFIG)
    change_adapter(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors: no such file"):
        read_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"convert adapter_model\.bin"):
        read_adapter(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.base_layer.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_copy_of_the_base_beside_an_adapter_is_passed_over_only_if_it_is_the_base_but_for_rounding(
    tmp_path: Path, name: str, dtype: str
) -> None:
    weights = random_weights(CONFIG, seed=0)
    base, copy = base_model(CONFIG, weights), weights["model.embed_tokens.weight"].astype(DTYPES[dtype])
    change_adapter(tmp_path, {}, {name: copy})
    assert read_method(tmp_path, base)[0] == LoRA(rank=2, target_modules=QV)
    copy[3, 4] += 0.5
    change_adapter(tmp_path, {}, {name: copy})
    module = name.partition(".base_layer")[0].removesuffix(".weight")
    with pytest.raises(ValueError, match=rf"safetensors: holds a {module}\.weight of its own that differs"):
        read_method(tmp_path, base)


def test_two_copies_of_one_weight_are_not_both_passed_over(tmp_path: Path) -> None:
    copy = random_weights(CONFIG, seed=0)["model.embed_tokens.weight"]
    change_adapter(tmp_path, {}, {f"model.embed_tokens.{rest}": copy for rest in ("weight", "base_layer.weight")})
    with pytest.raises(ValueError, match=r"unexpected: .*embed_tokens\.weight"):
        read_adapter(tmp_path, CONFIG)


# --- PEFT itself ---


@pytest.fixture
def table() -> ModuleType:
    module: ModuleType = pytest.importorskip(
        "tools.peft_table", exc_type=ImportError
    )  # which needs torch, transformers, peft
    return module


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ON_EMBEDDING_AND_HEAD = {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}
FEATURES: dict[str, dict[str, Any]] = {
    "all seven projections": {"target_modules": SEVEN},
    "single names": {"target_modules": ["o_proj", "mlp.up_proj"]},
    "full names": {"target_modules": [Q0, "model.layers.1.mlp.down_proj"]},
    "a regex": {"target_modules": r".*\.layers\.1\..*(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "rank_pattern": {"target_modules": SEVEN, "rank_pattern": {"(up|v)_proj": 5, r"layers\.0\..*": 3, "o_proj": 1}},
    "alpha_pattern": {"target_modules": SEVEN, "alpha_pattern": {"^model.layers.0.*": 3, "layers.*": 0.5, "o_proj": 9}},
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True},
    "rslora with patterns": {
        **{"target_modules": SEVEN, "use_rslora": True},
        **{"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"q_proj|up_proj": 3}},
    },
    "one layer": {"target_modules": SEVEN, "layers_to_transform": 1},
    "a list of layers, and full names": {"target_modules": ["v_proj", Q0, "lm_head"], "layers_to_transform": [1, 7]},
    "exclude a list": {"target_modules": SEVEN, "exclude_modules": ["k_proj", "0.mlp.up_proj"]},
    "exclude a regex": {"target_modules": "all-linear", "exclude_modules": r".*\.0\.(mlp|self_attn)\..*"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 5}},
    "head": {"target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 1}},
    "embedding and head": ON_EMBEDDING_AND_HEAD,
    "embedding and head by a regex": {"target_modules": ".*(v_proj|embed_tokens|head)"},
    "only the head": {"target_modules": ["lm_head"]},
    "save embed_tokens": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "save lm_head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "save both": {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]},
    "save norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "save linear maps": {"target_modules": SEVEN, "modules_to_save": ["o_proj", "model.layers.1.mlp.up_proj"]},
    "adapt the head, save the embedding": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "adapt the embedding, save the head": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head", "norm"]},
    "dora": {"target_modules": ["v_proj", "mlp.up_proj", "lm_head"], "use_dora": True},
}
both_ways = pytest.mark.parametrize("way", ["ours_to_peft", "peft_to_ours"])


@both_ways
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_has_the_same_logits_in_peft(tmp_path: Path, table: ModuleType, feature: str, way: str) -> None:
    """Where the embedding or head is touched, of a tied model; elsewhere of one with biases."""
    touched = any(name in str(FEATURES[feature]) for name in ("embed", "head"))
    raw = {**(SMOLLM3 if touched else UNTIED), "pad_token_id": None}
    case = table.Case(raw, {"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM", **FEATURES[feature]}, [feature])
    difference, effect = getattr(table, way)(case, tmp_path)
    assert difference < 1e-5 < 1e-2 < effect


@both_ways
@pytest.mark.parametrize("number", [7, 8, 12])
def test_features_drawn_together_have_the_same_logits_in_peft(
    tmp_path: Path, table: ModuleType, number: int, way: str
) -> None:
    difference, effect = getattr(table, way)(table.draw_case(number), tmp_path)
    assert difference < table.TOLERANCE < 1e-2 < effect


def test_twenty_cases_of_the_table_have_every_feature(table: ModuleType) -> None:
    cases = [table.draw_case(number) for number in range(20)]
    assert {feature for case in cases for feature in case.features} == {*table.KINDS, *table.EXTRAS}
    assert {case.raw["tie_word_embeddings"] for case in cases if case.config != case.lora} == {False, True}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": ["o_proj"], "use_rslora": True, "lora_alpha": 3},
        {"target_modules": ["mlp.up_proj", Q0], "init_lora_weights": "gaussian"},
        {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["k_proj", "lm_head"], "modules_to_save": ["norm"], "rank_pattern": {"k_proj": 5}},
    ],
)
def test_an_adapter_of_peft_is_read_exactly_and_written_again_means_the_same(
    tmp_path: Path, table: ModuleType, options: dict[str, Any]
) -> None:
    case = table.Case(UNTIED, {"r": 2, "lora_dropout": 0.25, "task_type": "CAUSAL_LM", **options}, [])
    theirs = table.made_by_peft(case, table.peer(table.base_folder(case, tmp_path / "base", 0)))
    theirs.save_pretrained(tmp_path / "adapter")
    read, tensors, base, copies = read_adapter(tmp_path / "adapter", case.config)
    found = {name.removeprefix(PREFIX): array for name, array in load_file(tmp_path / "adapter" / ADAPTER).items()}
    assert same(tensors | {name.replace(".weight", ".base_layer.weight"): a for name, a in copies.items()}, found)
    assert (read.rank, read.dropout, base) == (2, 0.25, str(tmp_path / "base"))
    write_adapter(tmp_path / "again", read, tensors, case.config, base)
    settings_again, tensors_again, *_ = read_adapter(tmp_path / "again", case.config)
    assert same(tensors_again, tensors) and settings_again == read


def test_an_adapter_saved_with_the_whole_embedding_is_read(tmp_path: Path, table: ModuleType) -> None:
    """Training programs often ask for it, though nothing in the embedding has changed."""
    case = table.Case(UNTIED, {"target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}, [])
    theirs = table.made_by_peft(case, table.peer(table.base_folder(case, tmp_path / "base", 0)))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert PREFIX + "model.embed_tokens.weight" in load_file(tmp_path / "adapter" / ADAPTER)
    base, _ = load_model(tmp_path / "base")
    ours = table.our_logits(load_adapter(base, tmp_path / "adapter"))
    assert table.difference(ours, table.their_logits(theirs)) < 1e-5


def test_weights_that_peft_ties_are_refused_for_they_would_be_read_as_untied(tmp_path: Path, table: ModuleType) -> None:
    pytest.importorskip("peft", "0.18")
    options = {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    case = table.Case(RAW, {"task_type": "CAUSAL_LM", **options}, [])
    theirs = table.made_by_peft(case, table.peer(table.base_folder(case, tmp_path / "base", 0)))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="ensure_weight_tying True is not supported"):
        load_adapter(load_model(tmp_path / "base")[0], tmp_path / "adapter")


# --- Gradients ---


@pytest.mark.parametrize("number", [*range(7, 13), 20, 21])
def test_pytorch_has_the_same_gradient_of_everything_that_trains(table: ModuleType, number: int) -> None:
    """In float64, to ten digits: A and B at any place, and the modules that train whole, tied or not."""
    import torch
    from support.golden import assert_agree
    from support.peers import float64_throughout, peer_loss, peer_of

    case = table.draw_case(number)
    weights = table.random_weights(case.config, number)
    base = base_model(case.config, weights, np.float64)
    trainable = table.after_training(case.lora.start(base, np.random.default_rng(number), np.float64), number)
    ours = case.lora.attach(base, trainable)
    labels = np.roll(table.TOKENS, -1, axis=1)
    positions = np.tile(np.arange(labels.shape[1]), (len(labels), 1))
    labels[positions % 4 == 0] = IGNORE  # the last one too
    batch = Batch(table.TOKENS, labels, positions, np.ones_like(labels))
    with float64_throughout():
        theirs = table.made_by_peft(case, peer_of(case.raw, weights))
        parameters = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
        named = {our_name(name): p for name, p in parameters.items()}
        for name, array in trainable.items():
            named[name].data = torch.tensor(array)
        loss, logits = peer_loss(theirs, batch)
        loss.backward()
    assert_agree({"logits": logits_of(ours, batch)}, {"logits": logits.detach().numpy()}, 1e-10)
    our_loss, gradients = loss_and_gradients(ours, [batch])
    assert our_loss == pytest.approx(loss.item(), rel=1e-10)
    assert_agree(gradients, {name: p.grad.numpy() for name, p in named.items()}, 1e-10)


def our_name(name: str) -> str:
    """A parameter of PEFT's model as its file and we call it."""
    name = name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_of_plain_descent_moves_every_tensor_of_pefts_adapter_by_minus_pytorchs_gradient(
    tmp_path: Path, table: ModuleType, tied: bool
) -> None:
    """Through the command, with ranks by name, LoRA on embedding and head, and norms that train whole."""
    import torch
    import transformers
    from support.peers import ONE_STEP_OF_DESCENT, pytorch_loss

    model = tmp_path / "model"
    raw = {**COMMAND_CONFIG, "tie_word_embeddings": tied}
    write_checkpoint(model, raw, random_weights(Config.from_dict(raw), seed=0, dtype="bfloat16", std=0.3), "bfloat16")
    train_tokenizer(TEXTS * 3, raw["vocab_size"], model)
    options = {"r": 3, "lora_alpha": 6, "rank_pattern": {"lm_head": 2, "v_proj": 4}, "modules_to_save": ["norm"]}
    options |= {"target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]}
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = table.made_by_peft(table.Case(raw, {"task_type": "CAUSAL_LM", **options}, []), reference)
    reference.save_pretrained(tmp_path / "peft")
    write_rows(tmp_path / "data" / "train.jsonl", PAIRS)
    flags = [*ONE_STEP_OF_DESCENT, "--adapter", tmp_path / "peft"]
    good("train", "--model", model, "--data", tmp_path / "data", "--out", tmp_path / "run", *flags)
    pytorch_loss(reference, model).backward()

    before, after = load_file(tmp_path / "peft" / ADAPTER), load_file(tmp_path / "run" / ADAPTER)
    gradients = {our_name(name): p.grad.numpy() for name, p in reference.named_parameters() if p.requires_grad}
    assert {name.removeprefix(PREFIX) for name in after} == gradients.keys()
    assert before.keys() - after.keys() == {
        f"{PREFIX}{name}.base_layer.weight" for name in ("model.embed_tokens", "lm_head")
    }
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(before[PREFIX + name] - after[PREFIX + name], gradient, rtol=1e-3, atol=5e-6)
