"""The folder of a prefix or a prompt, as PEFT lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.strategies import TINY
from support.virtual_tokens import Tuned, VirtualTokens, base, each_method

from minilora.formats.adapters import load_adapter, read_method, write_method
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.virtual_tokens import EMBEDDINGS


def written(folder: Path, method: VirtualTokens, seed: int = 0) -> Path:
    case = Tuned(TINY, method, seed)
    trainable = {name: P.astype(np.float32) for name, P in case.trainable.items()}
    write_method(folder, method, trainable, TINY, "org/base", "main")
    return folder


@each_method
def test_what_is_written_is_read_again(method: type[VirtualTokens], tmp_path: Path) -> None:
    read, tensors = read_method(written(tmp_path, method(3)), base(TINY, 0))
    assert read == method(3)
    np.testing.assert_array_equal(tensors[EMBEDDINGS], load_file(tmp_path / "adapter_model.safetensors")[EMBEDDINGS])
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["token_dim"] == {PrefixTuning: 4, PromptTuning: 8}[method]  # the width of one key head, and of the model
    assert raw["num_attention_heads"] == {PrefixTuning: 1, PromptTuning: 2}[method]
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("org/base", "main")


@each_method
@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"token_dim": 5}, r"config.json: token_dim is 5, but with this base model it is"),
        ({"num_layers": 3}, r"config.json: num_layers is 3, but with this base model it is 2"),
        ({"num_transformer_submodules": 2}, r"num_transformer_submodules is 2"),
        ({"num_virtual_tokens": None}, r"config.json: 'num_virtual_tokens' is missing"),
        ({"num_virtual_tokens": 63}, r"config.json: num_virtual_tokens 63 must be from 1 to 62"),
        (
            {"num_virtual_tokens": 4},
            r"safetensors: tensors of wrong shape: prompt_embeddings \(3, .*\), expected \(4, ",
        ),
        ({"modules_to_save": ["lm_head"]}, r"config.json: modules_to_save \['lm_head'\] is not supported"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(
    method: type[VirtualTokens], changed: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path, method(3)) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=complaint):
        load_adapter(base(TINY, 0), tmp_path)


@each_method
def test_a_tensor_of_another_name_is_refused(method: type[VirtualTokens], tmp_path: Path) -> None:
    file = written(tmp_path, method(3)) / "adapter_model.safetensors"
    save_file({"embeddings": load_file(file)[EMBEDDINGS]}, file)
    with pytest.raises(ValueError, match="missing: prompt_embeddings; unexpected: embeddings"):
        load_adapter(base(TINY, 0), tmp_path)
