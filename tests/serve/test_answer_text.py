"""The text of an answer in pieces: whole characters, stop strings across tokens, probabilities beside their tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_tokenizer import write_tokenizer

from minilora.data.tokenizer import Tokenizer
from minilora.serve.answer import Answer, Ends, Piece, chance
from minilora.serve.objects import token_bytes

END = 5000  # a token that ends an answer
LOGITS = np.random.default_rng(0).normal(size=320).astype(np.float32)
texts = st.text(st.sampled_from("ab é🦜 \n"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def pieces(tokenizer: Tokenizer, tokens: list[int], limit: int = 1000, *stops: str) -> list[Piece]:
    """What comes of these tokens, and then the end."""
    answer = Answer(tokenizer, Ends(limit, frozenset([END]), stops), best=2)
    told = []
    for token in [*tokens, END]:
        told.append(answer.add(token, LOGITS))
        if told[-1].finish_reason:
            break
    return told


@given(text=texts, stops=st.lists(texts.map(lambda text: text[:3]), max_size=3))
def test_the_pieces_are_the_text_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    found = pieces(tokenizer, tokenizer.encode(text), 1000, *stops)
    end = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert "".join(piece.text for piece in found) == text[:end]
    assert [piece.finish_reason for piece in found] == [""] * (len(found) - 1) + ["stop"]


@given(text=texts, stop=texts)
def test_nothing_is_held_back_that_no_stop_string_can_begin_with(tokenizer: Tokenizer, text: str, stop: str) -> None:
    shown = ""
    for piece in pieces(tokenizer, tokenizer.encode(text), 1000, stop)[:-1]:
        shown += piece.text
        rest = text[len(shown) :]
        assert rest == "" or stop not in shown
    held = text[len(shown) :]
    assert stop in text or stop.startswith(held)


@given(text=texts, stops=st.lists(texts.map(lambda text: text[:3]), max_size=2))
def test_each_token_of_the_text_is_told_once_and_not_before_its_text(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    tokens = tokenizer.encode(text)
    found = pieces(tokenizer, tokens, 1000, *stops)
    chances = [c for piece in found for c in piece.chances]
    assert [c.token for c in chances] == tokens[: len(chances)]
    sent = 0
    for piece in found:
        sent += len(piece.text)
        assert all(c.start < sent for c in piece.chances) or piece.finish_reason
    assert not stops or all(c.start < max(1, sent) for c in chances)
    if not any(stop in text for stop in stops):
        assert len(chances) == len(tokens)
        joined = bytes(byte for c in chances for byte in token_bytes(tokenizer, c.token) or [])
        assert joined.decode() == text, "the bytes of the tokens are the text"


def test_a_stop_string_ends_the_answer_in_the_middle_of_a_token_and_across_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("I am well, thank you.")
    shown = [tokenizer.decode([token]) for token in tokens]
    assert any("nk" in token for token in shown) and not any("l, t" in token for token in shown)
    for stop, expected in (("nk", "I am well, tha"), ("l, t", "I am wel"), (("zzz", "you", "well"), "I am ")):
        found = pieces(tokenizer, tokens, 1000, *([stop] if isinstance(stop, str) else stop))
        assert "".join(piece.text for piece in found) == expected


def test_an_answer_ends_at_its_length_with_what_was_held_back(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🦜")
    assert len(tokens) == 4
    found = pieces(tokenizer, tokens, 3, "�x")
    assert [piece.text for piece in found[:2]] == ["", ""] and found[2].text and found[2].finish_reason == "length"
    assert len(found[2].chances) == 3
    assert [piece.text for piece in pieces(tokenizer, tokens, 1000)] == ["", "", "", "🦜", ""]
    ab = pieces(tokenizer, tokenizer.encode("ab"), 2, "bc")
    assert "".join(piece.text for piece in ab) == "ab"


def test_the_probabilities_are_those_of_the_softmax_the_best_first() -> None:
    told = chance(7, LOGITS, 3, 0)
    p = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()
    assert told.logprob == pytest.approx(np.log(p[7]))
    assert [token for token, _ in told.best] == np.argsort(-p)[:3].tolist()
    assert [logprob for _, logprob in told.best] == pytest.approx(np.log(np.sort(p)[::-1][:3]).tolist())
    assert chance(7, LOGITS, 0, 0).best == []


def test_every_token_has_its_bytes_though_it_is_only_a_part_of_a_character(
    tokenizer: Tokenizer,
) -> None:
    for text in ("🦜", "é", "\u0000", "naïve"):
        joined = bytes(byte for token in tokenizer.encode(text) for byte in token_bytes(tokenizer, token) or [])
        assert joined.decode() == text
    assert all(token_bytes(tokenizer, token) is not None for token in range(tokenizer.vocab_size))
