"""Text that is no text, files that never end, tokens that a model does not have: each an error in a line, by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import PAIRS, REPOSITORY, assert_refused, good, process, run, write_rows
from support.gguf_models import write_model

from minilora.cli.config_file import read_flags_file
from minilora.data.tokenizer import Tokenizer, check_text
from minilora.formats.files import read_text
from minilora.formats.gguf_tokenizer import tokenizer_files
from minilora.runs.front_door import load

VOCABULARY = 300  # of the model of this room
HALF = "\\ud83d"  # of an emoji, as a JSON file may escape it

pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The model in a folder of its own, to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def piped(data: bytes, *words: object) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, with these bytes on its standard input."""
    argv = [sys.executable, "-m", "minilora", *map(str, words)]
    return subprocess.run(argv, input=data, capture_output=True, cwd=REPOSITORY)


def change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


# --- Half a character ---


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0xD800, 0xDFFF), st.text(max_size=5))
def test_a_text_with_half_a_character_is_refused_and_every_other_taken(before: str, half: int, after: str) -> None:
    check_text(before)
    with pytest.raises(ValueError, match=rf"at place {len(before) + 1} of the text"):
        check_text(before + chr(half) + after)


def test_half_a_character_in_a_row_is_told_with_the_row(model: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in PAIRS]
    lines[2] = lines[2].replace("left", f"left {HALF}")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for command, more in (("train", ["--out", tmp_path / "run"]), ("evaluate", [])):
        result = run(command, "--model", model, "--data", tmp_path / "rows.jsonl", *more)
        assert_refused(result, "\\ud83d is half of a character")


def test_half_a_character_in_a_prompt_is_told(model: Path, tmp_path: Path) -> None:
    assert_refused(run("generate", "--model", model, "--prompt", "a \udcff"), "byte 0xff is not UTF-8, at place 3")
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "one"}}\n{{"prompt": "{HALF}"}}\n')
    assert_refused(run("generate", "--model", model, "--prompts", tmp_path / "prompts.jsonl"), "half of a character")


def test_bytes_that_are_no_text_on_standard_input_are_told(model: Path) -> None:
    done = piped(b"one \xff two", "generate", "--model", model)
    assert (done.returncode, done.stdout) == (2, b"") and b"error: byte 0xff is not UTF-8, at place 5" in done.stderr


def test_bytes_that_are_no_text_do_not_end_a_chat(model: Path) -> None:
    done = piped(b"one\n\xff\ntwo\n", "chat", "--model", model, "--max-tokens", 3)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) >= 3 and sum(line.startswith(b"not understood: byte 0xff") for line in said) == 1
    assert not said[-1].startswith(b"not understood")


def test_an_answer_is_printed_on_a_terminal_without_unicode(model: Path, adapter: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    child = process("generate", "--model", model, "--prompt", "naïve 🙂", "--max-tokens", 3, "--json", env=environment)
    out, err = child.communicate()
    assert child.returncode == 0 and json.loads(out)["prompt"] == "naïve 🙂", err


# --- Bytes that are not UTF-8 ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@given(before=st.binary(max_size=40), after=st.binary(max_size=40))
def test_the_first_byte_that_is_no_text_is_told_with_its_line(folder: Path, before: bytes, after: bytes) -> None:
    path = folder / "text.txt"
    start = before.decode(errors="ignore").encode()
    path.write_bytes(start + b"\xff" + after)
    line = start.count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"text\.txt, line {line}: not UTF-8 text \(0xff, byte {len(start) + 1} of"):
        read_text(path)
    path.write_bytes(start)
    assert read_text(path) == start.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("rows.jsonl", ["train", "--data", "rows.jsonl"]),
        ("rows.json", ["train", "--data", "rows.json"]),
        ("book.txt", ["train", "--data", "book.txt"]),
        ("run.yaml", ["train", "-c", "run.yaml"]),
        ("run.toml", ["train", "-c", "run.toml"]),
        ("run.json", ["train", "-c", "run.json"]),
        ("prompts", ["generate", "--prompts", "prompts"]),
        ("model/config.json", ["generate", "--model", "model", "--prompt", "a"]),
        ("model/tokenizer_config.json", ["generate", "--model", "model", "--prompt", "a"]),
        ("model/chat_template.jinja", ["generate", "--model", "model", "--prompt", "a"]),
    ],
)
def test_a_file_that_is_not_utf_8_is_told_with_its_line_and_byte(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"\n{}\xe9\n")
    model = [] if "--model" in flags else ["--model", str(copy)]
    assert_refused(run(*flags, *model), f"{name}, line 2: not UTF-8 text (0xe9, byte 4 of the file)")


# --- Files that are no files ---


@pipes
@pytest.mark.parametrize(
    "words",
    [
        *(["train", "--config", f"special{suffix}"] for suffix in (".yaml", ".toml", ".json")),
        *(["train", "--data", f"special{suffix}"] for suffix in (".jsonl", ".json", ".txt")),
        ["evaluate", "--data", "special.jsonl"],
        ["train", "--data", "parts"],
        ["generate", "--prompts", "special"],
    ],
)
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_a_pipe_a_device_or_a_folder_is_refused_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], kind: str
) -> None:
    """A pipe to which nobody writes would keep the command waiting, and /dev/zero would fill the memory."""
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    special = Path("parts/train.jsonl") if words[-1] == "parts" else Path(words[-1])
    if kind == "a pipe":
        os.mkfifo(special)
    elif kind == "a device":
        special.symlink_to("/dev/zero")
    else:
        special.mkdir()
        if words[:2] in (["train", "--data"], ["evaluate", "--data"]) and words[-1] != "parts":
            pytest.skip("a folder of data is what --data may be")
    result = run(*words, "--model", model)
    if kind == "a device" and special.parent == Path(".") and words[:2] == ["train", "--data"]:
        # Train keeps the place that a link leads to, and this one has no ending.
        assert_refused(result, "/dev/zero: data must be a folder or a file that ends in .jsonl")
    else:
        told = "a folder" if kind == "a folder" else "a pipe or a device"
        assert_refused(result, f"{special}: {told}, and a regular file is needed")


@pipes
def test_a_model_whose_configuration_is_a_pipe_is_refused_at_once(copy: Path) -> None:
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    assert_refused(run("generate", "--model", copy, "--prompt", "a"), "config.json: a pipe or a device")


# --- Files of settings that stand for more than they say ---


def test_aliases_in_a_file_of_settings_are_refused(tmp_path: Path) -> None:
    """Nine lines like these are a list of a thousand million entries."""
    laughs = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(["a0: &a0 [ha]", *laughs, "target_modules: *a9"]))
    with pytest.raises(ValueError, match=r"run\.yaml: not valid YAML \(write out what \*a0 stands for .*line 2"):
        read_flags_file(path)
    path.write_text("rank: &r 4\nalpha: *r")
    with pytest.raises(ValueError, match=r"write out what \*r stands for"):
        read_flags_file(path)
    path.write_text("rank: &r 4")
    assert read_flags_file(path) == {"rank": 4}


def test_a_key_that_is_given_twice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in ("rank: 4\nalpha: 2\nrank: 8", "lora_parameters:\n  rank: 4\n  rank: 8"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"rank is given twice .*line 3"):
            read_flags_file(path)


@pytest.mark.parametrize(("name", "opening"), [("run.yaml", "["), ("run.toml", "a = ["), ("run.json", '{"a": [')])
def test_a_file_that_is_nested_too_deeply_is_told(tmp_path: Path, name: str, opening: str) -> None:
    (tmp_path / name).write_text(opening + "[" * 100_000)
    with pytest.raises(ValueError, match=rf"{name}: not valid"):
        read_flags_file(tmp_path / name)


def test_a_day_in_yaml_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("date: 2025-06-30")
    assert read_flags_file(tmp_path / "run.yaml") == {"date": "2025-06-30"}


# --- Tokens that the model does not have ---


def added(id: int) -> Callable[[dict[str, Any]], None]:
    """A token of this number among those of tokenizer.json. The library numbers added tokens by itself, so a word."""
    return lambda content: content["model"]["vocab"].update({"zzz": id})


BEYOND = {
    "a token": ("tokenizer.json", added(5000), "tokenizer.json: 'zzz' is token 5000"),
    "the first token beyond": ("tokenizer.json", added(VOCABULARY), "'zzz' is token 300"),
    "an end": ("generation_config.json", lambda content: content.update(eos_token_id=[0, 300]), "is token 300"),
    "a number below 0": ("generation_config.json", lambda content: content.update(eos_token_id=-1), "is -1, expected"),
    "a huge number": ("generation_config.json", lambda content: content.update(eos_token_id=2**40), "expected"),
    "a text": (
        "generation_config.json",
        lambda content: content.update(eos_token_id="0"),
        "is '0', expected",
    ),
    "a truth": ("generation_config.json", lambda content: content.update(eos_token_id=True), "is True, expected"),
    "what begins a text": (
        "tokenizer.json",
        lambda content: content.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"x": {"id": "x", "ids": [777], "tokens": ["x"]}},
            }
        ),
        "before a text is token 777",
    ),
}


@pytest.mark.parametrize("where", BEYOND)
def test_a_token_that_the_model_does_not_have_is_told_before_it_is_asked_for(
    copy: Path, adapter: Path, tmp_path: Path, where: str
) -> None:
    name, spoil, told = BEYOND[where]
    change(copy / name, spoil)
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    for words in (
        ["generate", "--prompt", "one"],
        ["chat"],
        ["evaluate", "--data", rows],
        ["train", "--data", rows, "--out", tmp_path / "run", "--steps", 1],
        ["merge", "--adapter", adapter, "--out", tmp_path / "merged"],
    ):
        assert_refused(run(*map(str, words), "--model", copy), str(copy), told)
    with pytest.raises(ValueError, match="token"):
        load(copy)


def test_the_last_token_that_the_model_has_may_be_asked_for(copy: Path) -> None:
    change(copy / "generation_config.json", lambda content: content.update(eos_token_id=[0, VOCABULARY - 1]))
    assert good("generate", "--model", copy, "--prompt", "one", "--max-tokens", 2)


def test_an_end_beyond_the_tokens_of_a_gguf_file_is_told(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = write_model(tmp_path / "model")
    good("convert", "--model", folder, "--format", "gguf", "--out", tmp_path / "model.gguf")
    files = tokenizer_files(tmp_path / "model.gguf")
    assert files["generation_config.json"]["eos_token_id"] == Tokenizer.load(folder).eos_id
    whole = (tmp_path / "model.gguf").read_bytes()
    at = whole.index(b"tokenizer.ggml.eos_token_id") + len(b"tokenizer.ggml.eos_token_id") + 4  # after its type
    (tmp_path / "model.gguf").write_bytes(whole[:at] + (99_999).to_bytes(4, "little") + whole[at + 4 :])
    assert_refused(run("generate", "--model", tmp_path / "model.gguf", "--prompt", "a"), "eos_token_id is 99999")
