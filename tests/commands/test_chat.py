"""Answers on the command line: many prompts in batches, each with its adapter, and conversations in the terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.adapter_folders import write_base_and_adapters
from support.commands import CONFIG, assert_refused, good, process, run, write_rows
from support.small_tokenizer import write_tokenizer

from minilora.data.prompts import end_of_turn
from minilora.data.tokenizer import Tokenizer, save_tokenizer_files
from minilora.formats.adapters import load_adapter
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.formats.load import load_model
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.methods.prefix import PrefixTuning
from minilora.model import generation
from minilora.model.config import Config
from minilora.model.generation import Memory, complete

RAW = CONFIG | {"max_position_embeddings": 400}
METHODS: dict[str, Method] = {
    "a": LoRA(2, 8.0, target_modules=("all-linear",)),
    "b": LoRA(3, 9.0, target_modules=("q_proj", "up_proj")),
    "p": PrefixTuning(2),
}
MESSAGES = [
    [{"role": "user", "content": "one and two"}],
    [{"role": "system", "content": "be odd"}, {"role": "user", "content": "six?"}],
    [
        {"role": "user", "content": "is it odd"},
        {"role": "assistant", "content": "even"},
        {"role": "user", "content": "no"},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that talks nonsense, and adapters with which it talks other nonsense."""
    folder = tmp_path_factory.mktemp("chat")
    write_base_and_adapters(folder, RAW, METHODS)
    return folder


@pytest.fixture
def flags(folder: Path) -> list[object]:
    """The model with all three adapters."""
    return ["--model", folder / "base", *(part for name in METHODS for part in ("--adapter", folder / name))]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def alone(folder: Path, adapter: str, prompt: str, *flags: object) -> str:
    """What the command says to one prompt with one adapter."""
    chosen = () if adapter == "base" else ("--adapter", folder / adapter)
    return good("generate", "--model", folder / "base", *chosen, "--prompt", prompt, *flags)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- many prompts ---


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_prompt_of_a_file_is_answered_by_its_adapter_as_if_it_were_alone(
    folder: Path, flags: list[object], tmp_path: Path, batch_size: int
) -> None:
    asked = [
        {"prompt": "one and", "adapter": "a", "id": 7},
        {"prompt": "two or three or four", "adapter": "base"},
        {"prompt": "six", "adapter": "b"},
        {"prompt": "one and", "adapter": "p"},
        {"prompt": "four are", "adapter": "a"},
        {"prompt": "five are odd", "adapter": "b", "completion": "kept"},
    ]
    path = write_rows(tmp_path / "prompts.jsonl", asked)
    found = lines(good("generate", *flags, "--prompts", path, "--max-tokens", 8, "--batch-size", batch_size))
    assert [{key: row[key] for key in given} for row, given in zip(found, asked, strict=True)] == asked
    expected = [alone(folder, row["adapter"], row["prompt"], "--max-tokens", 8) for row in asked]
    assert [row["generated_text"] + "\n" for row in found] == expected
    assert len({row["generated_text"] for row in found}) > 3


def test_a_prompt_that_names_no_adapter_is_answered_by_every_one_given(folder: Path, flags: list[object]) -> None:
    found = lines(good("generate", *flags, "--prompt", "one", "--prompt", "two and", "--max-tokens", 4))
    assert [(row["prompt"], row["adapter"]) for row in found] == [(p, a) for p in ("one", "two and") for a in "abp"]
    (only,) = lines(good("generate", "--model", folder / "base", "--prompt", "one", "--json", "--max-tokens", 4))
    assert only["adapter"] == "base" and only["generated_text"] + "\n" == alone(
        folder, "base", "one", "--max-tokens", 4
    )


def test_conversations_are_rendered_and_answered_until_their_turn_ends(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder / "base")
    path = write_rows(tmp_path / "prompts.jsonl", [{"messages": each} for each in MESSAGES] + [{"prompt": MESSAGES[0]}])
    model = ["--model", folder / "base", "--max-tokens", 30]
    found = lines(good("generate", *model, "--prompts", path))
    base, _ = load_model(folder / "base")
    ids = [tokenizer.encode(tokenizer.chat(each, add_generation_prompt=True)) for each in (*MESSAGES, MESSAGES[0])]
    turn = tokenizer.backend.token_to_id("<|im_end|>")
    expected = [complete(base, [each], 30, frozenset([turn, 0]))[0] for each in ids]
    assert [row["generated_text"] for row in found] == [tokenizer.decode(answer) for answer in expected]
    asked = good("generate", *model, "--chat", "--system-prompt", "be odd", "--prompt", "six?")
    assert asked == found[1]["generated_text"] + "\n"


def test_an_answer_ends_with_the_turn_though_the_models_own_end_is_another_token(folder: Path, tmp_path: Path) -> None:
    weights = random_weights(Config.from_dict(RAW), seed=3, std=0.3)
    turn = Tokenizer.load(folder / "base").backend.token_to_id("<|im_end|>")
    weights["model.embed_tokens.weight"][turn] *= 2  # tied: the model likes to say it
    write_checkpoint(tmp_path, RAW, weights)
    save_tokenizer_files(folder / "base", tmp_path)
    flags = ("--model", tmp_path, "--max-tokens", 60, "--json", "--prompt")
    tokenizer = Tokenizer.load(tmp_path)
    assert turn not in tokenizer.stop_ids
    text = tokenizer.chat([user("six?")], add_generation_prompt=True)
    (asked,), (raw,) = (lines(good("generate", *flags, *more)) for more in (("six?", "--chat"), (text,)))
    assert asked["finish_reason"] == "stop" and len(asked["generated_text"]) < len(raw["generated_text"])
    assert raw["generated_text"].startswith(asked["generated_text"])


@pytest.mark.parametrize(
    ("closing", "expected"), [("<|im_end|>\n", {"<|im_end|>"}), ("\n", set()), ("<|endoftext|>", {"<|endoftext|>"})]
)
def test_the_end_of_a_turn_is_the_special_token_that_the_template_closes_it_with(
    tmp_path: Path, closing: str, expected: set[str]
) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + closing + "{% endfor %}"
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=template))
    assert {tokenizer.piece(token) for token in end_of_turn(tokenizer)} == expected


def test_how_an_answer_ended_is_told_and_one_stops_at_the_tokens_that_are_asked_for(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "base")
    (long,) = lines(alone(folder, "base", "one and", "--json", "--max-tokens", 20))
    assert long["finish_reason"] == "length"
    tokens = tokenizer.encode(long["generated_text"])
    end = next(token for token in tokens[3:] if tokenizer.encode(tokenizer.decode([token])) == [token])
    stop = tokenizer.decode([end])
    (short,) = lines(alone(folder, "base", "one and", "--json", "--max-tokens", 20, "--extra-eos-token", stop))
    assert short["finish_reason"] == "stop"
    assert long["generated_text"].startswith(short["generated_text"] + stop) and stop not in short["generated_text"]


def test_a_long_prompt_in_a_batch_takes_no_room_from_the_others(folder: Path) -> None:
    long = "one and two " * 60
    room = 400 - len(Tokenizer.load(folder / "base").encode(long))
    assert 0 < room < 120
    flags = ("--model", folder / "base", "--prompt", long, "--prompt", "six", "--max-tokens", 120)
    found = lines(good("generate", *flags))
    apart = lines(good("generate", *flags, "--batch-size", 1))
    assert found == apart and all(row["finish_reason"] == "length" for row in found)
    assert len(found[0]["generated_text"]) < len(found[1]["generated_text"])


def test_virtual_tokens_take_room_too(folder: Path) -> None:
    for name, most in (("a", 400), ("p", 398)):
        flags = ("--model", folder / "base", "--adapter", folder / name, "--prompt", "one two " * 200)
        assert_refused(run("generate", *flags), f"the model sees {most}")


def test_the_lines_go_to_a_file_if_one_is_named(folder: Path, tmp_path: Path) -> None:
    flags = ("--model", folder / "base", "--prompt", "one", "--max-tokens", 4)
    assert good("generate", *flags, "--out", tmp_path / "new" / "answers.jsonl") == ""
    assert (tmp_path / "new" / "answers.jsonl").read_text() == good("generate", *flags, "--json")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"prompt": "one"}\n{"prompt": \n', "prompts.jsonl, line 2"),
        ('["one"]', "prompts.jsonl, line 1: not a prompt"),
        ('{"question": "one"}', "prompts.jsonl, line 1: not a prompt"),
        ('{"prompt": "one", "messages": []}', "prompts.jsonl, line 1: not a prompt"),
        ('{"messages": []}', "prompts.jsonl, line 1: the prompt is neither"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: the last message is the assistant's"),
        ('{"prompt": "one", "adapter": 3}', "prompts.jsonl, line 1: adapter is 3"),
        ('{"prompt": "one", "adapter": "z"}', "'z': there are base, a, b, p"),
        ('{"prompt": ""}', "the prompt is empty"),
        ("\n", "prompts.jsonl holds no prompts"),
    ],
)
def test_a_mistake_in_a_file_of_prompts_is_named(flags: list[object], tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    assert_refused(run("generate", *flags, "--prompts", path), named)


def test_a_flag_that_makes_no_sense_is_named(folder: Path) -> None:
    for flags, named in (
        (["--batch-size", 0], "--batch-size 0"),
        (["--system-prompt", "be odd"], "--system-prompt goes with --chat"),
        (["--extra-eos-token", "one and two"], "--extra-eos-token 'one and two' is"),
        (["--adapter", f"base={folder / 'a'}"], "'base' is that of the model without adapters"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ):
        assert_refused(run("generate", "--model", folder / "base", "--prompt", "one", *flags), named)


# --- conversations ---


@pytest.fixture
def talk(flags: list[object], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Type these lines, and return what is said to them."""

    def talk(*typed: str, more: tuple[object, ...] = ()) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        return good("chat", *flags, "--max-tokens", 12, *more).split("\n")[:-1]

    return talk


def answer(folder: Path, adapter: str, messages: list[dict[str, str]], count: int = 12) -> str:
    """What an adapter says to a conversation, computed from nothing."""
    tokenizer, model = Tokenizer.load(folder / "base"), load_model(folder / "base")[0]
    if adapter != "base":
        model = load_adapter(model, folder / adapter)
    ids = tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=True))
    return tokenizer.decode(complete(model, [ids], count, tokenizer.stop_ids | end_of_turn(tokenizer))[0])


def test_each_turn_is_answered_as_the_whole_conversation_by_the_adapter_chosen(folder: Path, talk: Any) -> None:
    turns = [("a", "one"), ("a", "and two"), ("p", "odd?"), ("base", "even?"), ("a", "six"), ("b", "one")]
    said = talk("one", "and two", "/adapter p", "odd?", "/base", "even?", "/adapter a", "six", "/adapter b", "one")
    messages, expected = [], []
    for adapter, text in turns:
        messages.append(user(text))
        expected.append(answer(folder, adapter, messages))
        messages.append(assistant(expected[-1]))
    assert "\n".join(said) == "\n".join(expected)
    assert len({answer(folder, adapter, messages[:5]) for adapter in ("base", "a", "b", "p")}) == 4


def test_what_was_read_before_is_not_read_again(folder: Path, talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counting(model: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        counts.append(tokens.shape[1])
        return forward(model, tokens, *rest, **options)

    forward = generation.forward
    monkeypatch.setattr(generation, "forward", counting)
    said = "\n".join(talk("one and two and three are four and five and six and odd", "/list", "and even"))
    first, second = (count for count in counts if count > 1)
    tokenizer = Tokenizer.load(folder / "base")
    new = len(tokenizer.encode("<|im_end|>\n<|im_start|>user\nand even<|im_end|>\n<|im_start|>assistant\n"))
    again = len(tokenizer.encode(said.partition("\n  base\n")[0]))  # those whose bytes are no text become others
    assert new <= second <= new + again < new + again + first


def test_clear_forgets_all_but_the_system_prompt(folder: Path, talk: Any) -> None:
    system = {"role": "system", "content": "be even"}
    alone = answer(folder, "a", [system, user("one")])
    said = talk("one", "two", "/clear", "one", more=("--system-prompt", "be even"))
    second = answer(folder, "a", [system, user("one"), assistant(alone), user("two")])
    assert "\n".join(said) == f"{alone}\n{second}\n{alone}"
    assert alone not in (second, answer(folder, "a", [user("one")]))


def test_the_commands_tell_what_there_is(talk: Any) -> None:
    assert talk("/list", "/adapter b", "/list") == ["  base", "* a", "  b", "  p", "  base", "  a", "* b", "  p"]
    assert talk("/adapter z") == ["no adapter 'z': there are base, a, b, p"]
    assert talk("/adaptor b") == ["no command /adaptor b: /help tells them"]
    helped = "\n".join(talk("/help"))
    assert all(command in helped for command in ("/adapter NAME", "/base", "/list", "/clear", "/help", "/quit"))
    for leave in ("/quit", "exit", "quit", "Exit"):
        assert talk(leave, "/help") == []
    assert talk("", "  ") == []


def test_a_conversation_that_fills_the_context_says_so_and_goes_on_after_clear(folder: Path, talk: Any) -> None:
    tokenizer, said = Tokenizer.load(folder / "base"), answer(folder, "a", [user("six")])
    too_much = talk("six", "one two " * 200, "six two", "/clear", "six")
    assert len(too_much) > 3 and "the model sees 400. /clear begins anew" in "\n".join(too_much)
    after = answer(folder, "a", [user("six"), assistant(said), user("six two")])  # what had no room is not part of it
    assert "\n".join(too_much).startswith(said) and "\n".join(too_much).endswith(f"begins anew\n{after}\n{said}")

    def length(count: int) -> int:
        return len(tokenizer.encode(tokenizer.chat([user("one " * count + ".")], add_generation_prompt=True)))

    nearly = max(count for count in range(400) if length(count) <= 396)
    assert talk("one " * nearly + ".")[-1] == "(the context is full: /clear begins anew)"
    assert "(the context is full: /clear begins anew)" not in talk("one " * (nearly // 2) + ".")


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(
    folder: Path, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Memory.stream
    asked: list[int] = []

    def interrupted(self: Memory, prompt: Any, choose: Any) -> Iterator[int]:
        asked.append(len(prompt))
        for count, token in enumerate(stream(self, prompt, choose)):
            if len(asked) == 1 and count == 4:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Memory, "stream", interrupted)
    heard, second = "\n".join(talk("one", "/list", "two")).split("\n  base\n* a\n  b\n  p\n")
    assert answer(folder, "a", [user("one")]).startswith(heard) and heard
    assert second == answer(folder, "a", [user("one"), assistant(heard), user("two")])


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_a_process_stops_the_answer_and_not_the_program(folder: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    raw = RAW | {"max_position_embeddings": 1_000_000}
    write_checkpoint(endless, raw, random_weights(Config.from_dict(raw), seed=3, std=0.3))
    save_tokenizer_files(folder / "base", endless)
    chat = process("chat", "--model", endless, "--max-tokens", 1_000_000, bufsize=0)
    assert chat.stdin and chat.stdout
    try:
        chat.stdin.write("one\n")
        assert chat.stdout.read(20)  # it is talking
        chat.send_signal(signal.SIGINT)
        rest, err = chat.communicate("/list\n/quit\n", timeout=60)
    finally:
        chat.kill()  # one that does not hear would talk on and on
    assert chat.returncode == 0 and rest.endswith("* base\n") and "Traceback" not in err


def test_a_model_without_a_chat_template_is_refused(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for path in (folder / "base").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if "chat" not in k}))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_refused(run("chat", "--model", tmp_path), "has no chat template")


def test_help_says_how_chat_is_called() -> None:
    result = run("chat", "--help")
    assert result.code == 0 and result.out.startswith("usage: python -m minilora.chat ")
