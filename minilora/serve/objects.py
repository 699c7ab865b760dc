"""What is answered: the JSON objects of OpenAI's interface."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from minilora.data.tokenizer import Tokenizer
from minilora.formats.library import BASE
from minilora.serve.answer import Piece, TokenChance
from minilora.serve.requests import Asked
from minilora.serve.served import Served

Object = dict[str, Any]


class Replies:
    """The objects that answer one request: one for all, or a chunk for each piece."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer) -> None:
        self.asked = asked
        self.tokenizer = tokenizer
        prefix, whole, chunk = ("chatcmpl", "chat.completion", "chat.completion.chunk") if asked.chat else ("cmpl",) * 3
        self.whole_kind, self.chunk_kind = (whole, chunk) if asked.chat else ("text_completion",) * 2
        self.head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.name}

    def whole(self, answers: Sequence[Piece], tokens: int) -> Object:
        """The answer to a request that does not stream."""
        choices = [self._choice(i, piece, "message") for i, piece in enumerate(answers)]
        return self.head | {"object": self.whole_kind, "choices": choices, "usage": self._usage(tokens)}

    def first(self, choice: int) -> Object:
        """A chat's first chunk, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, choice: int, piece: Piece) -> Object:
        return self._chunk([self._choice(choice, piece, "delta")])

    def usage(self, tokens: int) -> Object:
        """The last chunk, if the client asked for the usage."""
        return self._chunk([]) | {"usage": self._usage(tokens)}

    def _chunk(self, choices: list[Object]) -> Object:
        usage = {"usage": None} if self.asked.include_usage else {}
        return self.head | {"object": self.chunk_kind, "choices": choices} | usage

    def _usage(self, tokens: int) -> Object:
        prompt = self.asked.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _choice(self, index: int, piece: Piece, part: str) -> Object:
        text: Object = {"text": piece.text}
        if self.asked.chat:
            said: Object = {"content": piece.text}
            text = {part: {"role": "assistant", "refusal": None} | said if part == "message" else said}
        return {
            "index": index,
            **text,
            "logprobs": self._logprobs(piece.chances),
            "finish_reason": piece.finish_reason or None,
        }

    def _logprobs(self, chances: list[TokenChance]) -> Object | None:
        if self.asked.best is None:
            return None
        if self.asked.chat:
            return {
                "content": [
                    self._told(c.token, c.logprob) | {"top_logprobs": [self._told(*other) for other in c.best]}
                    for c in chances
                ],
                "refusal": None,
            }
        return {
            "tokens": [self.tokenizer.piece(c.token) for c in chances],
            "token_logprobs": [c.logprob for c in chances],
            "top_logprobs": [{self.tokenizer.piece(token): p for token, p in c.best} for c in chances],
            "text_offset": [c.start for c in chances],
        }

    def _told(self, token: int, logprob: float) -> Object:
        return {"token": self.tokenizer.piece(token), "logprob": logprob, "bytes": token_bytes(self.tokenizer, token)}


def model_object(served: Served, name: str) -> Object:
    """A model as /v1/models tells it; `parent`, `chat` and `scalable` are additions."""
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "minilora",
        "root": served.name,
        "parent": None if name == BASE else BASE,
        "chat": bool(served.tokenizer.templates),
        "scalable": name != BASE and not served.models[name].virtual_tokens,
    }


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """The bytes of a token, by which a client joins the parts of one character; None if the tokenizer hides them."""
    text = tokenizer.backend.decode([token], skip_special_tokens=False)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return list(text.encode())
    name = tokenizer.backend.id_to_token(token) or ""
    if name.startswith("<0x") and name.endswith(">"):  # SentencePiece's single bytes
        return [int(name[3:-1], 16)]
    letters = byte_letters()
    return [letters[letter] for letter in name] if set(name) <= letters.keys() else None


@cache
def byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes (GPT-2): those that can be printed stand for themselves, and the
    others, in order, for what comes after U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
