"""Whichever way a model is asked, it is given BOS where its tokenizer adds one, and ends at any of its stop tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import CONFIG, good
from support.small_tokenizer import write_tokenizer

from minilora import complete, load
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.model import generation
from minilora.model.config import Config
from minilora.runs.evaluation import answers

BOS = 1
RAW = CONFIG | {"vocab_size": 320}
TEXTS = ["How are you?", "two plus", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that begins every text with BOS."""
    folder = tmp_path_factory.mktemp("begins")
    write_checkpoint(folder, RAW, random_weights(Config.from_dict(RAW), seed=1, std=0.3))
    return write_tokenizer(folder, "bos")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("later_first", [False, True])
def test_every_way_to_ask_begins_with_bos_and_ends_before_the_first_of_several_stop_tokens(
    folder: Path, text: str, later_first: bool
) -> None:
    model, tokenizer = load(folder, device="cpu")
    (said,) = generation.complete(model, [[BOS, *tokenizer.encode(text)]], 8, frozenset())
    (without,) = generation.complete(model, [tokenizer.encode(text)], 8, frozenset())
    new = [k for k, token in enumerate(said) if token not in said[:k]][1:]  # where a token is said for the first time
    assert said != without and len(new) >= 2, "this model would not show it"
    stops = [said[new[1]], said[new[0]]] if later_first else [said[k] for k in new[:2]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    expected = tokenizer.decode(said[: new[0]])

    flags = ("--model", folder, "--prompt", text, "--max-tokens", 8)
    assert good("generate", *flags) == f"{expected}\n"
    line = json.loads(good("generate", *flags, "--json"))
    assert (line["generated_text"], line["finish_reason"]) == (expected, "stop")
    loaded = load(folder, device="cpu")
    assert complete(*loaded, text, 8) == complete(*loaded, [text], 8)[0] == expected
    assert answers(*loaded, [{"prompt": text, "completion": text}]) == [expected]
