"""GGUF files: read to the last bit or refused by name, held in their own blocks, written whole, and read back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.commands import ADAPTER, PAIRS, assert_refused, contents, good, read, run, write_rows
from support.gguf_models import (
    BLOCKS_OF_32,
    LLAMA,
    LLAMA3,
    SCALES_OF_256,
    SHAPES,
    YARN,
    in_blocks_of,
    write_adapter_of,
    write_model,
)
from support.small_tokenizer import write_tokenizer
from support.tiny_runs import interrupted_after

gguf = pytest.importorskip("gguf")

from minilora.data.tokenizer import Tokenizer  # noqa: E402
from minilora.formats.checkpoint import read_config, read_weights  # noqa: E402
from minilora.formats.gguf import gguf_weights, order_for_file, order_in_file  # noqa: E402
from minilora.formats.gguf_file import _reader, open_gguf  # noqa: E402
from minilora.formats.gguf_tokenizer import tokenizer_files  # noqa: E402
from minilora.formats.gguf_write import _add_field  # noqa: E402
from minilora.formats.load import SHIPPED_MODEL, load_model  # noqa: E402
from minilora.frozen.gguf import Blocks, BlockWeight  # noqa: E402
from minilora.frozen.hold import hold  # noqa: E402
from minilora.methods.dora import DoRA  # noqa: E402
from minilora.methods.lora import LoRA  # noqa: E402
from minilora.model.model import forward  # noqa: E402
from minilora.model.names import HEAD  # noqa: E402
from minilora.runs import folder as folder_module  # noqa: E402

TEXT = "How are you? I'm 12345 years old,\n\n  they've said: Ünïcödé 数字\t<|im_start|>user\nHi<|im_end|>\n"
KINDS = (*BLOCKS_OF_32, *SCALES_OF_256)


def as_gguf(source: Path, target: Path, *more: object) -> Path:
    good("convert", "--model", source, "--format", "gguf", "--out", target, *more)
    return target


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A model in one file, float32."""
    return as_gguf(write_model(tmp_path / "model"), tmp_path / "model.gguf")


def q4_1(file: Path) -> Path:
    return in_blocks_of("Q4_1", file, file.with_name("q4_1.gguf"))


def changed(file: Path, tensors: dict[str, Any] | None = None, **fields: Any) -> Path:
    """The file with other fields (`__` is a dot; None removes one) and other tensors."""
    source, target = open_gguf(file), file.with_name("changed.gguf")
    new = {key.replace("__", "."): value for key, value in fields.items()}
    values = {key: value for key, value in source.fields.items() if not key.startswith("GGUF.")} | new
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for key, value in values.items():
        if value is not None:
            _add_field(writer, key, value)
    for name, data in ({name: tensor.data for name, tensor in source.tensors.items()} | (tensors or {})).items():
        if data is not None:
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def logits(path: Path, frozen: str = "widened") -> np.ndarray:
    model = load_model(path, frozen=frozen)[0]
    tokens = np.arange(3, 40)[None]
    hidden = forward(model, tokens, np.arange(37)[None], np.ones_like(tokens), keep=False)[0]
    return np.asarray(model.sites[HEAD].forward(hidden)[0])


# --- There and back ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_in_a_file_and_back_is_the_same_model_to_the_last_bit(tmp_path: Path, shape: str, dtype: str) -> None:
    """The matrices in the dtype of the file; gains and biases stay in float32 in it."""
    source = write_model(tmp_path / "model", SHAPES[shape])
    file = as_gguf(source, tmp_path / "model.gguf", "--dtype", dtype)
    config, _ = read_config(source)
    again, raw = read_config(file)
    eps = np.float32(config.rms_norm_eps).item()
    assert raw["rms_norm_eps"] == eps, "as the file says it, in float32"
    assert again.__dict__ | {"rms_norm_eps": 0} == config.__dict__ | {"rms_norm_eps": 0}
    ours, theirs = read_weights(source, config), read_weights(file, again)
    assert [*ours] == [*theirs]
    for name, tensor in ours.items():
        expected = tensor.astype(theirs[name].dtype)
        assert theirs[name].dtype.name == (dtype if tensor.ndim == 2 else "float32")
        assert expected.tobytes() == theirs[name].tobytes(), name

    good("convert", "--model", file, "--out", tmp_path / "folder", "--dtype", dtype)
    there = as_gguf(tmp_path / "folder", tmp_path / "again" / "model.gguf", "--dtype", dtype)
    if dtype == "float32":
        assert there.read_bytes() == file.read_bytes()
    np.testing.assert_array_equal(logits(tmp_path / "folder")[:, :5], logits(tmp_path / "folder", "stored")[:, :5])


@pytest.mark.parametrize(
    ("dtype", "known"),
    [("float32", "ALL_F32"), ("float16", "MOSTLY_F16"), ("bfloat16", "MOSTLY_BF16"), ("q8_0", "MOSTLY_Q8_0")],
)
def test_the_fields_of_a_file_are_llama_cpps_with_the_models_own_numbers(
    tmp_path: Path, dtype: str, known: str
) -> None:
    """No two of the numbers are equal, but those that are one thing under several names."""
    raw = LLAMA | {"head_dim": 32, "rope_theta": 50000.0, "rms_norm_eps": 0.25, "rope_scaling": YARN}
    fields = open_gguf(as_gguf(write_model(tmp_path / "model", raw), tmp_path / "m.gguf", "--dtype", dtype)).fields
    own = {
        "context_length": 256, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": 0.25, "rope.dimension_count": 32,
        "rope.freq_base": 50000.0, "vocab_size": 320, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }  # fmt: skip
    assert {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")} == own
    assert fields["general.file_type"] == gguf.LlamaFileType[known].value
    assert fields["general.architecture"] == "llama" and fields["general.quantization_version"] == 2


def test_q8_0_holds_each_block_of_32_by_its_largest_and_reads_back_to_the_same_bytes(
    tmp_path: Path, file: Path
) -> None:
    small = as_gguf(tmp_path / "model", tmp_path / "small" / "q8.gguf", "--dtype", "q8_0")
    config, _ = read_config(small)
    for name, tensor in read_weights(file, config).items():
        held = read_weights(small, config)[name]
        if tensor.ndim == 1:
            assert held.tobytes() == tensor.tobytes()
        else:
            blocks = tensor.reshape(len(tensor), -1, 32)
            step = abs(blocks).max(axis=-1, keepdims=True) / 127
            of_step = np.maximum(step * 2**-11, 2.0**-25)  # the step is rounded too, to 16 bits
            assert (abs(held.reshape(blocks.shape) - blocks) <= 0.5001 * step + 127 * of_step).all()
    assert as_gguf(small, tmp_path / "more" / "q8.gguf", "--dtype", "q8_0").read_bytes() == small.read_bytes()


def test_the_order_of_rows_in_a_file_is_undone() -> None:
    """Within a head of 6 features the file has 0 3 1 4 2 5: those that turn together are neighbours."""
    assert order_for_file(6, 1).tolist() == [0, 3, 1, 4, 2, 5]
    assert order_for_file(24, 4)[order_in_file(24, 4)].tolist() == list(range(24))


@pytest.mark.parametrize("original", [8192, 32768])
def test_the_scaling_of_llama_3_is_found_again_from_its_factors_and_others_are_refused(
    tmp_path: Path, original: int
) -> None:
    raw = LLAMA | {"head_dim": 64, "rope_theta": 500000.0}
    raw |= {"rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": original}}
    file = as_gguf(write_model(tmp_path / "model", raw), tmp_path / "model.gguf")
    assert read_config(file)[1]["rope_scaling"] == raw["rope_scaling"]
    assert_refused(
        run("generate", "--model", changed(file, {"rope_freqs.weight": np.full(32, 1.5, np.float32)})), "rope_freqs"
    )


# --- Tokenizers ---


@pytest.mark.parametrize("post_processor", ["none", "bos", "eos", "bos and eos"])
def test_the_tokenizer_of_a_file_is_that_of_the_folder(tmp_path: Path, post_processor: str) -> None:
    source = write_model(tmp_path / "model", post_processor=post_processor)
    file = as_gguf(source, tmp_path / "model.gguf")
    good("convert", "--model", file, "--out", tmp_path / "folder")
    ours = Tokenizer.load(source)
    for other in (Tokenizer.load(file), Tokenizer.load(tmp_path / "folder")):
        assert other.encode(TEXT) == ours.encode(TEXT)
        assert other.backend.encode(TEXT).ids == ours.backend.encode(TEXT).ids
        assert other.decode(ours.encode(TEXT)) == ours.decode(ours.encode(TEXT))
        assert (other.roles, other.templates, other.prefix) == (ours.roles, ours.templates, ours.prefix)
        assert (other.bos_id, other.eos_id, other.pad_id, other.stop_ids) == (1, 2, 2, frozenset([2]))
        assert other.special_tokens == ours.special_tokens
        assert other.remarks == []


def test_the_shipped_model_goes_into_a_file_and_back(tmp_path: Path) -> None:
    file = as_gguf(SHIPPED_MODEL, tmp_path / "tinysmol.gguf", "--dtype", "bfloat16")
    ours, theirs = Tokenizer.load(SHIPPED_MODEL), Tokenizer.load(file)
    assert open_gguf(file)["tokenizer.ggml.pre"] == "smollm"
    assert theirs.encode(TEXT * 3) == ours.encode(TEXT * 3)
    prompt = ["--prompt", "count the users", "--max-tokens", 16]
    assert good("generate", "--model", file, *prompt) == good("generate", *prompt)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_each_pre_tokenizer_cuts_a_text_into_its_words(file: Path, pre: str) -> None:
    words = {
        "smollm": ["ab", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "'", "LL"],
        "gpt-2": ["ab", "Ġ1234", "Ċ", "Ċ", "'", "LL"],
        "llama-bpe": ["ab", "Ġ", "123", "4", "ĊĊ", "'LL"],
        "qwen2": ["ab", "Ġ", "1", "2", "3", "4", "ĊĊ", "'LL"],
    }
    tokenizer = Tokenizer.load(changed(file, tokenizer__ggml__pre=pre))
    assert [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("ab 1234\n\n'LL")] == words[pre]
    source = write_tokenizer(file.parent / "other")
    raw = tokenizer_files(tokenizer.folder)["tokenizer.json"]
    (source / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copyfile(file.parent / "model" / "config.json", source / "config.json")
    shutil.copyfile(file.parent / "model" / "model.safetensors", source / "model.safetensors")
    assert open_gguf(as_gguf(source, file.parent / "other" / "other.gguf"))["tokenizer.ggml.pre"] == pre


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "model" / "tokenizer.json"
    raw = read(path)
    raw["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(raw))
    out = ["--format", "gguf", "--out", tmp_path / "new" / "x.gguf"]
    assert_refused(run("convert", "--model", tmp_path / "model", *out), "cutting words", "smollm")
    assert not (tmp_path / "new").exists()


# --- Refused by name ---


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"general__architecture": "gemma3"}, "architecture 'gemma3'"),
        ({"general__type": "adapter"}, "general.type is 'adapter'"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer 'llama'"),
        ({"tokenizer__ggml__pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm'"),
        ({"tokenizer__ggml__pre": None}, "pre-tokenizer 'without a name'"),
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__block_count": 4}, "blk.3.attn_norm.weight"),
        ({"llama__expert_count": 8}, "llama.expert_count 8"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count 8"),
        ({"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0}, "'longrope'"),
        ({"split__count": 3}, "one of 3 parts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(file: Path, fields: dict[str, Any], named: str) -> None:
    other = changed(file, **fields)
    assert_refused(run("generate", "--model", other, "--prompt", "a"), named, other.name)


def test_tensors_that_are_unknown_or_of_an_unknown_kind_are_refused_by_name(file: Path) -> None:
    other = changed(file, {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)})
    assert_refused(run("generate", "--model", other), "unexpected: blk.0.attn_q_norm.weight")
    other = changed(file, {"output_norm.weight": np.ones(64, np.int32)})
    assert_refused(run("generate", "--model", other), "output_norm.weight is of type I32", "Q4_K")


def test_a_file_that_is_cut_off_missing_or_no_gguf_is_an_error_that_names_it(tmp_path: Path, file: Path) -> None:
    whole = file.read_bytes()
    for number, part in enumerate((b"", b"version https://git-lfs", whole[:5000], whole[:-64])):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(part)
        assert_refused(run("generate", "--model", path), f"{path}: not a whole GGUF file")
    assert_refused(run("generate", "--model", tmp_path / "none.gguf"), "none.gguf: no such file")


def test_without_the_library_the_error_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    _reader.cache_clear()  # made with the library, if another test has read a file
    path = file.rename(file.with_name("unseen.gguf"))
    assert_refused(run("generate", "--model", path), "pip install 'minilora[gguf]'")


# --- Frozen weights in the file's own blocks ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_blocks_is_held_as_the_library_dequantises_it(tmp_path: Path, kind: str) -> None:
    raw = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    file = in_blocks_of(kind, as_gguf(write_model(tmp_path / "m", raw), tmp_path / "m.gguf"), tmp_path / "blocks.gguf")
    config, _ = read_config(file)
    dense, blocks = read_weights(file, config), gguf_weights(file, config, blocks=True)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        assert isinstance(blocks[name], Blocks) and blocks[name].shape == dense[name].shape
        theirs = open_gguf(file).tensors[gguf_weights(file, config).names[name]]
        rows = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        if "k_proj" in name:
            rows = rows[order_in_file(len(rows), config.num_key_value_heads)]
        assert dense[name].tobytes() == rows.tobytes()
        weight, widened = hold(blocks[name], np.float32, "stored"), hold(dense[name], np.float32)
        assert isinstance(weight, BlockWeight)
        x, dy = np.ones((5, 256), np.float32), np.ones((5, len(rows)), np.float32)
        assert weight.dense().tobytes() == rows.tobytes()
        assert weight.rows(np.array([3, 0, 3])).tobytes() == rows[[3, 0, 3]].tobytes()
        np.testing.assert_allclose(weight.forward(x), widened.forward(x), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(weight.backward(dy), widened.backward(dy), rtol=1e-5, atol=1e-5)
        for frozen in ("widened", "nf4", "offloaded"):
            assert hold(blocks[name], np.float32, frozen).dense().tobytes() == (
                hold(dense[name], np.float32, frozen).dense().tobytes()
            )
        for half in ("bf16", "fp16"):
            ours, same = (hold(each, np.float32, "stored", half) for each in (blocks[name], dense[name]))
            assert ours.dense().tobytes() == same.dense().tobytes()


def test_a_model_in_blocks_computes_what_the_dequantised_one_does_and_the_weights_stay_in_the_file(file: Path) -> None:
    path = q4_1(file)
    np.testing.assert_array_equal(logits(path, "stored"), logits(path))
    for site in load_model(path, frozen="stored")[0].sites.values():
        weight = getattr(site, "weight", None)
        if weight is not None and not isinstance(weight, np.ndarray):
            data = weight.blocks.data
            while isinstance(data.base, np.ndarray) and not isinstance(data, np.memmap):
                data = data.base
            assert isinstance(data, np.memmap)


def in_its_file(array: Any) -> bool:
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "Q4_1", "Q8_0"])
def test_a_mapped_model_in_one_file_computes_what_the_stored_one_does_to_the_last_bit(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its matrices stay in the file, but q and k in 32 bits, whose rows change places."""
    monkeypatch.setattr("minilora.backend.SLICE", 64 * 16)
    source, path = write_model(tmp_path / "model"), tmp_path / "model.gguf"
    if kind.startswith("Q"):
        path = in_blocks_of(kind, as_gguf(source, path), tmp_path / "blocks.gguf")
    else:
        as_gguf(source, path, "--dtype", kind)
    assert logits(path, "mapped").tobytes() == logits(path, "stored").tobytes()
    x, dy = np.ones((3, 64), np.float32), np.ones((3, 96), np.float32)
    for name, site in load_model(path, frozen="mapped")[0].sites.items():
        if hasattr(site, "weight"):
            copied = kind == "float32" and name.endswith(("q_proj", "k_proj"))
            assert in_its_file(site.weight.array) is not copied, name
    up = "model.layers.0.mlp.up_proj"
    mapped, stored = (load_model(path, frozen=frozen)[0].sites[up] for frozen in ("mapped", "stored"))
    assert mapped.forward(x)[0].tobytes() == stored.forward(x)[0].tobytes()
    assert mapped.backward(dy, None)[0].tobytes() == stored.backward(dy, None)[0].tobytes()


def interrupt_from(now: bool) -> bool:
    if now:
        raise KeyboardInterrupt
    return False


def test_lora_trains_straight_on_a_quantised_file_and_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = q4_1(file), write_rows(tmp_path / "rows.jsonl", PAIRS)
    monkeypatch.chdir(path.parent)
    flags = ["--model", path.name, "--data", data, "--learning-rate", 0.01, "--eval-rows", 0, "--schedule", "constant"]
    flags += ["--frozen", "stored"]
    good("train", *flags, "--steps", 6, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_state", interrupted_after(3))
        assert run("train", *flags, "--steps", 6, "--save-every", 3, "--out", tmp_path / "half").code == 130
    monkeypatch.chdir(tmp_path.parent)
    assert read(tmp_path / "half" / "settings.json")["model"] == str(path.resolve())
    good("train", "--resume", tmp_path / "half")
    assert (tmp_path / "half" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    good("train", *[*flags[:1], path, *flags[2:-1]], "widened", "--steps", 6, "--out", tmp_path / "widened")
    ours, theirs = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "widened"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_every_command_that_takes_a_model_takes_a_file(tmp_path: Path, file: Path) -> None:
    path, data = q4_1(file), write_rows(tmp_path / "rows.jsonl", PAIRS)
    good("train", "--model", path, "--data", data, "--steps", 2, "--eval-rows", 0, "--out", tmp_path / "run")
    good("train", "--model", path, "--data", data, "--steps", 1, "--out", tmp_path / "full", "--method", "full")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= contents(tmp_path / "full").keys()
    flags = ["--model", path, "--adapter", tmp_path / "run"]
    assert json.loads(good("evaluate", *flags, "--data", data, "--json"))["examples"] == len(PAIRS)
    assert good("generate", *flags, "--prompt", "up ->", "--max-tokens", 4)
    assert good("generate", *flags, "--frozen", "stored", "--prompt", "up ->", "--max-tokens", 4)
    good("merge", *flags, "--out", tmp_path / "merged")
    assert good("generate", "--model", tmp_path / "merged", "--prompt", "up ->", "--max-tokens", 4)
    good("plan", "--model", path, "--batch-size", 2, "--max-length", 16)
    more = ["--adapter", tmp_path / "run", "--adapter", f"b={tmp_path / 'run'}"]
    good("combine", *more, "--model", path, "--out", tmp_path / "sum")
    good("convert", "--adapter", tmp_path / "run", "--format", "mlx", "--out", tmp_path / "mlx")


# --- Out ---


def test_an_adapter_is_written_with_its_scale_in_B_and_alpha_0_and_the_rows_of_q_and_k_in_the_files_order(
    tmp_path: Path, file: Path
) -> None:
    method = LoRA(rank=4, alpha=6, rslora=True, alpha_pattern={"v_proj": 2.0}, rank_pattern={"k_proj": 2})
    folder = write_adapter_of(tmp_path / "model", tmp_path / "adapter", method)
    out = tmp_path / "adapter.gguf"
    good("convert", "--adapter", folder, "--format", "gguf", "--out", out)
    assert not (tmp_path / "Modelfile.adapter").exists()
    reader = gguf.GGUFReader(out)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    found = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    ours = load_file(folder / ADAPTER)
    assert len(found) == len(ours) == 3 * 7 * 2
    for module, theirs, heads, scale in (
        ("self_attn.q_proj", "attn_q", 4, 3.0),
        ("self_attn.k_proj", "attn_k", 2, 6 / 2**0.5),
        ("self_attn.v_proj", "attn_v", 0, 1.0),
        ("mlp.down_proj", "ffn_down", 0, 3.0),
    ):
        A, B = (ours[f"base_model.model.model.layers.1.{module}.lora_{which}.weight"] for which in "AB")
        assert found[f"blk.1.{theirs}.weight.lora_a"].tobytes() == A.tobytes()
        B = np.float32(scale) * B
        if heads:
            B = B.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(B.shape)
        assert found[f"blk.1.{theirs}.weight.lora_b"].tobytes() == B.tobytes()


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (DoRA(rank=2), "this is dora"),
        (LoRA(rank=2, modules_to_save=("norm",)), "modules_to_save, here norm"),
        (LoRA(rank=2, target_modules=("lm_head", "q_proj")), "changes lm_head"),
        (LoRA(rank=2, target_modules=("embed_tokens",)), "changes model.embed_tokens"),
    ],
    ids=["dora", "modules_to_save", "tied head", "tied embedding"],
)
def test_an_adapter_that_the_format_has_no_place_for_is_refused_by_name_and_can_be_merged(
    tmp_path: Path, file: Path, method: LoRA, named: str
) -> None:
    folder = write_adapter_of(tmp_path / "model", tmp_path / "adapter", method)
    result = run("convert", "--adapter", folder, "--format", "gguf", "--out", tmp_path / "a" / "adapter.gguf")
    assert_refused(result, named, "merge it instead: python -m minilora.merge --format gguf")
    assert not (tmp_path / "a").exists()
    flags = ["--model", tmp_path / "model", "--adapter", folder, "--format", "gguf", "--untie"]
    good("merge", *flags, "--out", tmp_path / "merged" / "m.gguf")
    good("merge", *flags[:4], "--untie", "--out", tmp_path / "folder")
    np.testing.assert_allclose(logits(tmp_path / "merged" / "m.gguf"), logits(tmp_path / "folder"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_a_merged_file_is_the_merged_folder_rounded_with_tokenizer_template_and_modelfile(
    tmp_path: Path, file: Path, dtype: str
) -> None:
    adapter = write_adapter_of(tmp_path / "model", tmp_path / "adapter")
    flags = ["--model", tmp_path / "model", "--adapter", adapter]
    out = tmp_path / "out" / "merged.gguf"
    said = good("merge", *flags, "--format", "gguf", "--dtype", dtype, "--out", out)
    assert f"written as {dtype}" in said
    assert contents(out.parent).keys() == {"merged.gguf", "Modelfile"}
    assert (out.parent / "Modelfile").read_text() == 'FROM ./merged.gguf\nPARAMETER stop "<|im_end|>"\n'
    good("merge", *flags, "--out", tmp_path / "folder")
    there = as_gguf(tmp_path / "folder", tmp_path / "there" / "merged.gguf", "--dtype", dtype)
    assert there.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (SHAPES["qwen3"] | {"attention_bias": True}, "llama.cpp's qwen3 has no biases"),
        (LLAMA | {"rope_scaling": YARN | {"beta_fast": 16.0}}, "YaRN's beta_fast is 16 here, and 32 in llama.cpp"),
        (LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.0}}, "YaRN's attention_factor is 1 here"),
    ],
    ids=["biases of qwen3", "beta of yarn", "factor of yarn"],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_not_written(
    tmp_path: Path, raw: dict[str, Any], named: str
) -> None:
    source = write_model(tmp_path / "model", raw)
    result = run("convert", "--model", source, "--format", "gguf", "--out", tmp_path / "out" / "m.gguf")
    assert_refused(result, named)
    assert not (tmp_path / "out").exists()


def test_a_written_file_replaces_nothing_and_appears_whole_or_not_at_all(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", tmp_path / "model", "--format", "gguf"]
    assert_refused(run("convert", *model, "--out", file), f"{file} exists")
    assert_refused(run("convert", *model, "--out", tmp_path / "other.gguf"), "Modelfile exists")
    assert_refused(run("convert", *model, "--out", tmp_path / "folder"), "ends in .gguf")
    raw = LLAMA | {"intermediate_size": 72}
    odd = write_model(tmp_path / "odd", raw)
    out = ["--format", "gguf", "--dtype", "q8_0", "--out", tmp_path / "new" / "x.gguf"]
    assert_refused(run("convert", "--model", odd, *out), "rows of 72", "q8_0")
    assert not [*(tmp_path / "new").glob("*")]
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert_refused(run("convert", *model, "--out", tmp_path / "new" / "x.gguf"), "disk full")
    assert not [*(tmp_path / "new").glob("*")]


def test_flags_that_contradict_each_other_are_refused(tmp_path: Path, file: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert_refused(run("convert", *out), "nothing to convert")
    assert_refused(run("convert", "--model", file, "--format", "peft", *out), "huggingface or gguf")
    assert_refused(run("convert", "--adapter", tmp_path, *out), "peft or mlx or gguf")
    assert_refused(run("convert", "--adapter", tmp_path, "--format", "peft", "--dtype", "float16", *out), "--dtype")
    assert_refused(run("convert", "--model", file, "--dtype", "q8_0", *out), "q8_0 goes with --format gguf")
    assert_refused(run("merge", "--adapter", tmp_path, "--dtype", "q8_0", *out), "q8_0 goes with --format gguf")
