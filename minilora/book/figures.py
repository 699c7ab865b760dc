from typing import Any


def bring_to_life(doctree: Any) -> None:
    pass
