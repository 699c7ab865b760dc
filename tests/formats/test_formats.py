"""What the files of minilora must satisfy: nothing is lost, nothing is guessed, and the ecosystem reads them."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_checkpoints import CONFIG, Q0, RAW, SMOLLM3, UNTIED, quick, same

from minilora.formats import files
from minilora.formats.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    random_weights,
    read_config,
    read_weights,
    write_checkpoint,
)
from minilora.formats.files import read_json, write_json, write_safetensors, write_text
from minilora.formats.known_configs import KNOWN_CONFIGS
from minilora.model.config import Config
from minilora.model.names import parameter_count, parameter_shapes
from minilora.random_checkpoint import main as random_checkpoint


def checkpoint(folder: Path, raw: dict[str, Any] = RAW, **options: Any) -> dict[str, np.ndarray]:
    weights = random_weights(Config.from_dict(raw), seed=0)
    write_checkpoint(folder, raw, weights, **options)
    return weights


# --- single files ---


@quick
@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=5),
        st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(sorted(DTYPES)), st.booleans()),
        max_size=4,
    )
)
def test_safetensors_give_back_every_array_whatever_its_shape_dtype_and_layout(tmp_path: Path, spec: Any) -> None:
    tensors = {}
    for name, (shape, dtype, transposed) in spec.items():
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[dtype])
        tensors[name] = array.T if transposed else array
    write_safetensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    with files.open_safetensors(tmp_path / "t.safetensors") as file:
        assert file.metadata() == {"format": "pt"}
        assert same({name: file.get_tensor(name) for name in file.keys()}, tensors)


def test_all_files_of_a_checkpoint_have_the_usual_permissions(tmp_path: Path) -> None:
    checkpoint(tmp_path, max_shard_bytes=3000)
    (tmp_path / "usual").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("write", [write_text, write_json])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    path = tmp_path / "deep" / "file"
    write(path, "old")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, "new")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "JSON list"), (None, "no such file")])
def test_a_bad_json_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"x\.json: .*{message}"):
        read_json(tmp_path / "x.json")


# --- checkpoints ---


@pytest.mark.parametrize("raw", [RAW, SMOLLM3, UNTIED], ids=["tied", "smollm3", "untied"])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_checkpoint_is_read_back_exactly(tmp_path: Path, dtype: str, shard_bytes: int, raw: dict[str, Any]) -> None:
    weights = random_weights(Config.from_dict(raw), seed=1, dtype=dtype)
    write_checkpoint(tmp_path, raw, weights, dtype, shard_bytes)
    config, written = read_config(tmp_path)
    assert config == Config.from_dict(raw)
    assert written == {**raw, "dtype": dtype, "torch_dtype": dtype}
    assert same(read_weights(tmp_path, config), weights)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9) != (tmp_path / SINGLE).exists()


@quick
@given(first=st.sampled_from([10**9, 3000, 1]), second=st.sampled_from([10**9, 3000, 1]))
def test_writing_over_a_checkpoint_leaves_nothing_of_the_old_one(tmp_path: Path, first: int, second: int) -> None:
    checkpoint(tmp_path, max_shard_bytes=first)
    new = random_weights(CONFIG, seed=9)
    write_checkpoint(tmp_path, RAW, new, max_shard_bytes=second)
    assert same(read_weights(tmp_path, CONFIG), new)
    index = read_json(tmp_path / INDEX) if (tmp_path / INDEX).exists() else {"weight_map": {"": SINGLE}}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())


def test_no_shard_exceeds_the_limit_unless_it_holds_one_tensor(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, max_shard_bytes=1500)
    index = read_json(tmp_path / INDEX)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    for shard in set(index["weight_map"].values()):
        members = [name for name, place in index["weight_map"].items() if place == shard]
        assert len(members) == 1 or sum(weights[name].nbytes for name in members) <= 1500


def test_a_checkpoint_that_just_fits_the_limit_is_one_file(tmp_path: Path) -> None:
    total = sum(tensor.nbytes for tensor in random_weights(CONFIG, seed=0).values())
    for limit, whole in ((total, ["model.safetensors"]), (total - 1, None)):
        checkpoint(tmp_path, max_shard_bytes=limit)
        written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert written == (whole or ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])


@quick
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=12, max_size=12))
def test_narrowing_to_bfloat16_rounds_to_nearest_even(tmp_path: Path, values: list[float]) -> None:
    weights = random_weights(CONFIG, seed=0)
    weights["model.norm.weight"] = np.array(values, np.float32)
    write_checkpoint(tmp_path, RAW, weights, "bfloat16")
    bits = weights["model.norm.weight"].view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    read = read_weights(tmp_path, CONFIG)["model.norm.weight"]
    assert np.array_equal(read.view(np.uint16), rounded.astype(np.uint16))


def test_a_number_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, seed=0)
    weights["model.norm.weight"][3] = 1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds numbers too large for float16"):
        write_checkpoint(tmp_path, RAW, weights, "float16")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'int8' is unknown"):
        checkpoint(tmp_path, dtype="int8")


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Change, add or remove tensors of a single-file checkpoint."""
    weights = {**random_weights(CONFIG, seed=0), **changes}
    write_safetensors(folder / SINGLE, {name: tensor for name, tensor in weights.items() if tensor is not None})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q0}.weight", None, rf"missing: {Q0}\.weight"),
        (f"{Q0}.bias", np.zeros(12), rf"unexpected: {Q0}\.bias"),
        (f"{Q0}.weight", np.zeros((12, 13)), rf"wrong shape: {Q0}\.weight \(12, 13\), expected \(12, 12\)"),
        (f"{Q0}.weight", np.zeros((12, 12), np.int8), rf"{Q0}\.weight is stored as I8"),
        ("lm_head.weight", np.zeros((24, 12), np.float32), r"lm_head\.weight differs from model\.embed_tokens"),
        ("lm_head.weight", np.zeros((24, 11), np.float32), r"wrong shape: lm_head\.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(
    tmp_path: Path, name: str, tensor: np.ndarray | None, message: str
) -> None:
    rewrite(tmp_path, **{name: tensor})
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path, CONFIG)


def test_of_many_wrong_tensors_five_are_named(tmp_path: Path) -> None:
    rewrite(tmp_path)
    with pytest.raises(ValueError, match=r"missing: (model\.layers\.2\.\S+ ?){5}and 4 more"):
        read_weights(tmp_path, Config.from_dict({**RAW, "num_hidden_layers": 3}))


def test_weights_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing: lm_head"):
        write_checkpoint(tmp_path, {**RAW, "tie_word_embeddings": False}, random_weights(CONFIG, seed=0))
    assert not any(tmp_path.iterdir())


def test_a_copied_head_and_old_rope_buffers_are_passed_over(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, seed=0)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    rewrite(tmp_path, **{"lm_head.weight": weights["model.embed_tokens.weight"]}, **buffer)
    assert same(read_weights(tmp_path, CONFIG), weights)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", "a\\b", "sub/x.safetensors", ""])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    write_json(tmp_path / INDEX, {"weight_map": {"model.norm.weight": shard}})
    with pytest.raises(ValueError, match="is not a plain file name"):
        read_weights(tmp_path, CONFIG)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, max_shard_bytes=3000)
    shard = sorted(tmp_path.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        read_weights(tmp_path, CONFIG)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, max_shard_bytes=3000)
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=rf"is in {first.name} too"):
        read_weights(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_broken_safetensors_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    checkpoint(tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        read_weights(tmp_path, CONFIG)


def test_a_folder_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent: no such folder.*hf download"):
        read_config(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="download the checkpoint whole"):
        read_weights(tmp_path, CONFIG)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"convert pytorch_model\.bin to safetensors"):
        read_weights(tmp_path, CONFIG)


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"hidden_size": "many"}, {"num_attention_heads": 0}])
def test_errors_in_a_configuration_name_its_file(tmp_path: Path, change: dict[str, Any]) -> None:
    write_json(tmp_path / "config.json", {**RAW, **change})
    with pytest.raises(ValueError, match=r"^/.*config\.json: (?!config\.json)"):
        read_config(tmp_path)


# --- known configurations and random checkpoints ---


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM-135M", 134_515_008),
        ("SmolLM2-135M", 134_515_008),
        ("SmolLM-360M", 361_821_120),
        ("SmolLM2-360M", 361_821_120),
        ("SmolLM-1.7B", 1_711_376_384),
        ("SmolLM2-1.7B", 1_711_376_384),
        ("SmolLM3-3B", 3_075_098_624),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen3-0.6B", 596_049_920),
    ],
)
def test_the_known_configurations_have_the_published_sizes(name: str, parameters: int) -> None:
    assert parameter_count(Config.from_dict(KNOWN_CONFIGS[name])) == parameters


def test_random_weights_follow_seed_dtype_and_kind() -> None:
    config = Config.from_dict(UNTIED)
    weights = random_weights(config, seed=3, std=0.5)
    assert {name: tensor.shape for name, tensor in weights.items()} == parameter_shapes(config)
    assert same(weights, random_weights(config, seed=3, std=0.5))
    assert not same(weights, random_weights(config, seed=4, std=0.5))
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights.items()}
    assert same(random_weights(config, seed=3, dtype="bfloat16", std=0.5), rounded)
    matrices = np.concatenate([tensor.ravel() for tensor in weights.values() if tensor.ndim == 2])
    assert abs(matrices.std() - 0.5) < 0.02 and abs(matrices.mean()) < 0.02
    assert all(np.all(weights[name] == 0) for name in weights if name.endswith("bias"))
    assert all(np.all(weights[name] == 1) for name in weights if name.endswith("norm.weight"))


def test_the_command_writes_a_checkpoint_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "config.json", RAW)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    command = [str(tmp_path / "config.json"), "--out", str(out), "--tokenizer", str(tmp_path / "tokenizer")]
    assert random_checkpoint([*command, "--seed", "5"]) == 0
    count = parameter_count(CONFIG)
    assert capsys.readouterr().out == f"{count:,} parameters, {2 * count:,} bytes, in {out}\n"
    assert same(read_weights(out, read_config(out)[0]), random_weights(CONFIG, seed=5, dtype="bfloat16"))
    assert (out / "tokenizer.json").read_text() == "{}"

    assert random_checkpoint(command) == 2  # the folder is not empty now
    assert capsys.readouterr().err.startswith(f"error: --out {out} exists")


@pytest.mark.parametrize(
    "arguments",
    [["SmolLM-9T"], ["{tmp}/bad.json"], ["{tmp}/good.json", "--tokenizer", "{tmp}"], ["{tmp}/good.json", "--seed=-1"]],
)
def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    write_json(tmp_path / "good.json", RAW)
    write_json(tmp_path / "bad.json", {**RAW, "hidden_act": "gelu"})
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert random_checkpoint([*arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- transformers ---


@pytest.mark.parametrize("raw", [RAW, SMOLLM3, UNTIED], ids=["tied", "smollm3", "untied"])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_transformers_loads_our_checkpoint_with_nothing_missing_or_left(
    tmp_path: Path, raw: dict[str, Any], shard_bytes: int
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = checkpoint(tmp_path, raw, max_shard_bytes=shard_bytes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    assert model.dtype == torch.float32
    assert all(np.array_equal(state[name].numpy(), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("raw", [RAW, SMOLLM3, UNTIED], ids=["tied", "smollm3", "untied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_of_transformers_is_read_exactly(tmp_path: Path, raw: dict[str, Any], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="3KB")
    config, _ = read_config(tmp_path)
    assert config == Config.from_dict(raw)
    state = model.state_dict()
    for name, tensor in read_weights(tmp_path, config).items():
        assert tensor.dtype == DTYPES[dtype]
        assert np.array_equal(tensor.astype(np.float32), state[name].float().numpy())


@quick
@given(
    smollm3=st.booleans(),
    tied=st.booleans(),
    bias=st.booleans(),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    layers=st.integers(1, 9),
    theta=st.sampled_from([1e4, 1.3e5, 5e6]),
    scaling=st.sampled_from(
        [
            None,
            {"rope_type": "linear", "factor": 2.0},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ]
    ),
)
def test_old_and_new_spellings_of_a_configuration_mean_the_same(
    smollm3: bool, tied: bool, bias: bool, heads: tuple[int, int], layers: int, theta: float, scaling: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 100,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "mlp_bias": bias,
    }
    old = {**shape, "rope_theta": theta, "rope_scaling": scaling, "model_type": "smollm3" if smollm3 else "llama"}
    rope = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    cls = transformers.SmolLM3Config if smollm3 else transformers.LlamaConfig
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    new = cls(**shape, rope_parameters=rope, **special)
    expected = Config.from_dict(old)
    assert Config.from_dict(new.to_dict()) == expected
    assert Config.from_dict(json.loads(new.to_json_string(use_diff=True))) == expected
    assert Config.from_dict(cls(**copy.deepcopy(old), **special).to_dict()) == expected
    assert (expected.num_key_value_heads, expected.rope_theta) == (heads[1], theta)
    assert expected.rope_layers == tuple(map(bool, getattr(new, "no_rope_layers", None) or [1] * layers))


# --- Qwen ---

QWEN2 = {**RAW, "model_type": "qwen2"}
QWEN3 = {**RAW, "model_type": "qwen3"}


def test_qwen2_has_biases_at_q_k_and_v_and_qwen3_norms_of_heads() -> None:
    of_qwen2 = {name for name in parameter_shapes(Config.from_dict(QWEN2)) if name.endswith(".bias")}
    assert {name.rpartition("self_attn.")[2] for name in of_qwen2} == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    shapes = parameter_shapes(Config.from_dict(QWEN3))
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == shapes["model.layers.0.self_attn.k_norm.weight"]
    assert len(shapes["model.layers.0.self_attn.q_norm.weight"]) == 1
    assert not any(name.endswith(".bias") for name in shapes)


def test_a_head_of_qwen3_has_128_features_unless_the_file_says_otherwise() -> None:
    raw = {key: value for key, value in QWEN3.items() if key != "head_dim"}
    assert Config.from_dict(raw).head_dim == 128
    assert Config.from_dict(raw | {"head_dim": 6}).head_dim == 6


@pytest.mark.parametrize("window", [{"use_sliding_window": True}, {"layer_types": ["sliding_attention"]}])
def test_windows_are_refused(window: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sliding_window"):
        Config.from_dict(QWEN2 | window)
    Config.from_dict(QWEN2 | {"use_sliding_window": False, "sliding_window": 4096, "layer_types": ["full_attention"]})


# --- YaRN ---


def test_what_yarn_does_not_say_is_as_in_the_paper() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0}
    scaling = Config.from_dict(RAW | {"rope_scaling": rope, "max_position_embeddings": 64}).rope_scaling
    assert scaling == {
        "factor": 4.0,
        "original_max_position_embeddings": 64.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": pytest.approx(0.1 * np.log(4) + 1),
        "truncate": 1.0,
    }


def test_yarn_without_a_factor_is_refused() -> None:
    with pytest.raises(ValueError, match="'yarn' needs factor"):
        Config.from_dict(RAW | {"rope_scaling": {"rope_type": "yarn"}})
