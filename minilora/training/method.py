"""The method that the settings ask for."""

from __future__ import annotations

from minilora.methods import Method
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.training.settings import Settings


def make_method(settings: Settings) -> Method:
    """`--method` and the flags that go with it, as the method itself. ValueError where they make no sense together."""
    match settings.method:
        case "lora":
            return LoRA(settings.rank, settings.alpha, settings.dropout, settings.target_modules, settings.init)
        case "full":
            return Full()
    raise ValueError(f"--method {settings.method!r} is unknown")
