"""LoRA's variants and PEFT's: the same starts, the same parts of a weight, the same logits, the same optimiser."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from support.commands import CONFIG
from support.models import logits_of, trained
from support.strategies import normal

from minilora.data.batches import Batch
from minilora.formats.adapters import load_adapter, write_method
from minilora.formats.checkpoint import random_weights as checkpoint_weights
from minilora.formats.checkpoint import write_checkpoint
from minilora.formats.load import load_model
from minilora.frozen.weight import DenseWeight
from minilora.lora import init_kaiming, init_orthogonal
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.pissa import residual
from minilora.model.config import Config
from minilora.training.optimizers import AdamW


@pytest.mark.parametrize("inner", [1, 7, 576])
def test_the_bound_of_kaiming_is_the_one_of_peft(inner: int) -> None:
    nn = pytest.importorskip("torch.nn")
    peft_A = nn.init.kaiming_uniform_(nn.Linear(inner, 20_000, bias=False).weight, a=math.sqrt(5))  # as PEFT calls it
    A, _ = init_kaiming(20_000, (1, inner), np.random.default_rng(0))
    assert np.abs(A).max() == pytest.approx(peft_A.abs().max().item(), rel=1e-3)


def test_orthogonal_A_and_B_have_the_spread_of_pefts() -> None:
    """Each entry has the variance ½/10² on average."""
    A, B = init_orthogonal(8, (400, 500), np.random.default_rng(0))
    assert A.dtype == B.dtype == np.float32
    for ours in (A, B):
        assert np.square(ours).mean() == pytest.approx(0.005, rel=0.1)
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = peft.LoraConfig(r=8, init_lora_weights="orthogonal", target_modules=["q"])
    layers = torch.nn.ModuleDict({"q": torch.nn.Linear(500, 400)})
    theirs = peft.get_peft_model(layers, options).base_model.model["q"]
    for matrix in (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight):
        assert np.square(matrix.detach().numpy()).mean() == pytest.approx(0.005, rel=0.1)


def test_peft_cuts_a_weight_in_the_same_two_parts() -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    layer = torch.nn.Linear(9, 7, bias=False)
    W = layer.weight.detach().numpy().copy()
    options = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["q"])
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"q": layer}), options).base_model.model["q"]
    A, B = (matrix["default"].weight.detach().numpy() for matrix in (theirs.lora_A, theirs.lora_B))
    ours = residual(DenseWeight(W), 3, 2.0)
    np.testing.assert_allclose(ours.dense(), theirs.base_layer.weight.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(ours.B @ ours.A, B @ A, atol=1e-6)
    np.testing.assert_allclose(np.abs(ours.A), np.abs(A), atol=1e-5)  # each pair of vectors up to its sign


TOKENS = np.array([[1, 5, 2, 7, 3], [4, 4, 9, 0, 6]])
ROWS = Batch(TOKENS, np.roll(TOKENS, -1, axis=1), np.tile(np.arange(5), (2, 1)), np.ones_like(TOKENS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, CONFIG, checkpoint_weights(Config.from_dict(CONFIG), seed=0, std=0.3))
    return folder


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_from_pissa_has_the_same_logits_in_peft(
    checkpoint: Path, tmp_path: Path, dora: bool, rslora: bool
) -> None:
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    base, _ = load_model(checkpoint, "float32")
    kind = DoRA if dora else LoRA
    method = kind(2, init="pissa", target_modules=("q_proj", "up_proj"), rslora=rslora)
    start = method.start(base, np.random.default_rng(0))
    trainable = {name: p.astype(np.float32) for name, p in trained(start, 1).items()}
    adapted = method.attach(base, trainable)
    expected = logits_of(adapted, ROWS)
    assert abs(expected - logits_of(base, ROWS)).max() > 0.1

    plain, tensors = method.saved_form(adapted, trainable)
    write_method(tmp_path / "ours", plain, tensors, base.config, str(checkpoint))
    ours = logits_of(load_adapter(base, tmp_path / "ours"), ROWS)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()(torch.from_numpy(TOKENS))
    np.testing.assert_allclose(theirs.logits.detach().numpy(), ours, rtol=1e-3, atol=1e-3)


def test_an_adapter_from_pefts_pissa_has_the_same_logits_here(checkpoint: Path, tmp_path: Path) -> None:
    """PEFT writes it as a change of W when asked to; what it writes otherwise fits no base that a file holds."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    options = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    wrapped = peft.get_peft_model(model, options).eval()
    wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, before the first save
    wrapped.save_pretrained(tmp_path / "start")
    torch.manual_seed(0)
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    theirs = wrapped(torch.from_numpy(TOKENS)).logits.detach().numpy()
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    wrapped.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    base, _ = load_model(checkpoint, "float32")
    ours = logits_of(load_adapter(base, tmp_path / "end"), ROWS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert abs(ours - logits_of(base, ROWS)).max() > 0.1


def test_loraplus_walks_where_pefts_optimizer_walks() -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    layers = torch.nn.ModuleDict({"q": torch.nn.Linear(5, 4, bias=False)}).double()
    wrapped = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=["q"])).double()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    ours = {name: p.detach().numpy().copy() for name, p in theirs.items()}
    options = {"lr": 0.01, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}
    peer = optimizers.create_loraplus_optimizer(wrapped, torch.optim.AdamW, **options)
    optimizer = AdamW(ours, 0.1, LoRA(loraplus_lr_ratio=16.0).rate_factors(ours))
    for step in range(5):
        gradients = {name: normal(step, *p.shape) for name, p in ours.items()}
        for name, p in theirs.items():
            p.grad = torch.tensor(gradients[name])
        peer.step()
        optimizer.update(ours, gradients, 0.01)
    for name, p in theirs.items():
        np.testing.assert_allclose(ours[name], p.detach().numpy(), rtol=1e-10, err_msg=name)
