"""How much longer a tokenizer can make a text, told from its steps before it reads any.

Forty steps in tokenizer.json that each double a text make 2⁴⁰ characters of one. A step of growth g makes at most
g (n + 1) − 1 characters of n, so the growth of a chain is at most the product of those of its steps. Known models stay
below the bound: the most have ALBERT and XLNet, 2,592 (NFKD, lower case, a table of compatible characters, spaces put
together, and a sign before each word).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

MOST_GROWTH = 4096
CHAINS = (("normalizer", "pre_tokenizer"), ("post_processor",), ("decoder",))
CHILDREN = ("normalizers", "pretokenizers", "processors", "decoders")  # of a step of the type Sequence
LARGEST = {  # characters that come of one; for the normal forms by Unicode's Annex 15, section 9
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2},
    "BertNormalizer": 3 * 4 * 2,  # spaces around, NFD, lower case
    "ByteLevel": 4 + 1,  # UTF-8's bytes, and a space before
    "Metaspace": 2,
}


def check_growth(folder: Path, backend: tokenizers.Tokenizer) -> None:
    """ValueError, naming the file and the key, if the steps of a chain can make more of a text than MOST_GROWTH."""
    for chain in CHAINS:
        growth = 1.0
        for key in chain:
            part = getattr(backend, key)
            growth *= math.prod(map(growth_of, steps(json.loads(part.__getstate__())))) if part else 1
            if growth > MOST_GROWTH:
                raise ValueError(
                    f"{folder}, tokenizer.json: the steps of {key} can make a text {growth:,.0f} times as long, and "
                    f"those of known models at most {MOST_GROWTH:,} times: take the file of the model's own release"
                )


def steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a part of tokenizer.json, those within a Sequence one by one."""
    inner = next((part[name] for name in CHILDREN if name in part), None)
    if inner is None:
        yield part
    else:
        for step in inner:
            yield from steps(step)


def growth_of(step: dict[str, Any]) -> float:
    """The most characters, or in the post-processor tokens, that a step makes of one; at least 1."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": new} if old:
            return max(1.0, len(new) / len(old))
        case {"type": "Replace", "content": new} | {"type": "Prepend", "prepend": new}:
            return 1 + len(new)  # an expression may find nothing, between any two characters
        case {"type": "Precompiled", "precompiled_charsmap": table}:
            return longest_in(base64.b64decode(table))
        case {"type": "BPEDecoder", "suffix": ""} | {"type": "CTC", "word_delimiter_token": ""}:
            return 2  # a space between any two characters
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(known)}:
            names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
            return len(pieces) - len(names) + sum(len(known[name]["ids"]) for name in names)
    return LARGEST.get(step["type"], 1)


def longest_in(table: bytes) -> int:
    """The longest text in a table of SentencePiece: a trie, after its size in 4 bytes, and texts that end with a 0."""
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))
