"""What the text room promises: masks exact to the token, and batches that neither lose nor invent a label."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_tokenizer import START, STOP, write_tokenizer

from minilora.data.batches import Batch, collate, count_labels, pack, pad
from minilora.data.datasets import load_dataset, read_rows
from minilora.data.examples import Example, Row, encode_row, encode_rows, left_out
from minilora.data.tokenizer import Tokenizer, save_tokenizer_files
from minilora.ops.cross_entropy import IGNORE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("bos"), "bos"))


def strings(example: Example, tokenizer: Tokenizer) -> tuple[str, str]:
    """(all the text, the trained text), special tokens written out."""

    def write(ids: list[int]) -> str:
        return tokenizer.backend.decode(ids, skip_special_tokens=False)

    return write(example.tokens), write([t for t, train in zip(*example, strict=True) if train])


# Without the characters that could spell a special token, and without lone surrogates, which UTF-8 lacks.
texts = st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs"]), max_size=30)
roles = st.sampled_from(["user", "assistant", "system"])
messages = st.builds(lambda role, content: {"role": role, "content": content}, roles, texts)
opening = st.builds(lambda content: {"role": "user", "content": content}, texts)
conversations = st.builds(lambda one, more: [one, *more], opening, st.lists(messages, max_size=6))
examples = st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=12).map(
    lambda pairs: Example([t for t, _ in pairs], [m for _, m in pairs])
)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# The tokenizer.


def test_a_folder_says_which_tokens_begin_end_and_fill(tokenizer: Tokenizer, with_bos: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.stop_ids == {2} and (tokenizer.prefix, with_bos.prefix) == ([], [1])
    assert tokenizer.vocab_size == len(tokenizer.backend.get_vocab())


def test_generation_config_adds_stop_tokens_and_stands_in_for_a_missing_eos(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token=None, pad_token=None)
    assert Tokenizer.load(tmp_path).eos_id is None
    assert Tokenizer.load(tmp_path).pad_id == 0
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert Tokenizer.load(tmp_path).eos_id == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert Tokenizer.load(tmp_path).eos_id == 0
    write_tokenizer(tmp_path)
    assert Tokenizer.load(tmp_path).eos_id == 2
    assert Tokenizer.load(tmp_path).stop_ids == {0, 2}


@quick
@given(text=texts)
def test_decoding_undoes_encoding_and_special_tokens_are_one_token(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(START + text + STOP) == [1, *tokenizer.encode(text), 2]
    assert tokenizer.decode(tokenizer.encode(START + text + STOP)) == text


def test_a_missing_tokenizer_or_template_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    base = Tokenizer.load(write_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(ValueError, match="no chat template"):
        base.chat([{"role": "user", "content": "hi"}], True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.load(tmp_path)


def test_templates_are_found_wherever_releases_put_them(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    write_tokenizer(tmp_path, chat_template=several)
    assert Tokenizer.load(tmp_path).chat([], False) == "named"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat([], False) == "file"


def test_templates_may_refuse_may_not_escape_and_may_mark_generations(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        Tokenizer.load(tmp_path).chat([], False)
    write_tokenizer(tmp_path, chat_template="{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="refuses"):
        Tokenizer.load(tmp_path).chat([], False)
    marked = "{% generation %}{{ messages[0].content | tojson }}{% endgeneration %}"
    write_tokenizer(tmp_path, chat_template=marked)
    assert Tokenizer.load(tmp_path).chat([{"role": "user", "content": "<é>"}], False) == '"<é>"'


def test_copied_files_load_as_the_original(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer_files(folder, tmp_path / "new")
    save_tokenizer_files(folder, folder)
    copy = Tokenizer.load(tmp_path / "new")
    assert copy.encode("How are you?") == tokenizer.encode("How are you?")
    assert copy.templates == tokenizer.templates


# Rows and their masks.


@quick
@given(text=texts)
def test_a_text_is_trained_whole_and_ends_in_one_eos(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert encode_row({"text": text}, tokenizer) == ([*ids, 2], [True] * (len(ids) + 1))
    assert encode_row({"text": text + STOP}, tokenizer) == encode_row({"text": text}, tokenizer)


@quick
@given(prompt=texts, completion=texts)
def test_a_completion_is_trained_and_its_prompt_is_what_generation_sees(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> None:
    tokens, trained = encode_row({"prompt": prompt, "completion": completion}, tokenizer)
    before, after = tokenizer.encode(prompt), [*tokenizer.encode(completion), 2]
    assert tokens == before + after
    assert trained == [False] * len(before) + [True] * len(after)


@quick
@given(conversation=conversations)
def test_only_the_assistants_words_and_what_closes_them_are_trained(
    tokenizer: Tokenizer, conversation: list[dict[str, str]]
) -> None:
    everything, learnt = strings(encode_row({"messages": conversation}, tokenizer), tokenizer)
    assert everything == tokenizer.chat(conversation, False)
    assert learnt == "".join(m["content"] + STOP for m in conversation if m["role"] == "assistant")


@quick
@given(prompt=conversations, completion=conversations)
def test_of_conversational_completions_only_the_completion_is_trained(
    tokenizer: Tokenizer, prompt: list[dict[str, str]], completion: list[dict[str, str]]
) -> None:
    row = {"prompt": prompt, "completion": completion}
    everything, learnt = strings(encode_row(row, tokenizer), tokenizer)
    assert everything == tokenizer.chat(prompt + completion, False)
    assert learnt == "".join(m["content"] + STOP for m in completion if m["role"] == "assistant")


def test_a_turn_without_a_closing_token_is_trained_to_its_end(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=plain + prompt))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    assert strings(encode_row(row, tokenizer), tokenizer) == ("user: hi\n\nassistant: yes\n\n", " yes\n\n")


@quick
@given(text=texts, completion=texts)
def test_bos_comes_first_untrained_and_never_twice(with_bos: Tokenizer, text: str, completion: str) -> None:
    rows: list[Row] = [
        {"text": text},
        {"text": START + text},
        {"prompt": text, "completion": completion},
        {"prompt": START + text, "completion": completion},
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": completion}]},
        {"document": text},
    ]
    for row in rows:
        example = encode_row(row, with_bos)
        assert example.tokens[0] == 1 and example.tokens[1:2] != [1]
        assert len(example.tokens) == len(example.trained)
    assert encode_row(rows[0], with_bos).tokens == encode_row(rows[1], with_bos).tokens
    assert encode_row(rows[2], with_bos) == encode_row(rows[3], with_bos)
    assert encode_row(rows[0], with_bos).trained[0] is False


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"question": "a", "answer": "b"},
        {"prompt": "a"},
        {"text": 3},
        {"text": "a", "messages": []},
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": "a"},
        {"messages": [{"role": "user"}]},
    ],
)
def test_a_row_of_no_known_shape_is_told_its_keys_and_the_shapes(tokenizer: Tokenizer, row: Row) -> None:
    with pytest.raises(ValueError, match='"completion"') as error:
        encode_row(row, tokenizer)
    assert str(sorted(row)) in str(error.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    last_only = "{{ messages[-1].content }}"
    rewriting = Tokenizer.load(write_tokenizer(tmp_path, chat_template=last_only))
    talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    with pytest.raises(ValueError, match="row 1: message 2, an assistant's turn"):
        encode_rows([{"messages": talk}], rewriting, 100)
    with pytest.raises(ValueError, match="Begin with a system or user message"):  # the default system message
        encode_row({"messages": talk[1:]}, tokenizer)


# Data sets.


def test_rows_that_do_not_fit_are_left_out_and_named(tokenizer: Tokenizer) -> None:
    rows: list[Row] = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a" * 200, "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]},
    ]
    encoded = encode_rows(rows, tokenizer, 16)
    assert [*encoded.examples] == [encode_row(rows[0], tokenizer)]
    assert ([*encoded.too_long], [*encoded.unlabelled]) == ([2], [3])
    assert left_out(encoded, 16) == "1 longer than --max-length 16 (row 2), 1 with nothing to train (row 3)"
    with pytest.raises(ValueError, match=r"none of 2 rows is left: 1 longer .*Raise --max-length"):
        encode_rows(rows[1:], tokenizer, 16)
    with pytest.raises(ValueError, match="1 with nothing to train"):  # a lone EOS: nothing precedes it
        encode_rows([{"text": ""}], tokenizer, 16)
    assert not encode_rows([], tokenizer, 16).examples


@quick
@given(text=texts, length=st.integers(2, 9))
def test_a_documents_windows_predict_each_token_once(tokenizer: Tokenizer, text: str, length: int) -> None:
    text = "It is. " + text
    windows = encode_rows([{"document": text}], tokenizer, length).examples
    assert all(2 <= len(window.tokens) <= length and all(window.trained) for window in windows)
    predicted = [token for window in windows for token in window.tokens[1:]]
    assert windows[0].tokens[:1] + predicted == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', r"a\.jsonl, line 3: not valid JSON .* column 10"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2: a list, not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "a", "completion": "b"}', r"a\.jsonl, line 2: this row is"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "a"}', r"a\.jsonl, line 2: the keys \['txt'\] fit no shape"),
        (
            "a.json",
            '[{"text": "a"},\n{"text": 1}]',
            r"a\.json, row 2: the values have .*, for text is a number",
        ),
        ("a.json", '[{"text": "a"},\n{"text": }]', r"a\.json: not valid JSON .*line 2, column 10"),
        ("a.json", '{"text": "a"}', r"a\.json: must hold a JSON list"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.jsonl", "\n", r"a\.jsonl is empty"),
        ("a.csv", "text", r"a\.csv: data must be"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_unusual_but_valid_files_are_read(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b", "source": "kept, not used"}, {"text": "é"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [*read_rows(tmp_path / "a.jsonl")] == read_rows(tmp_path / "a.json") == rows
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: not UTF-8 text \(0xff, byte 1"):
        read_rows(tmp_path / "b.jsonl")
    with pytest.raises(FileNotFoundError, match=r"c\.jsonl"):
        read_rows(tmp_path / "c.jsonl")


@quick
@given(count=st.integers(2, 60), seed=st.integers(0, 2**32), share=st.floats(0, 0.99))
def test_one_file_is_split_by_the_seed_without_loss(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, share: float
) -> None:
    file = tmp_path_factory.mktemp("data") / "all.jsonl"
    file.write_text("\n".join(json.dumps({"text": str(i)}) for i in range(count)))
    train, valid, test = map(list, load_dataset(file, seed, share))
    assert sorted(int(row["text"]) for row in train + valid) == list(range(count))
    assert train and bool(valid) == (share > 0) and test == []
    assert [*map(list, load_dataset(file, seed, share))] == [train, valid, test]


def test_at_most_500_rows_are_held_out_and_a_single_row_cannot_be_split(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text('{"text": "a"}\n' * 6000)
    assert len(load_dataset(file, 0).valid) == 500
    file.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"all\.jsonl has a single row"):
        load_dataset(file, 0)


def test_the_end_of_a_text_file_is_held_out_from_a_line_break_on(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    train, valid, _ = load_dataset(file, 0)
    assert train[0]["document"] + valid[0]["document"] == file.read_text()
    assert valid[0]["document"] == "".join(f"line {i}\n" for i in range(91, 100))
    file.write_text("x" * 100)
    assert len(load_dataset(file, 0).valid[0]["document"]) == 10


def test_a_folder_gives_its_parts_under_their_usual_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training data"):
        load_dataset(tmp_path, 0)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    assert [*map(list, load_dataset(tmp_path, 0))] == [[{"text": "a"}], [], []]
    (tmp_path / "dev.jsonl").write_text('{"text": "b"}')
    (tmp_path / "test.txt").write_text("c")
    assert [*map(list, load_dataset(tmp_path, 0))] == [[{"text": "a"}], [{"text": "b"}], [{"document": "c"}]]
    (tmp_path / "valid.jsonl").write_text('{"text": "b"}')
    with pytest.raises(ValueError, match=r"valid\.jsonl and dev\.jsonl"):
        load_dataset(tmp_path, 0)


# Batches.


def label_pairs(batch: Batch) -> Counter[tuple[int, int, int]]:
    """Every labelled position as (position, token, label)."""
    at = batch.labels != IGNORE
    columns = (array[at].tolist() for array in (batch.positions, batch.tokens, batch.labels))
    return Counter(zip(*columns, strict=True))


def test_labels_are_the_next_token_of_the_same_example() -> None:
    first, second = Example([5, 6, 7], [True, False, True]), Example([8, 9], [True, True])
    batch = collate([[first, second], [second]], pad_id=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 7, IGNORE, 9, IGNORE], [9] + [IGNORE] * 4]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert all(array.dtype == np.int64 for array in batch)
    assert pad([second, first], 0, left=True).tokens.tolist() == [[0, 8, 9], [5, 6, 7]]


@quick
@given(data=st.lists(examples, min_size=1, max_size=12), pad_id=st.integers(0, 300), extra=st.integers(0, 20))
def test_packing_and_padding_on_either_side_hold_the_same_labels(data: list[Example], pad_id: int, extra: int) -> None:
    lengths = [len(e.tokens) for e in data]
    rows = pack(lengths, max(lengths) + extra)
    packed = collate([[data[i] for i in row] for row in rows], pad_id)
    expected = Counter(
        (t, e.tokens[t], e.tokens[t + 1]) for e in data for t in range(len(e.tokens) - 1) if e.trained[t + 1]
    )
    for batch in (packed, pad(data, pad_id), pad(data, pad_id, left=True)):
        assert label_pairs(batch) == expected
        assert count_labels(batch) == expected.total()
        assert np.count_nonzero(batch.segments) == sum(len(e.tokens) for e in data)
        assert (batch.tokens[batch.segments == 0] == pad_id).all()
        assert (batch.labels[batch.segments == 0] == IGNORE).all()


@quick
@given(data=st.lists(examples, max_size=30), extra=st.integers(0, 20))
def test_packing_places_each_example_once_in_the_first_row_it_fits(data: list[Example], extra: int) -> None:
    length = 12 + extra
    rows = pack([len(e.tokens) for e in data], length)
    assert sorted(i for row in rows for i in row) == list(range(len(data)))
    for r, row in enumerate(rows):
        assert sum(len(data[i].tokens) for i in row) <= length
        for i in row:
            for earlier in rows[:r]:
                before = sum(len(data[j].tokens) for j in earlier if j < i)
                assert before + len(data[i].tokens) > length


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(ValueError, match="example 0 has 3 tokens"):
        pack([3], 2)
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)
