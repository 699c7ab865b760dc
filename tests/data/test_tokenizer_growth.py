"""A tokenizer that could make of a short text an endless one is refused by file and key before it reads any."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import assert_refused, run
from tokenizers import Tokenizer as Backend

from minilora.data.tokenizer_growth import MOST_GROWTH, check_growth, growth_of, longest_in, steps
from minilora.formats.load import SHIPPED_MODEL

SHIPPED = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BERT = {
    "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": True,
    "lowercase": True,
}  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt")
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def prepend(text: str) -> dict[str, Any]:
    return {"type": "Prepend", "prepend": text}


def sequence(key: str, *inner: dict[str, Any]) -> dict[str, Any]:
    name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[key]
    return {"type": "Sequence", name: list(inner)}


def backend(**parts: Any) -> Backend:
    return Backend.from_str(json.dumps({**SHIPPED, "pre_tokenizer": None, "decoder": None, **parts}))


letters = st.sampled_from("ab éﷺ中😀▁İ")
words = st.text(letters, max_size=3)
normal = st.one_of(
    st.sampled_from([*({"type": name} for name in FORMS), BERT, SPACES]),
    st.builds(replace, st.text(letters, min_size=1, max_size=2), words),
    st.builds(prepend, words),
    st.builds(
        lambda pattern, new: {"type": "Replace", "pattern": {"Regex": pattern}, "content": new},
        st.sampled_from(["", "a*", ".", r"\s+", "a|$"]),
        words,
    ),
)
before = st.sampled_from([BYTES, METASPACE, METASPACE | {"replacement": "x"}, SPLIT])


@given(st.lists(normal, max_size=3), st.lists(before, max_size=3), st.text(letters, min_size=1, max_size=8))
def test_no_chain_of_steps_makes_more_of_a_text_than_it_is_said_to(
    normalizers: list[Any], pretokenizers: list[Any], text: str
) -> None:
    made = backend(
        normalizer=sequence("normalizer", *normalizers), pre_tokenizer=sequence("pre_tokenizer", *pretokenizers)
    )
    growth = math.prod(map(growth_of, [*normalizers, *pretokenizers]))
    try:
        pieces = made.pre_tokenizer.pre_tokenize_str(made.normalizer.normalize_str(text))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return  # the library cannot use this chain
    assert sum(len(piece) for piece, _ in pieces) + 1 <= growth * (len(text) + 1)


DOUBLING = {
    "Replace, by a text": ("normalizer", replace("a", "aa")),
    "Replace, where nothing is": ("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}),
    "Replace, of any character": ("normalizer", {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}),
    "Prepend": ("normalizer", prepend("a" * 1000)),
    "NFKD of what Replace has brought back": (
        "normalizer",
        sequence("normalizer", {"type": "NFKD"}, replace("ل", "ﷺ")),
    ),
    "bytes": ("pre_tokenizer", BYTES),
    "a sign before each letter": ("pre_tokenizer", sequence("pre_tokenizer", METASPACE, SPLIT)),
    "Replace, decoding": ("decoder", replace("a", "aa")),
    "a space between all letters": ("decoder", {"type": "BPEDecoder", "suffix": ""}),
    "CTC": ("decoder", {"type": "CTC", "pad_token": "b", "word_delimiter_token": "", "cleanup": True}),
}


@pytest.mark.parametrize(("key", "step"), DOUBLING.values(), ids=DOUBLING)
def test_forty_steps_that_double_a_text_are_refused_by_file_and_key(
    key: str, step: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "model"))
    within = sequence(key, *[step] * 20)
    (folder / "tokenizer.json").write_text(json.dumps(SHIPPED | {key: sequence(key, within, within)}))
    refused = run("generate", "--model", folder, "--prompt", "a", "--max-tokens", 1)
    assert_refused(refused, f"{folder}, tokenizer.json: the steps of {key} can make a text ")


def test_a_template_with_a_thousand_times_a_thousand_tokens_is_refused() -> None:
    text, special = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}
    known = {"x": {"id": "x", "ids": [5] * 1000, "tokens": ["x"] * 1000}}
    template = {"type": "TemplateProcessing", "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}]}
    made = backend(post_processor=template | {"single": [special] * 1000 + [text], "special_tokens": known})
    with pytest.raises(ValueError, match=r"folder, tokenizer\.json: the steps of post_processor .* 1,000,001 times"):
        check_growth(Path("folder"), made)


OF_MODELS: dict[str, dict[str, Any]] = {
    "Llama 2": {
        "normalizer": sequence("normalizer", prepend("▁"), replace(" ", "▁")),
        "decoder": sequence(
            "decoder",
            *(replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}),
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
    },
    "Gemma": {
        "normalizer": replace(" ", "▁"),
        "decoder": sequence("decoder", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}),
    },
    "Qwen": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence("pre_tokenizer", SPLIT, BYTES | {"add_prefix_space": False}),
        "decoder": BYTES,
    },
    "SmolLM2": {"pre_tokenizer": SHIPPED["pre_tokenizer"], "decoder": SHIPPED["decoder"]},
    "BERT": {"normalizer": BERT, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    "ALBERT, but for its table": {
        "normalizer": sequence(
            "normalizer",
            *(replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}),
            *({"type": "Lowercase"}, SPACES),
        ),
        "pre_tokenizer": METASPACE,
        "decoder": METASPACE,
    },
}


@pytest.mark.parametrize("parts", OF_MODELS.values(), ids=OF_MODELS)
def test_the_steps_of_known_models_are_taken(parts: dict[str, Any]) -> None:
    made = backend(**parts)
    check_growth(Path("folder"), made)
    of_table = 18  # the most that SentencePiece's table makes of a character
    growth = [
        growth_of(step) for key in ("normalizer", "pre_tokenizer") for step in steps(parts.get(key) or {"type": ""})
    ]
    assert math.prod(growth) * of_table <= MOST_GROWTH


def test_the_longest_text_of_a_table_is_found_behind_its_trie() -> None:
    trie, texts = b"ab\0\0cdefghij", "x\0صلى الله\0yz\0".encode()
    assert longest_in(len(trie).to_bytes(4, "little") + trie + texts) == len("صلى الله")
    assert longest_in(bytes(4)) == 1
    assert growth_of({"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhYWEA"}) == 3
