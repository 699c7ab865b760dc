"""The fixtures of this room."""

from support.adapter_folders import folder  # noqa: F401
from support.tiny_runs import adapter, data, merged, model, train  # noqa: F401
