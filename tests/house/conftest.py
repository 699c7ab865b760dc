"""The fixtures of this room."""

from support.device import device  # noqa: F401
