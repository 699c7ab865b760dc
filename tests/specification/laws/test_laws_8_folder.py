"""An adapter's folder as PEFT lays it out: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kit import Implementation, agree
from support.kit_cases import Case, drawn, quarters, seeds

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
WIDTH = 8


def folder_case(rank: int, alpha: float, rslora: bool, chosen: list[str], seed: int) -> Case:
    """A and B (8 wide) in float32 beside modules of two layers."""
    rng = np.random.default_rng(seed)
    tensors = {
        f"model.layers.{layer}.{module}": (quarters(rng, rank, WIDTH), quarters(rng, WIDTH, rank))
        for layer in (0, 1)
        for module in chosen
    }
    return Case(tensors=tensors, rank=rank, alpha=alpha, rslora=rslora, seed=seed)


folder_cases = drawn(
    folder_case,
    st.integers(1, 3),
    st.sampled_from([4.0, 1.0, 16.0]),
    st.booleans(),
    st.lists(st.sampled_from(MODULES), min_size=1, unique=True),
    seeds,
)
few = settings(max_examples=20)


def written(implementation: Implementation, case: Case, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors of a folder that the implementation wrote."""
    from safetensors.numpy import load_file

    implementation.adapter_write(folder, case.tensors, case.rank, case.alpha, case.rslora)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return config, load_file(folder / "adapter_model.safetensors")


def write_as_peft(case: Case, folder: Path) -> None:
    from safetensors.numpy import save_file

    config = {"peft_type": "LORA", "r": case.rank, "lora_alpha": case.alpha, "use_rslora": case.rslora}
    config |= {"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "task_type": "CAUSAL_LM"}
    config["target_modules"] = sorted({module.rsplit(".", 1)[1] for module in case.tensors})
    folder.joinpath("adapter_config.json").write_text(json.dumps(config), "utf-8")
    tensors = {}
    for module, (A, B) in case.tensors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


def scale_of(case: Case) -> float:
    return float(case.alpha / (case.rank**0.5 if case.rslora else case.rank))


@few
@given(case=folder_cases)
def test_the_tensors_have_pefts_names_and_nothing_is_beside_them(implementation: Implementation, case: Case) -> None:
    """base_model.model.MODULE.lora_A.weight (r, in) and .lora_B.weight (out, r)."""
    with tempfile.TemporaryDirectory() as folder:
        _, tensors = written(implementation, case, Path(folder))
        names = {f"base_model.model.{module}.lora_{k}.weight" for module in case.tensors for k in "AB"}
        assert set(tensors) == names, f"missing: {sorted(names - set(tensors))}, beside: {sorted(set(tensors) - names)}"
        for module, pair in case.tensors.items():
            for k, array in zip("AB", pair, strict=True):
                name = f"base_model.model.{module}.lora_{k}.weight"
                assert np.array_equal(tensors[name], array), f"{name} has other numbers"


@few
@given(case=folder_cases)
def test_the_configuration_says_rank_alpha_and_targets(implementation: Implementation, case: Case) -> None:
    """target_modules choose these modules: by name, by ending or by a regular expression that matches it whole."""
    with tempfile.TemporaryDirectory() as folder:
        config, _ = written(implementation, case, Path(folder))
        assert config["peft_type"] == "LORA", f"peft_type is {config['peft_type']}"
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        assert config["r"] == case.rank, f"r is {config['r']} instead of {case.rank}"
        agree("the scale that the configuration says", scale, scale_of(case), implementation.exact)
        targets = config["target_modules"]
        for module in case.tensors:
            chosen = (
                re.fullmatch(targets, module)
                if isinstance(targets, str)
                else any(module == target or module.endswith(f".{target}") for target in targets)
            )
            assert chosen, f"target_modules {targets} leave out {module}"


@few
@given(case=folder_cases)
@pytest.mark.parametrize("writer", ["itself", "peft"])
def test_a_folder_is_read_as_it_was_written(implementation: Implementation, case: Case, writer: str) -> None:
    """Every tensor to the bit, and the scale, whether the folder is its own or PEFT's."""
    with tempfile.TemporaryDirectory() as folder:
        if writer == "itself":
            implementation.adapter_write(Path(folder), case.tensors, case.rank, case.alpha, case.rslora)
        else:
            write_as_peft(case, Path(folder))
        tensors, scale = implementation.adapter_read(Path(folder))
        assert tensors.keys() == case.tensors.keys(), f"modules {sorted(tensors)} instead of {sorted(case.tensors)}"
        for module, pair in case.tensors.items():
            for k, found, expected in zip("AB", tensors[module], pair, strict=True):
                assert np.array_equal(found, expected), f"{k} of {module} has other numbers"
        agree("the scale", scale, scale_of(case), implementation.exact)
