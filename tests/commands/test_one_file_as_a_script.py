"""docs/lora_in_one_file.py as a script: what it reads, learns, writes and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import logits_of
from support.one_file import EXAMPLES, FILE, one_file

from minilora.data.batches import pad
from minilora.data.examples import Example
from minilora.formats.adapters import load_adapter
from minilora.formats.load import SHIPPED_MODEL, load_model


def test_it_reads_float32_too_and_an_untied_head_and_refuses_what_it_would_compute_wrongly(tmp_path: Path) -> None:
    one = one_file()
    config = {
        "model_type": "llama", "hidden_size": 6, "num_attention_heads": 3, "num_hidden_layers": 1, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "eos_token_id": [4, 5],
    }  # fmt: skip
    names = ("model.embed_tokens", "model.norm", "lm_head", "model.layers.0.self_attn.q_proj")
    tensors = {f"{name}.weight": np.full((2, 3), i, np.float32) for i, name in enumerate(names)}

    def load(tensors: dict[str, np.ndarray], **changed: Any) -> dict[str, Any]:
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        return one.load(tmp_path)

    model = load(tensors)
    assert [model[key][0, 0] for key in ("embed_tokens", "norm", "lm_head")] == [0, 1, 2]
    assert model["layers"][0]["q_proj"].shape == (2, 3) and model["stop"] == 4
    assert model["frequencies"].tolist() == [1.0]
    del tensors["lm_head.weight"]
    tied = load(tensors, head_dim=4)
    assert tied["lm_head"] is tied["embed_tokens"]
    np.testing.assert_allclose(tied["frequencies"], [1.0, 0.1])
    for changed in ({"model_type": "smollm3"}, {"hidden_act": "gelu"}, {"rope_scaling": {"rope_type": "llama3"}}):
        with pytest.raises(SystemExit, match="computes only"):
            load(tensors, **changed)
    with pytest.raises(SystemExit, match="no biases"):
        load(tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(2, np.float32)})
    with pytest.raises(SystemExit, match="in F16"):
        load({name: tensor.astype(np.float16) for name, tensor in tensors.items()})


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The file as a script. It may run beside other tests, where the threads of a BLAS would wait for each other."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    environment |= {"TMPDIR": str(cwd), "TEMP": str(cwd), "TMP": str(cwd)}
    command = [sys.executable, str(FILE), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_as_a_script_it_learns_to_answer_and_writes_an_adapter_that_loads_with_the_same_logits(tmp_path: Path) -> None:
    one = one_file()
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == one.STEPS and losses[-1] < 0.1 * losses[0]
    before, after = done.stdout.split("step  1")[0], done.stdout.split("after:")[1]
    assert "SELECT" not in before
    assert f"{one.QUESTION} SELECT COUNT(*) FROM doctors\n" in after

    (out,) = tmp_path.glob("*/adapter")
    assert str(out) in done.stdout
    tensors = load_file(out / "adapter_model.safetensors")
    model = one.load(SHIPPED_MODEL, np.float64)
    adapter = {
        f"{site}.{letter}": np.stack(
            [
                tensors[f"base_model.model.model.layers.{i}.self_attn.{site}.lora_{letter}.weight"].astype(np.float64)
                for i in range(len(model["layers"]))
            ]
        )
        for site in one.SITES
        for letter in "AB"
    }
    tokens, _ = EXAMPLES[0]
    base, _ = load_model(SHIPPED_MODEL, "float64")
    ours = one.forward(model, adapter, tokens)[0]
    theirs = logits_of(load_adapter(base, out, "float64"), pad([Example(tokens, [True] * len(tokens))], pad_id=0))
    np.testing.assert_allclose(theirs[0], ours, rtol=0, atol=1e-9)


def test_as_a_script_it_overwrites_nothing(tmp_path: Path) -> None:
    done = run(SHIPPED_MODEL, tmp_path, cwd=tmp_path)
    assert done.returncode != 0 and "FileExistsError" in done.stderr
    assert list(tmp_path.iterdir()) == []
