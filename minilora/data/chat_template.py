"""Chat templates: where a release keeps them, and the Jinja in which transformers renders them."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from minilora.formats.files import read_text


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a model folder by name; the usual one is "default", one for conversations with tools "tool_use".

    chat_template.jinja wins over the entry of tokenizer_config.json, which is one template or a list of named ones.
    """
    file = folder / "chat_template.jinja"
    entry = read_text(file) if file.is_file() else config.get("chat_template")
    if isinstance(entry, list):
        return {one["name"]: one["template"] for one in entry}
    return {"default": entry} if entry else {}


def compile_template(template: str, now: datetime) -> jinja2.Template:
    """The template, ready to render. It comes from the internet, hence the sandbox.

    Beside Jinja's own there are `tojson`, `raise_exception`, `strftime_now`, `break` and `continue`, and the tag
    `generation`. `now` is what a template is told that asks for the time. Raises jinja2.TemplateError.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words in some templates: render them."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; Jinja's own filter would escape < > & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
