"""docs/lora_in_one_file.py is LoRA in one file: short, on NumPy alone, and equal to the package in every gradient."""

from __future__ import annotations

import ast
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
from support.one_file import EXAMPLES, FILE, one_file, random_adapter

from minilora.data.batches import pad
from minilora.data.examples import Example
from minilora.formats.adapters import load_adapter
from minilora.formats.load import SHIPPED_MODEL, load_model
from minilora.methods.lora import LoRA
from minilora.training.step import loss_and_gradients

ALLOWED = {"numpy", "safetensors", "tokenizers", "json", "sys", "tempfile", "pathlib"}


def by_peft_name(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacked by layer in the one file; one by one, and by PEFT's names, in the package."""
    return {
        f"model.layers.{i}.self_attn.{site}.lora_{letter}.weight": array
        for (site, letter), stacked in ((name.split("."), p) for name, p in arrays.items())
        for i, array in enumerate(stacked)
    }


def test_it_has_at_most_250_lines_and_imports_only_numpy_and_readers_of_files() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= ALLOWED


def test_its_loss_and_every_gradient_are_those_of_the_package() -> None:
    one = one_file()
    model = one.load(SHIPPED_MODEL, np.float64)
    adapter = random_adapter(one, model)
    loss, grads = one.loss_and_gradients(model, adapter, EXAMPLES)

    base, _ = load_model(SHIPPED_MODEL, "float64")
    method = LoRA(rank=one.RANK, alpha=one.ALPHA, target_modules=("q_proj", "v_proj"))
    trainable = by_peft_name(adapter)
    assert trainable.keys() == method.start(base, np.random.default_rng(0)).keys()
    examples = [Example(tokens, [t >= n for t in range(len(tokens))]) for tokens, n in EXAMPLES]
    expected_loss, expected = loss_and_gradients(method.attach(base, trainable), [pad(examples, pad_id=0)])

    assert abs(loss - expected_loss) < 1e-10
    ours = by_peft_name(grads)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert ours[name].dtype == np.float64
        assert np.abs(gradient).max() > 1e-6  # there is something to compare
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-10, err_msg=name)


def test_a_fresh_adapter_moves_B_alone_and_its_gradients_stay_single_precision() -> None:
    one = one_file()
    model = one.load(SHIPPED_MODEL)
    _, grads = one.loss_and_gradients(model, one.start(model, np.random.default_rng(0)), EXAMPLES)
    for name, gradient in grads.items():
        assert gradient.dtype == np.float32
        assert gradient.any() == name.endswith(".B")


def test_merged_equals_adapted() -> None:
    one = one_file()
    model = one.load(SHIPPED_MODEL, np.float64)
    adapter = random_adapter(one, model)
    fresh = one.start(model, np.random.default_rng(2))
    tokens, _ = EXAMPLES[0]
    adapted, _ = one.forward(model, adapter, tokens)
    merged, _ = one.forward(one.merge(model, adapter), fresh, tokens)
    base, _ = one.forward(model, fresh, tokens)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-10)
    assert np.abs(adapted - base).max() > 0.1


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
