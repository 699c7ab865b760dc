"""Text to tokens and back, and conversations to text, exactly as a model's own folder says."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from minilora.data.chat_template import read_templates
from minilora.data.template_process import rendered
from minilora.data.tokenizer_growth import check_growth
from minilora.data.tokenizer_keys import GenerationKeys, SpecialTokens, TokenizerKeys, token_ids, token_text
from minilora.formats.files import copy_file, read_json, write_json
from minilora.formats.gguf_file import is_gguf
from minilora.formats.gguf_tokenizer import tokenizer_files
from minilora.keys import checked

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
    templates: dict[str, str]
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]  # any of these ends a generation
    pad_id: int  # only a filler: it may equal eos, so masks go by position and never by id
    prefix: list[int]  # what every text begins with: BOS, or nothing
    remarks: list[str]  # for people: where the files of the folder contradict each other
    now: datetime  # what a chat template is told that asks for the time

    @classmethod
    def load(cls, folder: Path, now: datetime | None = None) -> "Tokenizer":
        """Read a Hugging Face model folder, or a GGUF file.

        Whether BOS is added is decided by the post-processor in tokenizer.json, as in transformers 5. `now` is the time
        of loading where it is not given. Raises FileNotFoundError without tokenizer.json, ValueError where a file
        cannot be understood.
        """
        folder = Path(folder)
        read, backend = _reader(folder)
        check_growth(folder, backend)
        backend.no_truncation()  # a saved truncation would silently shorten every row
        backend.no_padding()

        config = read("special_tokens_map.json", SpecialTokens) | read("tokenizer_config.json", TokenizerKeys)
        roles = {role: text for role in ROLES if (text := token_text(config.get(role)))}
        ids = {role: backend.token_to_id(text) for role, text in roles.items()}
        stops = token_ids(read("generation_config.json", GenerationKeys))
        if ids.get("eos_token") is None:
            stops = stops or token_ids(read("config.json", GenerationKeys))
            if stops:
                ids["eos_token"] = stops[0]
                roles["eos_token"] = backend.id_to_token(stops[0]) or ""
        bos_id, eos_id, pad_id = (ids.get(role) for role in ("bos_token", "eos_token", "pad_token"))

        with _tokenizing(folder):
            prefix = _prefix(backend)
        remarks = []
        if config.get("add_bos_token") not in (None, bool(prefix)):
            remarks.append(
                f"{folder}: tokenizer_config.json says add_bos_token {str(config['add_bos_token']).lower()}, the "
                f"post-processor in tokenizer.json adds {'it' if prefix else 'none'}; that decides, as in transformers"
            )
        return cls(
            folder=folder,
            backend=backend,
            roles=roles,
            templates=read_templates(folder, config),
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=frozenset(stops) | ({eos_id} if eos_id is not None else set()),
            pad_id=next((i for i in (pad_id, eos_id) if i is not None), 0),
            prefix=prefix,
            remarks=remarks,
            now=now or datetime.now(),
        )

    def fitting(self, vocab_size: int) -> "Tokenizer":
        """This tokenizer, if the model's vocabulary has all tokens that it may ask for. ValueError, naming the file."""
        text, largest = max(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda token: token[1])
        asked = [(f"tokenizer.json: {text!r}", largest)]
        asked += [("tokenizer.json: what it puts before a text", id) for id in self.prefix]
        asked += [("generation_config.json or config.json: eos_token_id", id) for id in self.stop_ids]
        for place, id in asked:
            if id >= vocab_size:
                raise ValueError(
                    f"{self.folder}, {place} is token {id}, and the model has tokens 0 to {vocab_size - 1} only "
                    "(vocab_size): take the tokenizer's files from this model's own release"
                )
        return self

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts that are read as one special token wherever they stand."""
        return tuple(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)

    @property
    def stop_texts(self) -> list[str]:
        """The tokens that end a generation, written out."""
        return [text for id in sorted(self.stop_ids) if (text := self.backend.id_to_token(id))]

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, nothing added; special tokens written out in it are recognised."""
        check_text(text)
        with _tokenizing(self.folder):
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, as `encode` gives them, on all cores."""
        for text in texts:
            check_text(text)
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        with _tokenizing(self.folder):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """One token to look at, special or not; a token that is no whole character is shown by its name."""
        text = self.backend.decode([token], skip_special_tokens=False)
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else self.backend.id_to_token(token) or "?"

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """`ids` as the model expects a text to begin: BOS first if this tokenizer adds one, never two."""
        if list(ids[: len(self.prefix)]) == self.prefix:
            return list(ids)
        return [*self.prefix, *ids]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model's chat template writes it, and as `apply_chat_template` of transformers does.

        The text is complete: no BOS is to be added. `tools` are JSON schemas; `variables` are what else the template
        asks for, as SmolLM3's does for `enable_thinking`. Raises ValueError without a template or on its refusal.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ValueError(
                f"{self.folder} has no chat template (chat_template.jinja or in tokenizer_config.json); "
                "take the model's instruct version, or use rows of text or of prompt and completion"
            )
        given = {
            "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return rendered(self.templates[name], self.now, self.roles | variables | given)
        except ValueError as error:
            raise ValueError(f"{self.folder}: the chat template refuses the messages: {error}") from error


def save_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, those that `source` has, so that `target` is a folder to load from."""
    target.mkdir(parents=True, exist_ok=True)
    if is_gguf(source):
        for name, value in tokenizer_files(source).items():
            write_json(target / name, value)
        return
    for path in tokenizer_files_to_copy(source):
        if source.resolve() != target.resolve():
            copy_file(path, target / path.name)


def tokenizer_files_to_copy(source: Path) -> list[Path]:
    """The files that are copied beside weights. ValueError, naming it, if one is a link out of the model's folder.

    A folder from elsewhere may link to any file of the user's, and what is written is often given away. The cache of
    the Hugging Face Hub links the files of `snapshots/COMMIT` to `blobs`, and these are the model's own.
    """
    home = source.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    paths = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in paths:
        if not any(path.resolve().is_relative_to(place) for place in homes):
            raise ValueError(
                f"{path} is a link out of the model's folder, to {path.resolve()}: put a copy in its place"
            )
    return paths


def _reader(folder: Path) -> tuple[Callable[[str, type], dict[str, Any]], tokenizers.Tokenizer]:
    """What reads a JSON file of the folder, {} if it is not there, and the tokenizer of tokenizer.json."""
    if is_gguf(folder):
        files = tokenizer_files(folder)
        with _tokenizing(folder):
            backend = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
        return (lambda name, keys: checked(f"{folder}, {name}", files.get(name, {}), keys)), backend
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; copy it from the model's release")
    with _tokenizing(folder):
        backend = tokenizers.Tokenizer.from_file(str(file))
    return (lambda name, keys: read_json(folder / name, keys) if (folder / name).is_file() else {}), backend


@contextmanager
def _tokenizing(folder: Path) -> Iterator[None]:
    """Whatever the library raises as a ValueError, its panics too, as when a regular expression tries for too long."""
    try:
        yield
    except BaseException as error:  # it raises nothing narrower than Exception, and panics are not even that
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{folder}, tokenizer.json: `tokenizers` cannot use it ({error})") from error
        raise


def _prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The tokens that the post-processor puts before a text; asked with a text, as those after it may be the same."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])


def check_text(text: str) -> None:
    """ValueError for a text that UTF-8 cannot hold, which no tokenizer takes: it has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else None  # so Python reads a byte that is no text
        what = f"\\u{code:04x} is half of a character" if byte is None else f"byte 0x{byte:02x} is not UTF-8"
        raise ValueError(f"{what}, at place {error.start + 1} of the text {text[:40]!a}: take it out") from error
