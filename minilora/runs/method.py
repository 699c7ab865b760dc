"""The method that the settings ask for."""

from __future__ import annotations

import re

from minilora.data.tokenizer import Tokenizer
from minilora.methods import Method
from minilora.methods.bitfit import BitFit
from minilora.methods.bottleneck import Bottleneck
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.methods.targets import Names
from minilora.methods.whole_modules import Modules
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD
from minilora.runs.settings import Settings


def make_method(settings: Settings, config: Config, tokenizer: Tokenizer) -> Method:
    """`--method` and the flags that go with it, as the method itself. ValueError where they make no sense together."""
    match settings.method:
        case "lora" | "dora":
            return _lora(settings, config)
        case "full":
            return Full()
        case "prefix":
            return PrefixTuning(settings.num_virtual_tokens, tuple(tokenizer.encode(settings.init_text)))
        case "prompt":
            return PromptTuning(settings.num_virtual_tokens, tuple(tokenizer.encode(settings.init_text)))
        case "bottleneck":
            return Bottleneck(settings.bottleneck_size)
        case "bitfit":
            return BitFit(settings.train_norms)
        case "head":
            return Modules((HEAD,))
        case "embedding":
            return Modules((EMBED,))
        case "random":
            return RandomSubset(settings.random_share, settings.seed)
    raise ValueError(f"--method {settings.method!r} is unknown")


def check_tied(settings: Settings, base: Config, adapted: Config) -> None:
    """ValueError where the method would part the embedding and the head of a tied model, and nobody asked for it."""
    if base.tie_word_embeddings and not (adapted.tie_word_embeddings or settings.untie or settings.adapter):
        raise ValueError(
            "embedding and head of this model are one matrix, and this method trains one of them: say --untie to make "
            "them two (merged, the model grows by that matrix), or choose other modules"
        )


def _lora(settings: Settings, config: Config) -> LoRA:
    layers, last = config.num_hidden_layers, settings.num_layers
    if last > layers:
        raise ValueError(f"--num-layers {last}: the model has {layers}")
    return LoRA(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        target_modules=_names(settings.target_modules),
        init=settings.init,
        rslora=settings.rslora,
        dora=settings.method == "dora",
        exclude_modules=_names(settings.exclude_modules),
        layers_to_transform=tuple(range(layers - last, layers)) if last else None,
        rank_pattern={name: int(value) for name, value in _pairs("rank_pattern", settings.rank_pattern)},
        alpha_pattern={name: float(value) for name, value in _pairs("alpha_pattern", settings.alpha_pattern)},
        modules_to_save=settings.modules_to_save,
    )


def _names(names: tuple[str, ...]) -> Names:
    """A single name that is none is a regular expression, as PEFT takes one."""
    if len(names) == 1 and not re.fullmatch(r"[\w.-]+", names[0]):
        return names[0]
    return names


def _pairs(name: str, entries: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = []
    for entry in entries:
        module, _, value = entry.rpartition("=")
        if not module or not re.fullmatch(r"\d+(\.\d+)?" if name == "alpha_pattern" else r"\d+", value):
            raise ValueError(f"--{name.replace('_', '-')} {entry}: write a module's name, = and a number")
        pairs.append((module, value))
    return pairs
