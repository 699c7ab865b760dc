"""MiSS is PEFT's: the same logits and gradients, folders that travel both ways, and every command that knows it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.commands import ADAPTER, good, run
from support.golden import assert_agree
from support.models import logits_of
from support.peers import (
    ONE_STEP_OF_DESCENT,
    float64_throughout,
    padded_batches,
    peer_loss,
    peer_of,
    peft,
    pytorch_loss,
    raw_configs,
    torch,
    transformers,
)
from support.strategies import normal, random_weights, seeds

from minilora.adapters.merging import merged_parameters
from minilora.backend import random_generator
from minilora.data.batches import Batch
from minilora.formats.adapters import load_adapter, write_method
from minilora.formats.load import load_model
from minilora.frozen.weight import DenseWeight
from minilora.lora import dropout_mask
from minilora.methods.miss import MiSS, miss, miss_backward
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.runs import run as runs
from minilora.training.step import loss_and_gradients

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_miss(theirs: Any, **options: Any) -> Any:
    """The peer with PEFT's MiSS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(theirs, peft.MissConfig(task_type="CAUSAL_LM", **options)).eval()


def parameters(theirs: Any) -> dict[str, Any]:
    """What trains of PEFT's model, under our names."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }


@settings(max_examples=25)
@given(
    raw_configs(),
    st.integers(1, 2),
    st.sampled_from([SEVEN, ("q_proj", "v_proj"), ("down_proj", "lm_head")]),
    padded_batches,
    seeds,
)
def test_peft_has_the_same_logits_loss_and_gradients_of_M(
    raw: dict[str, Any], rank: int, targets: tuple[str, ...], batch: Batch, seed: int
) -> None:
    config, weights = Config.from_dict(raw), random_weights(Config.from_dict(raw), seed)
    method, base = MiSS(rank, target_modules=targets), base_model(config, weights, np.float64)
    trainable = {name: normal(seed, *shape) for name, shape in method.shapes(config).items()}
    ours = method.attach(base, trainable)
    with float64_throughout():
        theirs = with_miss(peer_of(raw, weights), r=rank, target_modules=list(targets))
        named = parameters(theirs)
        assert named.keys() == trainable.keys()
        for name, p in named.items():
            p.data = torch.tensor(trainable[name])
        loss, logits = peer_loss(theirs, batch)
        loss.backward()
    real = batch.segments > 0
    assert_agree({"": logits_of(ours, batch)[real]}, {"": logits.detach().numpy()[real]}, 1e-10)
    our_loss, gradients = loss_and_gradients(ours, [batch])
    assert our_loss == pytest.approx(loss.item(), rel=1e-10)
    assert_agree(gradients, {name: p.grad.numpy() for name, p in named.items()}, 1e-10)


@pytest.mark.parametrize(("inner", "rank"), [(6, 3), (7, 3), (5, 5), (9, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_peft_pads_and_drops_as_we_do_in_training(inner: int, rank: int, bias: bool) -> None:
    """One linear map, PEFT's dropout replaced by our mask; where r does not divide in, PEFT pads x with zeros."""

    class Masked(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return x * torch.tensor(np.pad(mask, ((0, 0), (0, x.shape[1] - inner))))

    x, dy, W, b, M = (normal(i, *shape) for i, shape in enumerate([(8, inner), (8, 4), (4, inner), (4,), (rank, 4)]))
    mask = dropout_mask(x.shape, 0.5, random_generator(7), float)
    layer = torch.nn.Linear(inner, 4, bias=bias).double()
    layer.weight.data = torch.tensor(W)
    if bias:
        layer.bias.data = torch.tensor(b)
    config = peft.MissConfig(r=rank, miss_dropout=0.5, target_modules=["q"])
    wrapped = peft.get_peft_model(torch.nn.ModuleDict({"q": layer}), config).base_model.model["q"].double()
    wrapped.miss_dropout["default"] = Masked()
    wrapped.miss_block["default"].data = torch.tensor(M)
    tx = torch.tensor(x, requires_grad=True)
    ty = wrapped.train()(tx)
    ty.backward(torch.tensor(dy))

    y, cache = miss(x, DenseWeight(W), M, mask)
    np.testing.assert_allclose(y + b if bias else y, ty.detach().numpy(), rtol=1e-11, atol=1e-11)
    dx, dM = miss_backward(dy, DenseWeight(W), M, cache)
    np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(dM, wrapped.miss_block["default"].grad.numpy(), rtol=1e-11, atol=1e-11)


def torch_logits(theirs: Any) -> np.ndarray:
    return np.asarray(theirs(torch.from_numpy(TOKENS)).logits.detach().numpy())


def our_logits(model: Any) -> np.ndarray:
    steps = np.tile(np.arange(TOKENS.shape[1]), (len(TOKENS), 1))
    return logits_of(model, Batch(TOKENS, TOKENS, steps, np.ones_like(TOKENS)))


FOLDERS: dict[str, dict[str, Any]] = {
    "PEFT's own choice of modules": {"r": 8},
    "a rank that does not divide the widths": {"r": 5, "target_modules": "all-linear"},
    "one layer": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "a pattern, with exceptions": {"r": 4, "target_modules": r".*_proj", "exclude_modules": ["k_proj"]},
    "random M and dropout": {"r": 4, "target_modules": ["o_proj"], "init_weights": False, "miss_dropout": 0.1},
    "a module that trains whole": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("options", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_peft_wrote_has_the_same_logits_here_and_written_again_there(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = with_miss(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), **options)
    for p in parameters(theirs).values():
        p.data += 0.1 * torch.randn_like(p)
    expected = torch_logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    base, _ = load_model(model)
    ours = load_adapter(base, tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert abs(expected - our_logits(base)).max() > 0.01

    method, tensors = runs.read_method(tmp_path / "theirs", base)
    write_method(tmp_path / "ours", method, tensors, base.config, str(model))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")  # PEFT would only warn of them
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 5])
def test_peft_merges_to_the_weights_that_we_merge_to(rank: int, model: Path, tmp_path: Path) -> None:
    options = {"r": rank, "target_modules": "all-linear", "init_weights": False}
    theirs = with_miss(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), **options)
    theirs.save_pretrained(tmp_path)
    base, _ = load_model(model)
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in merged_parameters(base, load_adapter(base, tmp_path)):
        np.testing.assert_allclose(weight, merged[name].numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["bat", "mini"])
def test_the_variants_of_peft_that_compute_something_else_are_refused_by_name(
    variant: str, model: Path, tmp_path: Path
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with_miss(theirs, r=4, mini_r=4, init_weights=variant, target_modules=["q_proj"]).save_pretrained(tmp_path)
    result = run("generate", "--model", model, "--adapter", tmp_path, "--prompt", "up ->")
    assert result.code != 0 and f"init_weights '{variant}'" in result.err and "Traceback" not in result.err


# --- The commands ---


def test_a_step_of_plain_descent_from_pefts_miss_is_minus_pytorchs_gradient(
    model: Path, data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = with_miss(reference, r=5, target_modules="all-linear", init_weights=False)
    reference.save_pretrained(tmp_path / "peft")
    flags = [*ONE_STEP_OF_DESCENT, "--adapter", tmp_path / "peft"]
    good("train", "--model", model, "--data", data / "train-only", "--out", tmp_path / "run", *flags)
    pytorch_loss(reference, model).backward()
    before, after = load_file(tmp_path / "peft" / ADAPTER), load_file(tmp_path / "run" / ADAPTER)
    gradients = {f"base_model.model.{name}": p.grad.numpy() for name, p in parameters(reference).items()}
    assert before.keys() == after.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(before[name] - after[name], gradient, rtol=1e-3, atol=2e-6)


def test_train_resume_evaluate_generate_and_merge_know_miss(
    train: Callable[..., Path], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--method", "miss", "--rank", 4, "--dropout", 0.1, "--num-layers", 1, "--steps", 6, "--save-every", 2)
    whole = train("train-only", *flags, "--learning-rate", 0.01, out="whole")
    saves = iter([runs.write_outcome])
    with monkeypatch.context() as patch, pytest.raises(StopIteration):  # a stand-in for SIGKILL at the second save
        patch.setattr(runs, "write_outcome", lambda *state: next(saves)(*state))
        train("train-only", *flags, "--learning-rate", 0.01, out="cut")
    good("train", "--resume", tmp_path / "cut")
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    tensors = load_file(whole / ADAPTER)
    assert tensors and all(name.endswith(".miss_block") and ".layers.1." in name for name in tensors)

    summary = json.loads((whole / "summary.json").read_text())
    assert summary["trainable_parameters"] == sum(M.size for M in tensors.values())
    good("merge", "--model", model, "--adapter", whole, "--out", tmp_path / "merged", "--dtype", "float32")
    flags = ("--data", data / "pairs.jsonl", "--json")
    adapted = json.loads(good("evaluate", "--model", model, "--adapter", whole, *flags))
    merged = json.loads(good("evaluate", "--model", tmp_path / "merged", *flags))
    assert adapted["loss"] == pytest.approx(merged["loss"], rel=1e-4)
    with_adapter = good("generate", "--model", model, "--adapter", whole, "--prompt", "up ->", "--max-tokens", 8)
    assert with_adapter == good("generate", "--model", tmp_path / "merged", "--prompt", "up ->", "--max-tokens", 8)


def test_plan_counts_the_numbers_that_miss_trains(model: Path) -> None:
    out = good("plan", "--model", model, "--method", "miss", "--rank", 5, "--json")
    method = MiSS(5)
    config = load_model(model)[0].config
    assert str(sum(r * width for r, width in method.shapes(config).values())) in out
