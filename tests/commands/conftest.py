"""The fixtures of this room."""

from support.tiny_runs import adapter, data, model, train  # noqa: F401
