"""Numbers that are not finite are refused where they enter, by file and tensor, in every command."""

from __future__ import annotations

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.commands import ADAPTER, CONFIG, PAIRS, assert_refused, run, write_rows

from minilora.formats.files import read_json
from minilora.formats.finite import PIECE, finite
from minilora.frozen.gguf import SCALES, Blocks
from minilora.model.config import Config

DTYPES = [np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
SICK = {"NaN": math.nan, "negative NaN": -math.nan, "infinity": math.inf, "negative infinity": -math.inf}
TENSOR = "model.layers.1.mlp.up_proj.weight"


# --- The check ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=st.integers(1, 3) | st.integers(PIECE - 1, PIECE + 2), data=st.data())
def test_one_number_that_is_not_finite_is_found_wherever_it_is(
    dtype: np.dtype[Any], size: int, data: st.DataObject
) -> None:
    tensor = np.zeros(size, dtype)
    largest = ml_dtypes.finfo(dtype).max  # type: ignore[no-untyped-call,unused-ignore]
    tensor[::2], tensor[1::2] = largest, -largest
    assert finite("file", "name", tensor) is tensor
    tensor[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from(sorted(SICK.values(), key=str)))
    with pytest.raises(ValueError, match="file: name holds numbers that are not finite"):
        finite("file", "name", tensor)


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("kind", SCALES)
def test_blocks_stand_for_finite_numbers_exactly_where_their_scales_are_finite(kind: str) -> None:
    """Each pair of neighbouring bytes of a block is made a NaN of 16 bits in turn: only in a scale does it matter."""
    import gguf

    type = gguf.GGMLQuantizationType[kind]
    healthy = np.zeros((2, gguf.GGML_QUANT_SIZES[type][1]), np.uint8)
    assert np.isfinite(Blocks(healthy, type).scales()).all()
    found = []
    for byte in range(0, healthy.shape[1] - 1):
        sick = healthy.copy()
        sick[1, byte : byte + 2] = 0xFF
        blocks = Blocks(sick, type)
        with np.errstate(invalid="ignore"):
            found.append(np.isfinite(blocks.rows()).all())
        assert np.isfinite(blocks.scales()).all() == found[-1], byte
    assert not all(found)


# --- The commands ---


@pytest.fixture(params=["NaN", "negative infinity"])
def sick_model(request: Any, model: Path, tmp_path: Path) -> Path:
    """The model with one weight that is not finite."""
    folder = shutil.copytree(model, tmp_path / "sick")
    tensors = load_file(folder / "model.safetensors")
    tensors[TENSOR][3, 5] = SICK[request.param]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def calls(model: Path, adapter: Path, rows: Path, out: Path) -> dict[str, list[object]]:
    both = ["--model", model, "--adapter", adapter]
    return {
        "train": [*both, "--data", rows, "--steps", 1, "--out", out],
        "evaluate": [*both, "--data", rows],
        "generate": [*both, "--prompt", "up"],
        "chat": both,
        "merge": [*both, "--out", out],
        "convert": [*both, "--format", "mlx", "--out", out],
    }


@pytest.mark.parametrize("command", calls(Path(), Path(), Path(), Path()))
def test_a_base_that_is_not_finite_is_refused_by_every_command(
    command: str, sick_model: Path, adapter: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    result = run(command, *calls(sick_model, adapter, rows, tmp_path / "out")[command])
    assert_refused(result, f"{sick_model / 'model.safetensors'}: {TENSOR}", "not finite")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_finite_is_not_converted(sick_model: Path, tmp_path: Path) -> None:
    result = run("convert", "--model", sick_model, "--dtype", "float16", "--out", tmp_path / "out")
    assert_refused(result, f"{sick_model / 'model.safetensors'}: {TENSOR}", "not finite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [*calls(Path(), Path(), Path(), Path()), "combine"])
def test_an_adapter_that_is_not_finite_is_refused_by_every_command(
    command: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    sick = tmp_path / "sick"
    sick.mkdir()
    shutil.copy(adapter / "adapter_config.json", sick)
    tensors = load_file(adapter / ADAPTER)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = math.nan
    save_file(tensors, sick / ADAPTER)
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    combining: list[object] = ["--adapter", adapter, "--adapter", sick, "--model", model, "--out", tmp_path / "out"]
    flags = {**calls(model, sick, rows, tmp_path / "out"), "combine": combining}[command]
    assert_refused(run(command, *flags), f"{sick / ADAPTER}: {name}", "not finite")
    assert not (tmp_path / "out").exists()


def test_finite_numbers_whose_merger_overflows_are_not_written(model: Path, adapter: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.mkdir()
    shutil.copy(adapter / "adapter_config.json", huge)
    save_file({name: np.full_like(p, 1e30) for name, p in load_file(adapter / ADAPTER).items()}, huge / ADAPTER)
    with np.errstate(all="ignore"):
        result = run("merge", "--model", model, "--adapter", huge, "--out", tmp_path / "out")
    assert_refused(result, "proj.weight", "not finite")
    assert not (tmp_path / "out").exists()


# --- Configurations and JSON ---


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["lora_alpha", "lora_dropout"])
def test_a_field_of_an_adapter_that_is_not_finite_is_refused_by_name(
    key: str, number: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {key: "?"}).replace('"?"', number))
    result = run("generate", "--model", model, "--adapter", folder, "--prompt", "up")
    assert_refused(result, str(folder / "adapter_config.json"), key)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "factor"])
def test_a_field_of_a_model_that_is_not_finite_is_refused_by_name(key: str) -> None:
    """As a GGUF file may give it; JSON is refused as it is read."""
    raw = CONFIG | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    Config.from_dict(raw)
    sick = raw | ({"rope_scaling": {"rope_type": "linear", key: math.inf}} if key == "factor" else {key: math.nan})
    with pytest.raises(ValueError, match=f"{key} is (nan|inf)"):
        Config.from_dict(sick)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"b": {"a": -Infinity}}', '{"a": [1, 1e999]}'])
def test_json_with_a_number_that_json_has_not_is_refused_by_file_and_key(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"file\.json: .*a is (nan|-inf|inf)"):
        read_json(tmp_path / "file.json")


def test_a_prompt_with_such_a_number_beside_it_is_refused_by_its_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "up"}\n{"prompt": "down", "score": NaN}\n')
    assert_refused(run("generate", "--model", model, "--prompts", tmp_path / "prompts.jsonl"), "line 2", "score")


# --- The advice ---


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_model_whose_numbers_overflow_is_not_blamed_on_the_rate(model: Path, data: Path, tmp_path: Path) -> None:
    huge = shutil.copytree(model, tmp_path / "huge")
    tensors = {name: p.astype(np.float32) for name, p in load_file(model / "model.safetensors").items()}
    tensors |= {name: np.full_like(p, 3e38) for name, p in tensors.items() if "norm" in name}
    save_file(tensors, huge / "model.safetensors", {"format": "pt"})
    flags = ("--data", data / "train-only", "--steps", 2, "--eval-rows", 0, "--model")
    result = run("train", *flags, huge, "--out", tmp_path / "base")
    assert_refused(result, "step 1: the loss is nan", "it is not the learning rate", str(huge))
    result = run("train", *flags, model, "--out", tmp_path / "rate", "--optimizer", "sgd", "--learning-rate", 1e38)
    assert_refused(result, "step 2: the loss is", "a lower --learning-rate (now 1e+38)")
    assert "it is not the learning rate" not in result.err
