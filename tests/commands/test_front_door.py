"""`from minilora import load, load_adapter, complete`: text in, text out, and the same words as the commands'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.commands import PAIRS, REPOSITORY, good

from minilora import complete, load, load_adapter
from minilora.data.tokenizer import Tokenizer
from minilora.model.model import Model


@pytest.fixture
def loaded(model: Path) -> tuple[Model, Tokenizer]:
    return load(model, device="cpu")


def test_the_lines_of_the_readme_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").symlink_to(REPOSITORY / "weights")
    monkeypatch.chdir(tmp_path)
    good("train", "--steps", 1, "--eval-rows", 1, "--out", "runs/nl2sql-1")
    capsys.readouterr()
    (lines,) = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text("utf-8"), flags=re.M | re.S)
    exec(compile(lines, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_text_gives_a_text_and_a_list_gives_a_list_as_if_each_were_alone(
    loaded: tuple[Model, Tokenizer],
    adapter: Path,
) -> None:
    base, tokenizer = loaded
    adapted = load_adapter(base, adapter)
    prompts = [pair["prompt"] for pair in PAIRS]
    alone = [complete(adapted, tokenizer, prompt, max_tokens=8) for prompt in prompts]
    assert alone == [pair["completion"] for pair in PAIRS]  # it has learnt them
    assert complete(adapted, tokenizer, prompts, max_tokens=8) == alone
    assert complete(adapted, tokenizer, []) == []
    assert complete(base, tokenizer, prompts, max_tokens=8) != alone  # and the base is as it was


def test_words_are_those_of_the_generate_command(
    loaded: tuple[Model, Tokenizer],
    model: Path,
    adapter: Path,
) -> None:
    flags = ["--model", model, "--adapter", adapter, "--prompt", "down ->", "--max-tokens", 12]
    adapted = load_adapter(loaded[0], adapter)
    assert complete(adapted, loaded[1], "down ->", max_tokens=12) == good("generate", *flags).removesuffix("\n")


def test_draws_follow_their_seed(loaded: tuple[Model, Tokenizer]) -> None:
    drawn = [complete(*loaded, "one and", max_tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_an_answer_ends_where_the_context_is_full(loaded: tuple[Model, Tokenizer]) -> None:
    base, tokenizer = loaded
    context = base.config.max_position_embeddings
    most = complete(base, tokenizer, "one and", max_tokens=10 * context)
    length = len(tokenizer.encode("one and"))
    assert most == complete(base, tokenizer, "one and", max_tokens=context - length)


@pytest.mark.parametrize("prompt", ["", ["one", ""], "one and two. " * 64])
def test_a_prompt_that_leaves_nothing_to_do_is_an_error(
    loaded: tuple[Model, Tokenizer], prompt: str | list[str]
) -> None:
    with pytest.raises(ValueError, match="prompt"):
        complete(*loaded, prompt, max_tokens=8)


def test_fewer_than_one_token_is_an_error(loaded: tuple[Model, Tokenizer]) -> None:
    with pytest.raises(ValueError, match="max_tokens is 0: there is nothing to generate"):
        complete(*loaded, "one", max_tokens=0)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("nowhere")
    with pytest.raises(ImportError, match="cannot import name 'lode'"):
        from minilora import lode  # noqa: F401
