"""Text to tokens and back, and conversations to text, exactly as a model's own folder says."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of one model folder; made by `Tokenizer.load`."""

    folder: Path
    backend: tokenizers.Tokenizer
    roles: dict[str, str]  # "eos_token" → "<|im_end|>", …: what a chat template may name
    template: str | None
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]  # any of these ends a generation
    pad_id: int  # only a filler: it may equal eos, so masks go by position and never by id
    adds_bos: bool

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a Hugging Face model folder.

        Raises FileNotFoundError without tokenizer.json, ValueError where a file cannot be understood.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found; copy it from the model's release")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file}: not a tokenizer that `tokenizers` can read ({error})") from error
        backend.no_truncation()  # a saved truncation would silently shorten every row
        backend.no_padding()

        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        roles = {role: text for role in ROLES if (text := _token_text(config.get(role)))}
        ids = {role: backend.token_to_id(text) for role, text in roles.items()}
        stops = _as_list(_read_json(folder / "generation_config.json").get("eos_token_id"))
        if ids.get("eos_token") is None:
            stops = stops or _as_list(_read_json(folder / "config.json").get("eos_token_id"))
            if stops:
                ids["eos_token"] = stops[0]
                roles["eos_token"] = backend.id_to_token(stops[0]) or ""
        bos_id, eos_id, pad_id = (ids.get(role) for role in ("bos_token", "eos_token", "pad_token"))

        adds_bos = config.get("add_bos_token")
        if adds_bos is None:  # then the post-processor in tokenizer.json decides: ask it
            adds_bos = backend.encode("").ids[:1] == [bos_id]
        return cls(
            folder=folder,
            backend=backend,
            roles=roles,
            template=_read_template(folder, config),
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=frozenset(stops) | ({eos_id} if eos_id is not None else set()),
            pad_id=next((i for i in (pad_id, eos_id) if i is not None), 0),
            adds_bos=bos_id is not None and bool(adds_bos),
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts that are read as one special token wherever they stand."""
        return tuple(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, nothing added; special tokens written out in it are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """`ids` as the model expects a text to begin: BOS first if this tokenizer adds one, never two."""
        if self.adds_bos and self.bos_id is not None and list(ids[:1]) != [self.bos_id]:
            return [self.bos_id, *ids]
        return list(ids)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as the model's chat template writes it; ValueError without one or on refusal."""
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.roles,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.folder}: the chat template refuses the messages: {error}") from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if self.template is None:
            raise ValueError(
                f"{self.folder} has no chat template (chat_template.jinja or in tokenizer_config.json); "
                "take the model's instruct version, or use rows of text or of prompt and completion"
            )
        # The same environment as transformers': templates come from the internet, hence the sandbox.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.template)


def save_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, those that `source` has, so that `target` is a folder to load from."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words in some templates: render them."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; Jinja's own filter would escape < > & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); the download may be incomplete") from error
    if type(content) is not dict:
        raise ValueError(f"{file}: must hold a JSON object, not a {type(content).__name__}")
    return content


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The file wins over the configuration's entry: one template, or several of which "default" is meant."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = {one["name"]: one["template"] for one in entry}.get("default")
    return entry


def _token_text(token: Any) -> str | None:
    """A special token's text, written as a string or as {"content": …}."""
    return token.get("content") if isinstance(token, dict) else token


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
