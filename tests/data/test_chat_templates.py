"""Conversations become the very strings that transformers writes, and what of them trains is exact to the token."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_tokenizer import CHAT_TEMPLATES, POST_PROCESSORS, STOP, write_tokenizer

from minilora.data.examples import Example, Row, encode_row, encode_rows
from minilora.data.tokenizer import Tokenizer

RELEASES = sorted(CHAT_TEMPLATES)
TOOL = {"type": "function", "function": {"name": "wéather", "parameters": {"type": "object", "a": ["<", None, 1.5]}}}

text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            "\n\nso\n",
            "{{ 7 * 7 }}",
            "{% break %}",
            "<|im_end|>\n<|im_start|>user\n",
            "/think",
            "be /no_think",
        ]
    ),
)
calls = st.lists(
    st.fixed_dictionaries({"name": text, "arguments": st.dictionaries(text, text, max_size=2)}), max_size=2
)
spoken = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": text}, optional={"name": st.none() | text}
)
calling = st.builds(
    lambda content, tool_calls: {"role": "assistant", "content": content, "tool_calls": tool_calls},
    st.one_of(st.none(), text), calls,
)  # fmt: skip
system = st.fixed_dictionaries({"role": st.just("system"), "content": text | st.just("Do it. /system_override")})
VARIABLES = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.none() | st.just([]) | st.just([TOOL, TOOL]),
        "enable_thinking": st.booleans() | st.none(),
        "custom_instructions": text,
        "xml_tools": st.lists(text, max_size=2),
        "python_tools": st.lists(text, max_size=2),
        "not_in_the_template": st.integers(),
    },
)


def conversations(release: str, first: Any = None) -> st.SearchStrategy[list[dict[str, Any]]]:
    """SmolLM3's template knows of tools; SmolLM2's adds strings, so each message has its content."""
    turns = st.lists(spoken | calling if release == "smollm3" else spoken, min_size=1, max_size=6)
    return st.builds(lambda head, rest: [*head, *rest], st.lists(system, max_size=1) if first is None else first, turns)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("releases")
    return {name: write_tokenizer(root / name, chat_template=CHAT_TEMPLATES[name]) for name in RELEASES}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", minversion="5")
    return {name: transformers.AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


# --- The string ---


@pytest.mark.parametrize("release", RELEASES)
@given(data=st.data(), prompt=st.booleans(), variables=VARIABLES)
def test_a_conversation_becomes_the_string_and_the_tokens_that_transformers_writes(
    release: str, data: st.DataObject, prompt: bool, variables: dict[str, Any], ours: Any, theirs: Any
) -> None:
    messages = data.draw(conversations(release))
    arguments = {"add_generation_prompt": prompt, **variables}
    written = ours[release].chat(messages, **arguments)
    assert written == theirs[release].apply_chat_template(messages, tokenize=False, **arguments)
    tokens = theirs[release].apply_chat_template(messages, tokenize=True, truncation=False, **arguments)
    assert ours[release].encode(written) == tokens["input_ids"]


def test_what_the_templates_can_do_is_seen_in_what_they_write(folders: dict[str, Path]) -> None:
    new, old = (Tokenizer.load(folders[name], datetime(2025, 6, 30)) for name in ("smollm3", "smollm2"))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\nyes"}]
    header = (
        "<|im_start|>system\n## Metadata\n\nToday Date: 30 June 2025\nReasoning Mode: {}\n\n## Custom Instructions\n\n"
    )
    dialogue = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{}yes<|im_end|>\n"
    thinking = header.format("/think") + "Answer as SmolLM would.\n\n<|im_end|>\n" + dialogue.format("")
    assert new.chat(chat, False) == thinking
    assert new.chat(chat, True) == thinking + "<|im_start|>assistant\n"
    silent = "<think>\n\n</think>\n"
    terse = [{"role": "system", "content": "Be terse. /no_think"}, *chat]
    expected = header.format("/no_think") + "Be terse.\n\n<|im_end|>\n" + dialogue.format(silent)
    assert new.chat(terse, True) == expected + "<|im_start|>assistant\n" + silent
    assert new.chat(terse[1:], False, enable_thinking=False) == expected.replace("Be terse.", "Answer as SmolLM would.")
    assert '"name": "wéather", "parameters": {"type": "object", "a": ["<", null, 1.5]}' in new.chat(chat, False, [TOOL])
    with pytest.raises(ValueError, match="a system message comes first, not as message 3"):
        new.chat([*chat, terse[0]], False)
    named = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert old.chat(chat, False) == named + dialogue.format("\n")
    assert old.chat(terse, True).startswith("<|im_start|>system\nBe terse. /no_think<|im_end|>\n<|im_start|>user\nhi")


def test_a_template_of_its_own_for_tools_is_taken_where_tools_are_given(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    folder = write_tokenizer(tmp_path, chat_template=several)
    tokenizer, chat = Tokenizer.load(folder), [{"role": "user", "content": "hi"}]
    written = [tokenizer.chat(chat, False, tools) for tools in (None, [TOOL], [])]
    assert written == ["plain", "1 tools", "0 tools"]
    transformers = pytest.importorskip("transformers", minversion="5")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert written == [theirs.apply_chat_template(chat, tools=t, tokenize=False) for t in (None, [TOOL], [])]


# --- What is trained ---


def trained(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, train in zip(*example, strict=True):
        if train:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs if run]


# Without what could spell a special token or steer the template, and with something that is no line break.
plain = st.text(st.characters(exclude_characters="<|>/", exclude_categories=["Cs"]), max_size=12).map(lambda t: "a" + t)
dialogues = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": plain}), max_size=6
).map(lambda rest: [{"role": "user", "content": "hi"}, *rest])


@pytest.mark.parametrize("release", RELEASES)
@given(messages=dialogues, thinking=st.booleans())
def test_all_turns_of_the_assistant_train_or_only_the_last_or_everything(
    release: str, messages: list[dict[str, Any]], thinking: bool, ours: Any
) -> None:
    tokenizer: Tokenizer = ours[release]
    row: Row = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
    answers = [message["content"] + STOP for message in messages if message["role"] == "assistant"]
    every, last, whole = (encode_row(row, tokenizer, part) for part in ("all-turns", "last-turn", "everything"))
    assert trained(every, tokenizer) == answers
    assert trained(last, tokenizer) == answers[-1:]
    assert all(whole.trained)
    text = tokenizer.chat(messages, False, enable_thinking=thinking)
    for example in (every, last, whole):
        assert tokenizer.backend.decode(example.tokens, skip_special_tokens=False) == text


def test_a_prompt_of_messages_is_not_trained_and_its_answers_are(ours: Any) -> None:
    tokenizer: Tokenizer = ours["smollm2"]
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    row: Row = {"prompt": [user, assistant, user], "completion": [assistant, user, {**assistant, "content": "b"}]}
    assert trained(encode_row(row, tokenizer), tokenizer) == ["a" + STOP, "b" + STOP]
    assert trained(encode_row(row, tokenizer, "last-turn"), tokenizer) == ["b" + STOP]
    assert all(encode_row(row, tokenizer, "everything").trained)


@given(prompt=plain, completion=plain)
def test_of_a_plain_prompt_everything_trains_only_where_asked(prompt: str, completion: str, ours: Any) -> None:
    tokenizer: Tokenizer = ours["smollm2"]
    row: Row = {"prompt": prompt, "completion": completion}
    usual, last, whole = (encode_row(row, tokenizer, part) for part in ("all-turns", "last-turn", "everything"))
    assert usual == last and usual.tokens == whole.tokens and all(whole.trained)
    assert trained(usual, tokenizer) == [completion + STOP]


def test_a_call_of_a_tool_is_a_turn_and_needs_no_content(ours: Any) -> None:
    tokenizer: Tokenizer = ours["smollm3"]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    result, answer = {"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}
    row: Row = {"messages": [{"role": "user", "content": "q"}, call, result, answer], "tools": [TOOL]}
    example = encode_row(row, tokenizer)
    assert trained(example, tokenizer) == ['<tool_call>{\n  "name": "f"\n}</tool_call>' + STOP, "three" + STOP]
    assert "<tools>" in tokenizer.backend.decode(example.tokens)
    with pytest.raises(ValueError, match="message 1: its content is null, not a text"):
        encode_row({"messages": [{"role": "assistant", "content": None}]}, tokenizer)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": {"f": 1}}, "row 1: the value of tools must be a list"),
        ({"tools": ["f"]}, "row 1: the value of tools must be a list"),
        ({"chat_template_kwargs": ["f"]}, "row 1: the value of chat_template_kwargs must be a JSON object"),
    ],
)
def test_what_a_template_cannot_be_given_is_refused(more: dict[str, Any], message: str, ours: Any) -> None:
    row: Row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], **more}
    with pytest.raises(ValueError, match=message):
        encode_rows([row], ours["smollm3"], 500)


def test_of_a_template_that_forgets_earlier_thoughts_the_last_turn_can_train(tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last or m.role == 'user' else '…' }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=forgetful))
    roles = ("user", "assistant", "user", "assistant")
    row: Row = {"messages": [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]}
    with pytest.raises(ValueError, match="--train-on last-turn"):
        encode_row(row, tokenizer)
    assert trained(encode_row(row, tokenizer, "last-turn"), tokenizer) == ["3" + STOP]


@pytest.mark.parametrize("release", RELEASES)
def test_a_chat_that_begins_with_the_assistant_is_refused_with_advice(release: str, ours: Any) -> None:
    row: Row = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match=r"message 1.*an assistant's turn.*[bB]egin with a system or user message"):
        encode_row(row, ours[release])


# --- BOS and EOS ---


@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
@pytest.mark.parametrize("adds", [None, True, False])
def test_a_text_begins_and_ends_as_transformers_begins_and_ends_it_and_eos_closes_it_once(
    post_processor: str, adds: bool | None, tmp_path: Path
) -> None:
    config = {} if adds is None else {"add_bos_token": adds, "add_eos_token": adds}
    folder = write_tokenizer(tmp_path, post_processor, **config)
    tokenizer = Tokenizer.load(folder)
    transformers = pytest.importorskip("transformers", minversion="5")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for content in ("", "How are you?", " \n", "a" * 20):
        ids = theirs(content, truncation=False).input_ids
        expected = ids if len(ids) > len(tokenizer.prefix) and ids[-1] == 2 else [*ids, 2]
        assert encode_row({"text": content}, tokenizer).tokens == expected
        begun = tokenizer.with_bos(tokenizer.encode(content))
        assert begun == tokenizer.with_bos(begun) == ids[: len(begun)]
    differs = adds is not None and adds != bool(tokenizer.prefix)
    assert [("tokenizer_config.json says add_bos_token" in remark) for remark in tokenizer.remarks] == [True] * differs


@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_to_what_a_chat_template_writes_nothing_is_added(post_processor: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, post_processor))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert encode_row({"messages": messages}, tokenizer).tokens == tokenizer.encode(tokenizer.chat(messages, False))
