"""Where a release keeps its chat templates. They are rendered in a process of their own, `template_process.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from minilora.formats.files import read_text


class NamedTemplate(TypedDict):
    """One of several templates in `tokenizer_config.json`."""

    name: str
    template: str


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a model folder by name; the usual one is "default", one for conversations with tools "tool_use".

    chat_template.jinja wins over the entry of tokenizer_config.json, which is one template or a list of named ones.
    """
    file = folder / "chat_template.jinja"
    entry = read_text(file) if file.exists() else config.get("chat_template")
    if isinstance(entry, list):
        return {one["name"]: one["template"] for one in entry}
    return {"default": entry} if entry else {}
