"""LoRA from scratch: NumPy or CuPy, no autograd, every gradient derived by hand. Start with `minilora/lora.py`.

`from minilora import load, load_adapter, complete` runs models and adapters from Python. These functions are fetched
when they are asked for, so that `import minilora.lora` loads LoRA and what it stands on, and nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.runs.front_door import complete, load, load_adapter

__all__ = ["complete", "load", "load_adapter"]

if not TYPE_CHECKING:  # a type checker would take any name for granted

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'minilora' has no attribute {name!r}")
        from minilora.runs import front_door

        return getattr(front_door, name)
