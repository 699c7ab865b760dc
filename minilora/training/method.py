"""The method that the settings ask for."""

from __future__ import annotations

from minilora.methods import Method
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.text.tokenizer import Tokenizer
from minilora.training.settings import Settings


def make_method(settings: Settings, tokenizer: Tokenizer) -> Method:
    """`--method` and the flags that go with it, as the method itself. ValueError where they make no sense together."""
    match settings.method:
        case "lora" | "dora":
            return LoRA(
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                target_modules=settings.target_modules,
                init=settings.init,
                rslora=settings.rslora,
                dora=settings.method == "dora",
            )
        case "full":
            return Full()
        case "prefix":
            return PrefixTuning(settings.num_virtual_tokens, tuple(tokenizer.encode(settings.init_text)))
        case "prompt":
            return PromptTuning(settings.num_virtual_tokens, tuple(tokenizer.encode(settings.init_text)))
    raise ValueError(f"--method {settings.method!r} is unknown")
