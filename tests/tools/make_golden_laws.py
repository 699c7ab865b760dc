"""Write tests/golden/laws/: one law a file, as PEFT, PyTorch, transformers and bitsandbytes compute it.

    pip install -e ".[test,peers]" bitsandbytes && python tests/tools/make_golden_laws.py

A file that is there stays as it is: it is the outside world's word, so a test that fails is no reason to write it
again. Inputs are random, and nothing that minilora computes goes into a file. What each tensor is: golden/README.md.
bitsandbytes is in no extra of minilora.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bitsandbytes import functional as bitsandbytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.golden import LAWS
from support.peers import float64_throughout, peft, torch, transformers
from tools.golden_json import twin

from minilora.formats.files import write_safetensors, write_text

functional, llama = torch.nn.functional, transformers.models.llama.modeling_llama
Arrays = dict[str, np.ndarray]
PACKAGES = ("numpy", "torch", "transformers", "peft", "bitsandbytes")


def normal(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng([seed, 60])
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def leaf(array: np.ndarray) -> Any:
    return torch.tensor(array, requires_grad=True)


def array(tensor: Any) -> np.ndarray:
    return np.array(tensor.detach().numpy())


# --- LoRA and DoRA ---


class Masked(torch.nn.Module):  # type: ignore[misc]
    """Stands in the place of PEFT's dropout, which draws its mask itself."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x: Any) -> Any:
        return x * self.mask


def peft_layer(case: Arrays, **options: Any) -> Any:
    """A linear map with the weight W, through PEFT, which has the A and B of the case beside it."""
    linear = torch.nn.Linear(case["W"].shape[1], case["W"].shape[0], bias=False, dtype=torch.float64)
    linear.weight.data = torch.tensor(case["W"])
    config = peft.LoraConfig(r=len(case["A"]), lora_alpha=float(case["alpha"]), target_modules=["map"], **options)
    layer = peft.get_peft_model(torch.nn.ModuleDict({"map": linear}), config).base_model.model["map"].double()
    layer.lora_A["default"].weight.data = torch.tensor(case["A"])
    layer.lora_B["default"].weight.data = torch.tensor(case["B"])
    if "m" in case:
        layer.lora_magnitude_vector["default"].weight.data = torch.tensor(case["m"])
    if "mask" in case:
        layer.lora_dropout["default"] = Masked(case["mask"])
    return layer


def adapted_linear(seed: int, p: float = 0.0, **options: Any) -> Arrays:
    """LoRA or DoRA beside a linear map, both ways, and merged."""
    case = normal(seed, x=(5, 6), W=(4, 6), A=(3, 6), B=(4, 3), dy=(5, 4)) | {"alpha": np.array(2.0)}
    if options.get("use_dora"):
        case["m"] = np.random.default_rng([seed, 61]).uniform(0.5, 2, 4)
    if p:
        torch.manual_seed(seed)
        case |= {"p": np.array(p), "mask": array(functional.dropout(torch.ones(5, 6, dtype=torch.float64), p))}
    layer, x = peft_layer(case, lora_dropout=p, **options), leaf(case["x"])
    y = layer(x)
    y.backward(torch.tensor(case["dy"]))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    case |= {"s": np.array(layer.scaling["default"]), "y": array(y)}
    case |= {"dx": array(x.grad), "dA": array(A.grad), "dB": array(B.grad)}
    if "m" in case:
        case["dm"] = array(layer.lora_magnitude_vector["default"].weight.grad)
    layer.merge()
    return case | {"merged": array(layer.get_base_layer().weight)}


def merge_bf16() -> Arrays:
    """W in bfloat16, A and B in float32. PEFT's merge rounds W + ΔW once, its safe merge ΔW too."""
    case = {name: a.astype(np.float32) for name, a in normal(6, W=(8, 12), A=(3, 12), B=(8, 3)).items()}
    case["B"] *= np.float32(0.05)
    case["alpha"] = np.array(2.0)
    found = {}
    for name, safely in (("merged", False), ("merged_safely", True)):
        layer = peft_layer(case).float()
        base = layer.get_base_layer()
        base.to(torch.bfloat16)
        before = array(base.weight.view(torch.uint16))
        layer.merge(safe_merge=safely)
        found[name] = array(base.weight.view(torch.uint16))
    return {**case, "W": before, **found}


# --- A weight in 4 bits ---


def nf4(double: bool) -> Arrays:
    """350 weights: five blocks of 64, and one of 30."""
    W = normal(13 if double else 7, W=(7, 50))["W"].astype(np.float32)
    codes, state = bitsandbytes.quantize_4bit(
        torch.tensor(W), blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    case = {"W": W, "table": array(state.code), "codes": array(codes)[:, 0], "absmax": array(state.absmax)}
    if double:
        case["absmax_codes"] = case.pop("absmax")
        published = bitsandbytes.create_dynamic_map()  # type: ignore[no-untyped-call]
        assert case["absmax_codes"].all()  # on the CPU, bitsandbytes takes -1 for the first value of its table
        case |= {"absmax_table": array(published), "absmax_mean": array(state.offset)}
        case["absmax_scales"] = array(state.state2.absmax)
    return case | {"dequantized": array(bitsandbytes.dequantize_4bit(codes, state))}


# --- Loss, accumulation, optimizer ---


def masked_cross_entropy() -> Arrays:
    logits, labels = leaf(3 * normal(8, logits=(6, 7))["logits"]), np.array([3, -100, 0, 6, -100, 2])
    total = functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
    mean = functional.cross_entropy(logits, torch.tensor(labels))
    mean.backward()
    case = {"logits": array(logits), "labels": labels, "sum": array(total), "mean": array(mean)}
    return case | {"dlogits": array(logits.grad)}


def accumulation() -> Arrays:
    """A language model without layers, whose head has an adapter; micro-batches with five labels and with one."""
    case = normal(9, E=(7, 4), gain=(4,), W=(7, 4), A=(2, 4), B=(7, 2))
    case |= {"eps": np.array(1e-5), "alpha": np.array(3.0)}
    case["tokens"] = np.array([[1, 5, 2, 0, 6, 3], [4, 4, 1, 6, 2, 0]])
    case["labels"] = np.array([[5, 2, 0, 6, 3, -100], [-100, -100, -100, 2, -100, -100]])

    def losses(reduction: str) -> tuple[Any, list[Any]]:
        head = peft_layer(case)
        normed = functional.rms_norm(
            torch.tensor(case["E"])[torch.tensor(case["tokens"])], (4,), torch.tensor(case["gain"]), 1e-5
        )
        labels = torch.tensor(case["labels"])
        return head, [functional.cross_entropy(head(normed[j]), labels[j], reduction=reduction) for j in (0, 1)]

    def gradients(head: Any, loss: Any) -> tuple[np.ndarray, np.ndarray]:
        loss.backward()
        return array(head.lora_A["default"].weight.grad), array(head.lora_B["default"].weight.grad)

    head, sums = losses("sum")
    count = int((case["labels"] != -100).sum())
    loss = (sums[0] + sums[1]) / count
    dA, dB = gradients(head, loss)
    case |= {"sums": np.array([float(s.detach()) for s in sums]), "loss": array(loss), "dA": dA, "dB": dB}
    head, means = losses("mean")
    wrong = (means[0] + means[1]) / 2
    dA, dB = gradients(head, wrong)
    return case | {"wrong.loss": array(wrong), "wrong.dA": dA, "wrong.dB": dB}


def adamw() -> Arrays:
    """Three steps: a matrix that decays, and a vector that does not."""
    case = normal(10, W=(3, 4), b=(5,), dW=(3, 3, 4), db=(3, 5))
    case |= {"learning_rates": np.array([0.1, 0.05, 0.02]), "beta1": np.array(0.9), "beta2": np.array(0.999)}
    case |= {"eps": np.array(1e-8), "weight_decay": np.array(0.1)}
    W, b = leaf(case["W"]), leaf(case["b"])
    groups = [{"params": [W], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    after: dict[str, list[np.ndarray]] = {"W": [], "b": []}
    for step, rate in enumerate(case["learning_rates"]):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        W.grad, b.grad = torch.tensor(case["dW"][step]), torch.tensor(case["db"][step])
        optimizer.step()
        after["W"].append(array(W))
        after["b"].append(array(b))
    case |= {f"{name}_after": np.stack(steps) for name, steps in after.items()}
    for name, p in (("W", W), ("b", b)):
        state = optimizer.state[p]
        case |= {f"{name}_m": array(state["exp_avg"]), f"{name}_v": array(state["exp_avg_sq"])}
    return case


# --- Positions and segments ---

ORIGINAL = {"original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": True, **ORIGINAL},
}


def rope(kind: str) -> Arrays:
    case = normal(11, x=(2, 4, 2, 8), dy=(2, 4, 2, 8)) | {"positions": np.array([[0, 1, 2, 3], [5, 6, 40, 200]])}
    case |= {"theta": np.array(100.0)} | {name: np.array(float(value)) for name, value in ROPES[kind].items()}
    with float64_throughout():
        config = transformers.LlamaConfig(
            hidden_size=16,
            num_attention_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            rope_theta=100.0,
            rope_scaling={"rope_type": kind, **ROPES[kind]},
        )
        embedding, x = llama.LlamaRotaryEmbedding(config), leaf(case["x"])
        cos, sin = embedding(x, torch.tensor(case["positions"]))
        y, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
        y.backward(torch.tensor(case["dy"]))
    case |= {"frequencies": array(embedding.inv_freq), "amplitude": np.array(float(embedding.attention_scaling))}
    return case | {"cos": array(cos), "sin": array(sin), "y": array(y), "dx": array(x.grad)}


def packing() -> Arrays:
    """Three and four tokens in one row; PyTorch computes the two apart."""
    case = normal(12, q=(1, 7, 4, 4), k=(1, 7, 2, 4), v=(1, 7, 2, 4), dy=(1, 7, 4, 4))
    case |= {"segments": np.array([[1, 1, 1, 2, 2, 2, 2]]), "positions": np.array([[0, 1, 2, 0, 1, 2, 3]])}
    qkv, ys = [leaf(case[name]) for name in "qkv"], []
    for segment in (1, 2):
        here = np.flatnonzero(case["segments"][0] == segment)
        q, k, v = (a[:, here].transpose(1, 2) for a in qkv)
        ys.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2))
    y = torch.cat(ys, dim=1)
    y.backward(torch.tensor(case["dy"]))
    return case | {"y": array(y)} | {f"d{name}": array(a.grad) for name, a in zip("qkv", qkv, strict=True)}


MAKERS: dict[str, Callable[[], Arrays]] = {
    "lora_linear": lambda: adapted_linear(1),
    "lora_linear_dropout": lambda: adapted_linear(2, 0.25),
    "lora_linear_rslora": lambda: adapted_linear(3, use_rslora=True),
    "dora_linear": lambda: adapted_linear(4, use_dora=True),
    "dora_linear_dropout": lambda: adapted_linear(5, 0.25, use_dora=True),
    "merge_bf16": merge_bf16,
    "nf4": lambda: nf4(double=False),
    "nf4_double": lambda: nf4(double=True),
    "cross_entropy": masked_cross_entropy,
    "accumulation": accumulation,
    "adamw": adamw,
    **{f"rope_{kind}": lambda kind=kind: rope(kind) for kind in ROPES},  # type: ignore[misc]
    "packing": packing,
}


if __name__ == "__main__":
    made_by = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    for name, make in MAKERS.items():
        path = LAWS / f"{name}.safetensors"
        if not path.exists():
            write_safetensors(path, make(), {"made_by": made_by})
            write_text(path.with_suffix(".json"), twin(path))
            print(path)
