"""The folder of MiSS: read back exactly, and refused by name where it cannot be honoured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.method_laws import is_read_back_exactly
from support.misses import METHODS, each
from support.strategies import QV, TINY, random_weights

from minilora.formats.adapters import read_method
from minilora.methods.miss import MiSS
from minilora.model.base import base_model


@each
@pytest.mark.parametrize("tied", [True, False])
def test_miss_is_read_back_from_its_folder_exactly(tmp_path: Path, name: str, tied: bool) -> None:
    method = is_read_back_exactly(tmp_path, METHODS[name], replace(TINY, tie_word_embeddings=tied))
    seven = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    chosen = METHODS[name].target_modules
    assert method == replace(METHODS[name], target_modules=seven if chosen == ("all-linear",) else chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_weights": "bat"}, "init_weights 'bat'"),
        ({"init_weights": "mini", "mini_r": 2}, "init_weights 'mini'"),
        ({"init_weights": []}, r"init_weights is \[\], expected true or false or a text"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"r": 3}, "wrong shape: .*miss_block"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern .* is not supported"),
        ({"layers_to_transform": [0]}, "miss_block"),
    ],
)
def test_a_folder_of_miss_that_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    is_read_back_exactly(tmp_path, MiSS(2, target_modules=QV), TINY)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_method(tmp_path, base_model(TINY, random_weights(TINY, 5), np.float32))
