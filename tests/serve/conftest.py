"""The fixtures of this room."""

from support.served import library  # noqa: F401
