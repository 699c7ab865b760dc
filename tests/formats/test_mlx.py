"""mlx-lm's adapters, both ways: read as mlx-lm means them, written so that it loads them, or refused by name.

What mlx-lm means is spelt out here by hand, as W + scale · (lora_a lora_b)ᵀ, so that the tests need no mlx. Where
mlx-lm is installed (it runs on Linux too), it is asked itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.commands import CONFIG as COMMAND_CONFIG
from support.commands import PAIRS, TEXTS, assert_refused, contents, good, read, run, write_rows
from support.small_checkpoints import CONFIG, Q0, RAW, SMOLLM3, UNTIED, adapter, quick, same
from support.strategies import QV

from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.adapters import check_format, load_adapter, read_layout, read_method, write_method
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.files import read_json, write_json
from minilora.formats.load import load_model
from minilora.formats.mlx import CONFIG as CONFIG_FILE
from minilora.formats.mlx import MLX_TENSORS, read_mlx_adapter, write_mlx_adapter
from minilora.methods.bitfit import BitFit
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import HEAD, parameter_shapes

FOUR = Config.from_dict({**UNTIED, "num_hidden_layers": 4})
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 9))


def logits(model: Model) -> np.ndarray:
    hidden, _, _ = forward(model, TOKENS, np.tile(np.arange(9), (2, 1)), np.ones_like(TOKENS))
    return np.asarray(model.sites[HEAD].forward(hidden)[0]).reshape(*TOKENS.shape, -1)


def by_hand(
    folder: Path, config: Config, modules: list[str], raw: dict[str, Any], seed: int = 0
) -> dict[str, np.ndarray]:
    """A folder as mlx-lm leaves it, with random numbers at these modules; and the weights that it stands for."""
    rng, weights = np.random.default_rng(seed), random_weights(config, seed=seed, std=0.3)
    shapes, tensors = parameter_shapes(config), {}
    parameters = raw["lora_parameters"]
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        if module.endswith("embed_tokens"):
            rows, columns = columns, rows
        a = rng.standard_normal((columns, parameters["rank"]), np.float32) / 4
        b = rng.standard_normal((parameters["rank"], rows), np.float32) / 4
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        change = parameters["scale"] * (a @ b)
        W = weights[f"{module}.weight"] + (change if module.endswith("embed_tokens") else change.T)
        if raw.get("fine_tune_type") == "dora":
            tensors[f"{module}.m"] = m = 1 + rng.random(rows, np.float32)
            W = (m / np.linalg.norm(W, axis=1))[:, None] * W
        weights[f"{module}.weight"] = W.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / MLX_TENSORS)
    (folder / CONFIG_FILE).write_text(json.dumps({"model": "some/base", **raw}))
    return weights


def saying(keys: list[str] | None, num_layers: int = -1, **more: Any) -> dict[str, Any]:
    """An adapter_config.json of mlx-lm, with some of the settings of training that it holds too."""
    parameters = {"rank": 3, "scale": 1.5, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
    return {"iters": 100, "batch_size": 4, "seed": 0, "num_layers": num_layers, "lora_parameters": parameters, **more}


def modules(layers: list[int], *names: str) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in layers for name in names]


Q, UP = "self_attn.q_proj", "mlp.up_proj"
LAYOUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all layers": (saying([Q, UP]), modules([0, 1, 2, 3], Q, UP)),
    "zero is all layers too": (saying([Q], 0), modules([0, 1, 2, 3], Q)),
    "more layers than there are": (saying([Q], 16), modules([0, 1, 2, 3], Q)),
    "the last two layers": (saying([Q, UP], 2, fine_tune_type="lora"), modules([2, 3], Q, UP)),
    "no keys, once q and v": (saying(None, 1), modules([3], Q, "self_attn.v_proj")),
    "no keys, now all of a layer": (saying(None, 1), modules([3], Q, UP, "mlp.down_proj")),
    "full names, wherever they are": (saying([f"model.layers.0.{Q}", UP], 1), [*modules([0], Q), *modules([3], UP)]),
    "embedding and head": (
        saying([Q, "lm_head", "model.embed_tokens"], 1),
        ["model.embed_tokens", *modules([3], Q), HEAD],
    ),
    "keys that mean nothing": (saying([Q, "q_proj", "block_sparse_moe.gate"], 1), modules([3], Q)),
    "dora": (saying([Q, UP], 2, fine_tune_type="dora"), modules([2, 3], Q, UP)),
    "an alpha without effect": (
        saying([Q]) | {"lora_parameters": {**saying([Q])["lora_parameters"], "alpha": 16}},
        modules([0, 1, 2, 3], Q),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_mlx_means_these_weights(tmp_path: Path, layout: str) -> None:
    raw, places = LAYOUTS[layout]
    weights = by_hand(tmp_path, FOUR, places, raw)
    base = base_model(FOUR, random_weights(FOUR, seed=0, std=0.3))
    adapted = load_adapter(base, tmp_path)
    expected = logits(base_model(FOUR, weights))
    np.testing.assert_allclose(logits(adapted), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(logits(base) - expected).max() > 1e-2 * np.abs(expected).max()
    read = read_mlx_adapter(tmp_path, FOUR)
    assert list(read.method.places(FOUR)) == places and read.base_model == "some/base"
    # Written by us again, it still means the same.
    write_mlx_adapter(tmp_path / "again", read.method, read.tensors, FOUR, read.base_model)
    assert same(load_file(tmp_path / "again" / MLX_TENSORS), load_file(tmp_path / MLX_TENSORS))
    again = read_mlx_adapter(tmp_path / "again", FOUR)
    assert again.method == read.method or (again.method.places(FOUR), type(again.method)) == (
        read.method.places(FOUR),
        type(read.method),
    )


sayable = st.one_of(
    *(
        st.builds(
            kind,
            rank=st.integers(1, 4),
            alpha=st.sampled_from([1.0, 8.0, 12.5]),
            dropout=st.sampled_from([0.0, 0.05]),
            target_modules=st.sampled_from(
                [
                    ("q_proj", "v_proj"),
                    "all-linear",
                    (Q0, "down_proj"),
                    ("q_proj", "lm_head"),
                    r".*\.[13]\..*(o|up)_proj",
                ]
            ),
            rslora=st.booleans(),
            exclude_modules=st.sampled_from([(), ("v_proj",), r".*\.1\..*\.(v|o)_proj"]),
        )
        for kind in (LoRA, DoRA)
    )
)


@quick
@given(chosen=sayable)
def test_whatever_modules_an_adapter_has_mlx_and_peft_say_the_same(tmp_path: Path, chosen: LoRA) -> None:
    """Through mlx-lm's format and back the tensors are the very same, at the same places with the same scale."""
    tensors = adapter(FOUR, chosen)
    write_method(tmp_path / "mlx", chosen, tensors, FOUR, "some/base", format="mlx")
    read = read_layout(tmp_path / "mlx", FOUR)
    write_method(tmp_path / "peft", read.method, read.tensors, FOUR, read.base_model)
    back = read_layout(tmp_path / "peft", FOUR)
    assert same(back.tensors, tensors) and back.base_model == "some/base"
    assert all(array.flags.c_contiguous for array in read.tensors.values())
    places = chosen.places(FOUR)
    assert back.method.places(FOUR).keys() == places.keys() and type(back.method) is type(chosen)
    for module, (rank, scale) in back.method.places(FOUR).items():
        assert (rank, scale) == (places[module].rank, pytest.approx(places[module].scale, rel=1e-15))


def test_modules_of_the_last_layers_are_written_as_mlx_writes_them_and_others_in_full(tmp_path: Path) -> None:
    def written(**options: Any) -> tuple[list[str], int]:
        chosen = LoRA(rank=2, **options)
        write_mlx_adapter(tmp_path, chosen, adapter(FOUR, chosen), FOUR, "base")
        raw = read_json(tmp_path / CONFIG_FILE)
        assert (raw["model"], raw["fine_tune_type"], raw["lora_parameters"]["scale"]) == ("base", "lora", 8)
        return raw["lora_parameters"]["keys"], raw["num_layers"]

    assert written(target_modules=("q_proj", "up_proj")) == ([Q, UP], 4)
    assert written(target_modules=("q_proj",), layers_to_transform=(2, 3)) == ([Q], 2)
    assert written(target_modules=("q_proj", HEAD)) == ([Q, HEAD], 4)
    assert written(target_modules=("q_proj",), layers_to_transform=(0, 2)) == (modules([0, 2], Q), 4)
    assert written(target_modules=("q_proj", "model.layers.3.mlp.up_proj")) == (
        [*modules([0, 1, 2], Q), *modules([3], Q, UP)],
        4,
    )


# --- What the one cannot say of the other ---


@pytest.mark.parametrize(
    ("raw", "options", "message"),
    [
        (UNTIED, {"rank_pattern": {"v_proj": 3}}, "rank_pattern"),
        (UNTIED, {"alpha_pattern": {"v_proj": 3.0}}, "alpha_pattern"),
        (UNTIED, {"modules_to_save": ("norm",)}, "modules_to_save"),
        (RAW, {"target_modules": ("embed_tokens",)}, "of a tied model"),
        (RAW, {"target_modules": ("q_proj", "lm_head")}, "of a tied model"),
    ],
)
def test_what_mlx_cannot_say_is_refused_by_name(
    tmp_path: Path, raw: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config, chosen = Config.from_dict(raw), LoRA(**options)
    with pytest.raises(ValueError, match=message):
        write_method(tmp_path / "out", chosen, adapter(config, chosen), config, "base", format="mlx")
    assert not (tmp_path / "out").exists()


def test_patterns_that_change_nothing_can_be_said(tmp_path: Path) -> None:
    chosen = LoRA(
        rank=4,
        alpha=8.0,
        rank_pattern={"v_proj": 4, "up_proj": 9},
        alpha_pattern={".*": 8.0},
        target_modules=QV,
    )
    write_mlx_adapter(tmp_path, chosen, adapter(CONFIG, chosen), CONFIG, "base")
    assert read_mlx_adapter(tmp_path, CONFIG).method.places(CONFIG) == chosen.places(CONFIG)


def test_other_methods_and_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="mlx-lm does not know bitfit"):
        check_format("mlx", BitFit(), CONFIG)
    with pytest.raises(ValueError, match="format 'gguf' is unknown: choose peft, mlx"):
        check_format("gguf", LoRA(target_modules=QV), CONFIG)


def change(folder: Path, fields: dict[str, Any], parameters: dict[str, Any], config: Config = FOUR) -> None:
    by_hand(folder, config, modules([2, 3], Q), saying([Q], 2))
    raw = read_json(folder / CONFIG_FILE)
    raw = {**raw, **fields, "lora_parameters": {**raw["lora_parameters"], **parameters}}
    write_json(folder / CONFIG_FILE, {key: value for key, value in raw.items() if value != "absent"})


@pytest.mark.parametrize(
    ("fields", "parameters", "message"),
    [
        ({"fine_tune_type": "full"}, {}, "fine_tune_type 'full' is not supported"),
        ({"num_layers": "absent"}, {}, "num_layers"),
        ({"num_layers": "2"}, {}, "num_layers"),
        ({}, {"rank": 0}, "rank is 0"),
        ({}, {"rank": None}, "lora_parameters: 'rank' is missing"),
        ({}, {"scale": None}, "lora_parameters: 'scale' is missing"),
        ({}, {"keys": "self_attn.q_proj"}, "keys is 'self_attn.q_proj', expected a list"),
        ({}, {"keys": ["q_proj"]}, r"keys \['q_proj'\] name no linear map"),
        ({}, {"rank_pattern": {"a": 1}}, "rank_pattern .* is not supported"),
        ({}, {"keys": [Q, UP]}, r"missing: model\.layers\.2\.mlp\.up_proj\.lora_a"),
        ({"num_layers": 1}, {}, r"unexpected: model\.layers\.2\.self_attn\.q_proj\.lora_a"),
        ({"fine_tune_type": "dora"}, {}, r"missing: model\.layers\.2\.self_attn\.q_proj\.m"),
        ({}, {"rank": 2}, r"wrong shape: model\.layers\.2\.self_attn\.q_proj\.lora_a \(12, 3\), expected \(12, 2\)"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, fields: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    change(tmp_path, fields, parameters)
    with pytest.raises(ValueError, match=rf"^/.*(adapter_config\.json|adapters\.safetensors): (?!/).*{message}"):
        read_mlx_adapter(tmp_path, FOUR)


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    change(tmp_path, {}, {})
    tensors = load_file(tmp_path / MLX_TENSORS)
    for name in ("model.norm.weight", f"{Q0}.lora_a", "model.layers.3.self_attn.q_proj.m"):
        save_file({**tensors, name: np.zeros((12, 3), np.float32)}, tmp_path / MLX_TENSORS)
        with pytest.raises(ValueError, match=f"unexpected: {name}"):
            read_mlx_adapter(tmp_path, FOUR)


def test_the_embedding_of_a_tied_model_is_refused_because_mlx_adapts_the_head_with_it(tmp_path: Path) -> None:
    tied = Config.from_dict(RAW)
    by_hand(tmp_path, tied, ["model.embed_tokens"], saying(["model.embed_tokens"]))
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: of a tied model, mlx-lm adapts embedding and head as one"
    ):
        read_mlx_adapter(tmp_path, tied)


def test_the_layout_is_known_by_its_file_and_two_in_one_folder_are_refused(tmp_path: Path) -> None:
    chosen = LoRA(rank=2, target_modules=QV)
    base = base_model(CONFIG, random_weights(CONFIG, seed=0))
    write_method(tmp_path, chosen, adapter(CONFIG, chosen), CONFIG, "base")
    assert read_method(tmp_path, base)[0] == chosen
    write_method(tmp_path, chosen, adapter(CONFIG, chosen), CONFIG, "base", format="mlx")
    with pytest.raises(ValueError, match=r"holds adapter_model\.safetensors and adapters\.safetensors too"):
        read_method(tmp_path, base)
    (tmp_path / "adapter_model.safetensors").unlink()
    method, tensors = read_method(tmp_path, base)
    assert isinstance(method, LoRA) and method.places(CONFIG) == chosen.places(CONFIG)
    assert same(tensors, adapter(CONFIG, chosen))


# --- The commands ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    weights = random_weights(Config.from_dict(COMMAND_CONFIG), seed=0, std=0.3)
    write_checkpoint(folder, COMMAND_CONFIG, weights)
    train_tokenizer(TEXTS * 3, COMMAND_CONFIG["vocab_size"], folder)
    return folder


def test_a_run_writes_for_mlx_and_the_other_commands_and_peft_take_it(tmp_path: Path, model: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    flags = ["--model", model, "--data", data, "--steps", 5, "--learning-rate", 0.01, "--eval-rows", 0]
    good("train", *flags, "--out", tmp_path / "mlx", "--format", "mlx")
    good("train", *flags, "--out", tmp_path / "peft")
    assert not (tmp_path / "mlx" / "adapter_model.safetensors").exists()
    assert read(tmp_path / "mlx" / CONFIG_FILE)["lora_parameters"]["scale"] == 2
    base, _ = load_model(model)
    ours, theirs = (read_method(tmp_path / name, base)[1] for name in ("peft", "mlx"))
    assert same(ours, theirs)
    losses = [
        json.loads(good("evaluate", "--model", model, "--adapter", tmp_path / name, "--data", data, "--json"))["loss"]
        for name in ("peft", "mlx")
    ]
    assert losses[0] == losses[1]

    good("convert", "--adapter", tmp_path / "mlx", "--format", "peft", "--out", tmp_path / "converted")
    assert (
        load_file(tmp_path / "converted" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    )
    assert same(read_method(tmp_path / "converted", base)[1], ours)
    assert read(tmp_path / "converted" / CONFIG_FILE)["base_model_name_or_path"] == str(model)
    good(
        "convert", "--adapter", tmp_path / "converted", "--format", "mlx", "--out", tmp_path / "back", "--model", model
    )
    assert contents(tmp_path / "back")[MLX_TENSORS] == contents(tmp_path / "mlx")[MLX_TENSORS]
    more = ["--adapter", tmp_path / "mlx", "--format", "mlx", "--out", tmp_path / "more"]
    good("train", *flags, *more)  # goes on from it
    assert not same(read_method(tmp_path / "more", base)[1], ours)


def test_what_mlx_cannot_say_is_refused_before_training_and_leaves_no_folder(tmp_path: Path, model: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    flags = ["--model", model, "--data", data, "--out", tmp_path / "run", "--format", "mlx"]
    assert_refused(run("train", *flags, "--modules-to-save", "norm"), "modules_to_save")
    assert_refused(run("train", *flags, "--method", "full"), "mlx")
    assert not (tmp_path / "run").exists()
    taken = ["--adapter", tmp_path, "--format", "mlx", "--out", tmp_path]
    assert_refused(run("convert", *taken), f"--out {tmp_path} exists")


# --- mlx-lm itself ---


def of_mlx(folder: Path) -> Any:
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(folder)
    return model


def logits_of_mlx(model: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(model(mx.array(TOKENS)))


RAWS = {"llama": {**UNTIED, "num_hidden_layers": 4}, "smollm3": SMOLLM3}
OPTIONS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": ("all-linear",)},
    "last layers": {"target_modules": ("q_proj", "up_proj"), "layers_to_transform": (2, 3)},
    "one layer, in full": {"target_modules": ("q_proj",), "layers_to_transform": (1,)},
    "rslora": {"target_modules": ("o_proj",), "rslora": True},
    "dora": {"target_modules": ("v_proj", "down_proj"), "kind": DoRA},
    "embedding and head": {"target_modules": ("v_proj", "embed_tokens", "lm_head")},
}


@pytest.mark.parametrize("kind", RAWS)
@pytest.mark.parametrize("options", OPTIONS)
def test_mlx_itself_loads_what_we_write_and_has_the_same_logits(tmp_path: Path, kind: str, options: str) -> None:
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    chosen_options = {"kind": LoRA, **OPTIONS[options]}
    raw, chosen = RAWS[kind], chosen_options.pop("kind")(rank=3, alpha=4.0, **chosen_options)
    config = Config.from_dict(raw)
    if config.tie_word_embeddings and "embedding" in options:
        raw = {**raw, "tie_word_embeddings": False}
        config = Config.from_dict(raw)
    write_checkpoint(tmp_path / "base", raw, random_weights(config, seed=0, std=0.3))
    tensors = {name: 0.3 * array for name, array in adapter(config, chosen).items()}
    write_method(tmp_path / "adapter", chosen, tensors, config, "base", format="mlx")
    base, _ = load_model(tmp_path / "base")
    ours = logits(load_adapter(base, tmp_path / "adapter"))
    theirs = logits_of_mlx(utils.load_adapters(of_mlx(tmp_path / "base"), tmp_path / "adapter"))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(ours).max())
    assert np.abs(logits(base) - ours).max() > 1e-2 * np.abs(ours).max()


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
@pytest.mark.parametrize("keys", [None, [Q, "self_attn.v_proj"]])
def test_we_load_what_mlx_itself_writes_and_have_the_same_logits(
    tmp_path: Path, fine_tune_type: str, keys: list[str] | None
) -> None:
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    import mlx.core as mx
    from mlx.utils import tree_flatten

    raw = saying(keys, 2, fine_tune_type=fine_tune_type)
    write_checkpoint(tmp_path / "base", RAWS["llama"], random_weights(FOUR, seed=0, std=0.3))
    theirs = of_mlx(tmp_path / "base")
    theirs.freeze()
    utils.linear_to_lora_layers(theirs, 2, raw["lora_parameters"], use_dora=fine_tune_type == "dora")
    rng = np.random.default_rng(0)
    trained = {
        name: np.array(p) + 0.2 * rng.standard_normal(p.shape)
        for name, p in tree_flatten(theirs.trainable_parameters())
    }
    arrays = {name: mx.array(array.astype(np.float32)) for name, array in trained.items()}
    theirs.load_weights(list(arrays.items()), strict=False)
    (tmp_path / "adapter").mkdir()
    mx.save_safetensors(str(tmp_path / "adapter" / MLX_TENSORS), arrays)
    write_json(tmp_path / "adapter" / CONFIG_FILE, raw)
    base, _ = load_model(tmp_path / "base")
    ours, expected = logits(load_adapter(base, tmp_path / "adapter")), logits_of_mlx(theirs)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(logits(base) - ours).max() > 1e-2 * np.abs(ours).max()
