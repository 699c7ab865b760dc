"""minilora against transformers and PEFT on adapters drawn at random, both ways: prints a table in Markdown.

    python tests/tools/peft_table.py

Each row is another small model and another adapter. "Ours → PEFT": minilora writes the adapter, PEFT loads it without
a warning and holds the very bytes. "PEFT → ours": PEFT writes it, with random numbers in it, and minilora loads it. The
two columns hold the largest difference of a logit, relative to the largest logit, in float32; "effect" is the same
for what the adapter changes. The command fails if a difference exceeds 1e-4, or if a feature occurs nowhere.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.strategies import LLAMA3, random_adapter, random_weights

from minilora.formats.adapters import load_adapter, read_method, write_method
from minilora.formats.checkpoint import write_checkpoint
from minilora.formats.load import load_model
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.targets import saved_module_names
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import EMBED, HEAD

TOLERANCE = 1e-4
VOCAB = 24
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("seven", "names", "full names", "regex", "all-linear")
EXTRAS = (
    *("rank_pattern", "alpha_pattern", "rslora", "layers: list", "layers: int", "exclude: list", "exclude: regex"),
    *("embedding", "head", "save embed_tokens", "save lm_head", "save norm", "save linear", "dora"),
)
# PEFT says this of every adapter on the embedding or head of a tied model, whoever wrote it.
TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"


class Case(NamedTuple):
    raw: dict[str, Any]  # config.json
    options: dict[str, Any]  # of PEFT's LoraConfig
    features: list[str]

    @property
    def config(self) -> Config:
        return Config.from_dict(self.raw)

    @property
    def lora(self) -> LoRA:
        """The same options in our words."""
        layers = self.options.get("layers_to_transform")
        kind = DoRA if self.options.get("use_dora", False) else LoRA
        return kind(
            rank=self.options["r"],
            alpha=self.options["lora_alpha"],
            target_modules=_names(self.options["target_modules"]),
            rslora=self.options.get("use_rslora", False),
            exclude_modules=_names(self.options.get("exclude_modules", ())),
            layers_to_transform=(layers,) if isinstance(layers, int) else layers and tuple(layers),
            rank_pattern=self.options.get("rank_pattern", {}),
            alpha_pattern=self.options.get("alpha_pattern", {}),
            modules_to_save=tuple(self.options.get("modules_to_save", ())),
        )


def _names(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)


def draw_raw(rng: random.Random) -> dict[str, Any]:
    """A `config.json` of a small model: heads, widths, RoPE, biases, tied or not."""
    key_value_heads, layers = rng.choice([1, 2]), rng.choice([2, 3, 4])
    raw = {
        "model_type": rng.choice(["llama", "smollm3"]),
        "vocab_size": VOCAB,
        "hidden_size": rng.choice([12, 24]),
        "intermediate_size": rng.choice([20, 28]),
        "num_hidden_layers": layers,
        "num_attention_heads": key_value_heads * rng.choice([1, 2, 3]),
        "num_key_value_heads": key_value_heads,
        "head_dim": rng.choice([4, 6, 8]),
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": rng.choice([1e4, 1.3e5]),
        "rope_scaling": rng.choice(
            [
                None,
                {"rope_type": "linear", "factor": 2.0},
                {"rope_type": "llama3"} | LLAMA3 | {"original_max_position_embeddings": 16},
            ]
        ),
        "tie_word_embeddings": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        # torch gives the row of a padding token no gradient; no row is special here.
        **{"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
    }
    if raw["model_type"] == "smollm3":
        raw |= {"no_rope_layers": [rng.choice([0, 1]) for _ in range(layers)]}
    return raw


def draw_case(number: int, seed: int = 0) -> Case:
    """A model and an adapter. Any 14 numbers in a row have every extra between them."""
    rng = random.Random(f"{seed}/{number}")
    while True:
        kind, wanted = KINDS[number % len(KINDS)], {EXTRAS[number % len(EXTRAS)]}
        wanted |= {extra for extra in EXTRAS if rng.random() < 0.2}
        by_pattern = {"regex": {"layers: list", "layers: int"}}
        by_pattern["all-linear"] = by_pattern["regex"] | {"embedding", "head"}
        if wanted & by_pattern.get(kind, set()):  # there, PEFT takes a list only
            kind = "seven"
        case = _case(draw_raw(rng), kind, wanted, rng)
        if case is not None:
            return case


def _case(raw: dict[str, Any], kind: str, wanted: set[str], rng: random.Random) -> Case | None:
    """None for wishes that do not go together."""
    layers = raw["num_hidden_layers"]
    adapted = {"embedding": EMBED, "head": HEAD}
    if kind == "seven":
        targets: Any = list(SEVEN)
    elif kind == "names":
        targets = rng.sample([*SEVEN, "self_attn.q_proj", "mlp.up_proj"], rng.choice([1, 2, 3]))
    elif kind == "full names":
        every = [
            f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
            for i in range(layers)
            for name in SEVEN
        ]
        targets = rng.sample(every, 4)
    elif kind == "regex":
        targets = rng.choice(
            [r".*\.(q|v|down)_proj", rf"model\.layers\.[1-{layers}]\..*_proj", r".*(self_attn|mlp)\.[ou].*"]
        )
    else:
        targets = "all-linear"
    options: dict[str, Any] = {
        "r": rng.choice([1, 2, 4]),
        "lora_alpha": rng.choice([1, 8, 12.5]),
        "task_type": "CAUSAL_LM",
    }
    for extra, module in adapted.items():
        if extra in wanted:
            targets = (
                f"{targets}|{module}"
                if isinstance(targets, str)
                else [*targets, rng.choice([module, module.split(".")[-1]])]
            )
    options["target_modules"] = targets
    # The first pattern that fits decides. In PEFT's files that is the first by the alphabet, as these are.
    if "rank_pattern" in wanted:
        options["rank_pattern"] = {"(up|v)_proj": 5, "embed_tokens|lm_head": 2, r"layers\.0\..*": 3, "o_proj": 6}
    if "alpha_pattern" in wanted:
        options["alpha_pattern"] = {
            "(down|up)_proj|lm_head": 7,
            r"^model\.layers\.\d+\.self_attn.*": 5.5,
            "layers.*": 3,
        }
    if "rslora" in wanted:
        options["use_rslora"] = True
    if "dora" in wanted:
        options["use_dora"] = True
    if wanted & {"layers: list", "layers: int"}:
        chosen = rng.sample(range(layers), 2)
        options["layers_to_transform"] = chosen if "layers: list" in wanted else chosen[0]
    if wanted & {"exclude: list", "exclude: regex"}:
        options["exclude_modules"] = (
            ["k_proj", "0.mlp.up_proj"] if "exclude: list" in wanted else r".*\.1\.(mlp|self_attn)\..*"
        )
    saved = {"embed_tokens", "lm_head", "norm", "o_proj"} & {
        extra.removeprefix("save ").replace("linear", "o_proj") for extra in wanted
    }
    if saved:
        options["modules_to_save"] = sorted(saved)
    case = Case(raw, options, [kind, *(extra for extra in EXTRAS if extra in wanted)])
    too_many = [{"layers: list", "layers: int"}, {"exclude: list", "exclude: regex"}]
    too_many += [{"embedding", "save embed_tokens"}, {"head", "save lm_head"}]
    try:
        places = case.lora.places(case.config)
    except ValueError:
        return None
    lost = {extra for extra, module in adapted.items() if extra in wanted and module not in places}
    return None if lost or not places.keys() - {EMBED, HEAD} or any(pair <= wanted for pair in too_many) else case


def base_folder(case: Case, folder: Path, seed: int) -> Path:
    """The case's model with random weights, none of them special, as a checkpoint."""
    weights = random_weights(case.config, seed)
    write_checkpoint(folder, case.raw, {name: weight.astype(np.float32) for name, weight in weights.items()})
    return folder


def peer(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 17))


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(TOKENS)).logits.numpy())


def our_logits(model: Model) -> np.ndarray:
    positions = np.tile(np.arange(TOKENS.shape[1]), (len(TOKENS), 1))
    hidden, _, _ = forward(model, TOKENS, positions, np.ones_like(TOKENS))
    return np.asarray(model.sites[HEAD].forward(hidden)[0]).reshape(*TOKENS.shape, -1)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def after_training(start: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Every number of an adapter moved a little, at random."""
    moves = random_adapter(start, seed)
    return {name: array + 0.3 * moves[name].astype(array.dtype) for name, array in start.items()}


def ours_to_peft(case: Case, folder: Path, seed: int = 0) -> tuple[float, float]:
    """(difference, effect) of an adapter that minilora wrote and PEFT loaded. AssertionError if a tensor changed."""
    base, _ = load_model(base_folder(case, folder / "base", seed))
    tensors = after_training(case.lora.start(base, np.random.default_rng(seed)), seed)
    write_method(folder / "adapter", case.lora, tensors, case.config, str(folder / "base"))
    theirs = load_without_a_warning(case, peer(folder / "base"), folder / "adapter")
    state = {
        name.removeprefix(LoRA.key_prefix): tensor.numpy()
        for name, tensor in peft.get_peft_model_state_dict(theirs).items()
    }
    state = {name: tensor for name, tensor in state.items() if ".base_layer." not in name}
    assert state.keys() == tensors.keys() and all(np.array_equal(state[name], tensors[name]) for name in state)
    ours = our_logits(load_adapter(base, folder / "adapter"))
    return difference(ours, their_logits(theirs)), difference(our_logits(base), ours)


def load_without_a_warning(case: Case, base: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between PEFT and transformers
        if case.config.tie_word_embeddings and {EMBED, HEAD} & {
            *case.lora.places(case.config),
            *saved_module_names(case.config, case.lora.modules_to_save),
        }:
            warnings.filterwarnings("ignore", TIED)
        return peft.PeftModel.from_pretrained(base, folder)


def peft_to_ours(case: Case, folder: Path, seed: int = 0) -> tuple[float, float]:
    """(difference, effect) of an adapter that PEFT wrote and minilora loaded, which it does only if nothing is left."""
    base, _ = load_model(base_folder(case, folder / "base", seed))
    theirs = made_by_peft(case, peer(folder / "base"), seed)
    theirs.save_pretrained(folder / "adapter")
    method, trainable = read_method(folder / "adapter", base)
    assert len(trainable) == sum(parameter.requires_grad for parameter in theirs.parameters())
    ours = our_logits(method.attach(base, trainable))
    return difference(ours, their_logits(theirs)), difference(our_logits(base), ours)


def made_by_peft(case: Case, base: Any, seed: int = 0) -> Any:
    """PEFT's model with the case's adapter, moved at random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**case.options)).eval()
    start = {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}
    for name, array in after_training(start, seed).items():
        model.get_parameter(name).data = torch.tensor(array)
    return model


def described(raw: dict[str, Any]) -> str:
    rope = (raw["rope_scaling"] or {"rope_type": "default"})["rope_type"]
    heads = f"{raw['num_attention_heads']}/{raw['num_key_value_heads']} heads of {raw['head_dim']}"
    words = [raw["model_type"], f"{raw['num_hidden_layers']} layers", heads, f"rope {rope}"]
    words += ["tied" if raw["tie_word_embeddings"] else "untied"]
    return ", ".join([*words, *(f"{name} biases" for name in ("attention", "mlp") if raw[f"{name}_bias"])])


def rows(count: int, seed: int = 0) -> Iterator[tuple[Case, float, float, float]]:
    """Each case, what its adapter changes, and the differences ours → PEFT and PEFT → ours."""
    for number in range(count):
        case = draw_case(number, seed)
        with tempfile.TemporaryDirectory() as folder:
            there, effect = ours_to_peft(case, Path(folder) / "there", number)
            back, _ = peft_to_ours(case, Path(folder) / "back", number)
        yield case, effect, there, back


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`")
    print("| # | model | features | effect | ours → PEFT | PEFT → ours |\n|---|---|---|---|---|---|")
    worst, missing = 0.0, {*KINDS, *EXTRAS}
    for number, (case, effect, there, back) in enumerate(rows(20), 1):
        features = ", ".join(case.features)
        print(
            f"| {number} | {described(case.raw)} | {features} | {effect:.2f} | {there:.1e} | {back:.1e} |", flush=True
        )
        worst, missing = max(worst, there, back), missing - set(case.features)
    print(f"\nlargest difference {worst:.1e}; peft {peft.__version__}, transformers {transformers.__version__}")
    if missing:
        print(f"no configuration has: {', '.join(sorted(missing))}", file=sys.stderr)
    return int(worst > TOLERANCE or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
