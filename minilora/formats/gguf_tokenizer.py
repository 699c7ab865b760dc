"""The tokenizer of a GGUF file as Hugging Face's files, and the other way.

The file holds tokens, merges and special tokens whole. How a text is cut into words before it is tokenised is only a
name there (`tokenizer.ggml.pre`), which stands for a rule in llama.cpp's code: the table below has the rules that
Llama-style releases need, and every other name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from minilora.formats.gguf_file import ROLES, File, open_gguf

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens: control tokens are special, written out or not
STOPS = ("eot", "eom")  # more tokens that end an answer: of a turn, of a message

_DIGITS = {"type": "Digits", "individual_digits": True}
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = _LETTERS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST
QWEN2 = _LETTERS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST


class PreTokenizer(NamedTuple):
    """What a name in `tokenizer.ggml.pre` stands for."""

    splits: tuple[dict[str, Any], ...]  # steps before the bytes become letters
    gpt2_words: bool  # whether that last step cuts by GPT-2's pattern
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False  # a word that is a token is one, whatever the merges say
    adds_bos: bool = False  # if the file does not say


def _isolated(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = {
    "smollm": PreTokenizer((_DIGITS,), True),
    "gpt-2": PreTokenizer((), True),
    "llama-bpe": PreTokenizer((_isolated(LLAMA3),), False, ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((_isolated(QWEN2),), False, {"type": "NFC"}),
}


# --- In ---


def tokenizer_files(path: Path) -> dict[str, dict[str, Any]]:
    """The JSON files that a Hugging Face folder would have, by name. ValueError for a tokenizer that is not known."""
    file = open_gguf(path)
    kind, pre = file["tokenizer.ggml.model"], file.fields.get("tokenizer.ggml.pre", "")
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer {kind!r} is not supported, only 'gpt2', which is byte-level BPE")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{path}: pre-tokenizer {pre or 'without a name'!r} is not supported, only {known}")
    tokens: list[str] = file["tokenizer.ggml.tokens"]
    kinds: list[int] = file.fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    ids = {role: file.fields.get(f"tokenizer.ggml.{theirs}_token_id") for role, theirs in ROLES.items()}
    for name in (*ROLES.values(), *STOPS):
        id = file.fields.get(f"tokenizer.ggml.{name}_token_id", 0)
        if type(id) is not int or not 0 <= id < len(tokens):
            raise ValueError(f"{path}: tokenizer.ggml.{name}_token_id is {id!r}, and there are {len(tokens)} tokens")
    roles = {role: tokens[id] for role, id in ids.items() if id is not None}
    stops = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", *STOPS)]
    generation = {f"{role}_id": ids[role] for role in ("bos_token", "pad_token") if ids[role] is not None}
    if known_stops := list(dict.fromkeys(id for id in stops if id is not None)):
        generation["eos_token_id"] = known_stops[0] if len(known_stops) == 1 else known_stops
    bos = file.fields.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZERS[pre].adds_bos)
    eos = file.fields.get("tokenizer.ggml.add_eos_token", False)
    config = {**roles, "add_bos_token": bos, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"model_max_length": file.fields.get(f"{file['general.architecture']}.context_length")}
    config |= {"clean_up_tokenization_spaces": False} | _templates(file)
    around = [roles[role] for role, asked in (("bos_token", bos), ("eos_token", eos)) if asked and role in roles]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(id, text, kind == CONTROL)
            for id, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": PRE_TOKENIZERS[pre].normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*PRE_TOKENIZERS[pre].splits, _byte_level(PRE_TOKENIZERS[pre].gpt2_words)],
        },
        "post_processor": _post_processor(tokens, around, first=roles.get("bos_token") if bos else None),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": PRE_TOKENIZERS[pre].ignore_merges,
            "vocab": {t: id for id, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED},
            "merges": [merge.split(" ") for merge in file["tokenizer.ggml.merges"]],
        },
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "generation_config.json": generation}


def _templates(file: File) -> dict[str, Any]:
    start = "tokenizer.chat_template"
    found = {
        name.removeprefix(start).lstrip(".") or "default": text
        for name, text in file.fields.items()
        if name == start or name.startswith(f"{start}.")
    }
    if found.keys() == {"default"}:
        return {"chat_template": found["default"]}
    if not found:
        return {}
    return {"chat_template": [{"name": name, "template": text} for name, text in found.items()]}


def _added(id: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": special}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _post_processor(tokens: list[str], around: list[str], first: str | None) -> dict[str, Any] | None:
    """What puts BOS before a text, or EOS after it."""
    if not around:
        return None
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    marks = [{"SpecialToken": {"id": token, "type_id": 0}} for token in around]
    before = marks[:1] if first else []
    special = {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in around}
    single = [*before, *text, *marks[len(before) :]]
    pair = [*single, *before, {"Sequence": {"id": "B", "type_id": 1}}, *marks[len(before) :]]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


# --- Out ---


class TokenizerOfFolder(Protocol):
    """What is to be known of a loaded tokenizer (`data/tokenizer.py`) to write it."""

    @property
    def folder(self) -> Path: ...
    @property
    def roles(self) -> Mapping[str, str]: ...
    @property
    def templates(self) -> Mapping[str, str]: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def backend(self) -> Any: ...


def tokenizer_fields(tokenizer: TokenizerOfFolder, vocab_size: int) -> dict[str, Any]:
    """The fields `tokenizer.…` of a file. ValueError where llama.cpp has no words for this tokenizer."""
    backend = tokenizer.backend
    raw = json.loads(backend.to_str())
    pre = name_of_pre_tokenizer(tokenizer.folder, raw)
    words = backend.get_vocab(with_added_tokens=True)
    if len(words) and max(words.values()) >= vocab_size:
        raise ValueError(f"{tokenizer.folder}: the tokenizer has more tokens than the model, which has {vocab_size}")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, id in words.items():
        tokens[id], kinds[id] = text, NORMAL
    for added in raw["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    before, after = _put_around(backend)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]],
    }
    ids = {role: backend.token_to_id(text) for role, text in tokenizer.roles.items()}
    for role, theirs in ROLES.items():
        if ids.get(role) is not None:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = ids[role]
    for name, id in zip(STOPS, sorted(tokenizer.stop_ids - {tokenizer.eos_id}), strict=False):
        fields[f"tokenizer.ggml.{name}_token_id"] = id
    for flag, found, role in (("bos", before, "bos_token"), ("eos", after, "eos_token")):
        if found not in ([], [ids.get(role)]):
            raise ValueError(f"{tokenizer.folder}: puts {found} around a text, and GGUF only knows BOS and EOS there")
        fields[f"tokenizer.ggml.add_{flag}_token"] = bool(found)
    for name, text in tokenizer.templates.items():
        fields["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    return fields


def name_of_pre_tokenizer(folder: Path, raw: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which this tokenizer.json cuts a text into words."""
    steps = raw["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    model, normalizer = raw["model"], raw["normalizer"]
    last = steps[-1]
    if model["type"] == "BPE" and last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        for name, known in PRE_TOKENIZERS.items():
            words = (tuple(steps[:-1]), last.get("use_regex", True), bool(model.get("ignore_merges")))
            if words == (known.splits, known.gpt2_words, known.ignore_merges) and normalizer == known.normalizer:
                return name
    raise ValueError(
        f"{folder}: llama.cpp has no name for this tokenizer's way of cutting words, or minilora does not know it; "
        f"it knows {', '.join(PRE_TOKENIZERS)}"
    )


def _put_around(backend: Any) -> tuple[list[int], list[int]]:
    """The tokens put before a text and after it."""
    plain, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]
