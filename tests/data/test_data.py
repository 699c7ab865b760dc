"""What a user sees of a data set before training: keys renamed, figures, and the first batch token by token."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_tokenizer import CHAT_TEMPLATES, STOP, write_tokenizer

from minilora import evaluate, train
from minilora.data.batches import collate, of_like_length, padding_share, row_length
from minilora.data.conversations import TRAIN_ON
from minilora.data.datasets import load_dataset, read_rows
from minilora.data.examples import Encoded, encode_row
from minilora.data.report import figures, report
from minilora.data.rows import Place
from minilora.data.show import show_batch
from minilora.data.store import Example, Examples
from minilora.data.tokenizer import Tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.model.config import Config
from minilora.ops.cross_entropy import IGNORE
from minilora.runs.settings import Settings
from minilora.runs.task import load_task
from minilora.training.order import Order

ROW = Place("", "row", 1)
QUESTIONS = [("Two plus two?", " It is four."), ("How are you?", " I am\nwell, thank you."), ("Wer?", " Käse 🧀")] * 4
PAIRS = [{"prompt": f"{i} {q}", "completion": a} for i, (q, a) in enumerate(QUESTIONS)]
CHATS = [
    [
        {"role": "user", "content": pair["prompt"]},
        {"role": "assistant", "content": "hm"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": pair["completion"]},
    ]
    for pair in PAIRS
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be loaded; what it computes does not matter here."""
    folder = tmp_path_factory.mktemp("model")
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    write_checkpoint(folder, raw, random_weights(Config.from_dict(raw), seed=0))
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- Keys of other names ---


def test_keys_of_other_names_are_read_as_the_usual_ones_and_other_columns_left(tmp_path: Path) -> None:
    rows = [{"question": p["prompt"], "answer": p["completion"], "text": "not meant", "id": 3} for p in PAIRS]
    path = write_rows(tmp_path / "qa.jsonl", rows)
    assert [*read_rows(path, {"prompt": "question", "completion": "answer"})] == PAIRS
    assert [*read_rows(path, {"text": "question"})] == [{"text": pair["prompt"]} for pair in PAIRS]
    with pytest.raises(ValueError, match=r"qa\.jsonl, line 1: the row has no key 'completion', .*--completion-feature"):
        read_rows(path, {"prompt": "question"})
    talks = [{"chosen": chat, "tools": [], "chat_template_kwargs": {"a": 1}, "rejected": chat} for chat in CHATS]
    path = write_rows(tmp_path / "talks.jsonl", talks)
    kept = {"tools": [], "chat_template_kwargs": {"a": 1}}
    assert [*read_rows(path, {"messages": "chosen"})] == [{"messages": chat, **kept} for chat in CHATS]
    parts = load_dataset(path, 0, features={"messages": "chosen"})
    assert len(parts.train) + len(parts.valid) == len(CHATS) and all("messages" in row for row in parts.train)


def test_a_missing_key_is_told_with_its_line_its_flag_and_the_keys_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "qa.jsonl", [{"question": "a", "answer": "b"}, {"question": "a", "anser": "b"}])
    told = r"qa\.jsonl, line 2: the row has no key 'answer', which --completion-feature asks for; it has \['anser', 'q"
    with pytest.raises(ValueError, match=told):
        read_rows(path, {"prompt": "question", "completion": "answer"})
    with pytest.raises(ValueError, match="--prompt-feature and --text-feature name keys of different shapes"):
        read_rows(path, {"prompt": "question", "text": "answer"})
    with pytest.raises(ValueError, match=r"line 1: the keys .*--prompt-feature"):
        read_rows(path)
    (tmp_path / "book.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"book\.txt is a text, without keys: leave out --text-feature"):
        read_rows(tmp_path / "book.txt", {"text": "content"})


# --- Figures ---

lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=20)


@given(lengths=lengths, batch_size=st.integers(1, 5))
def test_the_padding_share_is_that_of_the_batches(lengths: list[list[int]], batch_size: int) -> None:
    rows = [[Example([1] * n, [True] * n) for n in row] for row in lengths]
    sizes = np.array([row_length(row) for row in rows])
    groups = of_like_length(sizes, batch_size)
    batches = [collate([rows[i] for i in group], 0) for group in groups]
    filler = sum(np.count_nonzero(batch.segments == 0) for batch in batches)
    assert math.isclose(
        padding_share(sizes[group] for group in groups),
        filler / sum(batch.tokens.size for batch in batches),
        abs_tol=1e-12,
    )


@given(data=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=9))
def test_the_figures_of_a_part_count_its_tokens_labels_and_rows(data: list[list[bool]]) -> None:
    encoded = Encoded(Examples(Example([7] * len(t), t) for t in data), {3: ROW, 9: ROW}, {4: ROW}, {"text"})
    found = figures(encoded, 0.25)
    batch = collate([[example] for example in encoded.examples], 0) if data else None
    assert found["labels"] == (np.count_nonzero(batch.labels != IGNORE) if batch else 0)
    assert found["tokens"] == (np.count_nonzero(batch.segments) if batch else 0)
    assert found["label_share"] * found["tokens"] == pytest.approx(found["labels"])
    assert (found["examples"], found["too_long"], found["unlabelled"]) == (len(data), 2, 1)
    sizes = sorted(map(len, data))
    assert (found["longest"], found["median_length"]) == ((sizes[-1], sizes[len(sizes) // 2]) if sizes else (0, 0))


def test_the_report_tells_the_figures_and_names_what_was_left_out() -> None:
    encoded = Encoded(
        Examples([Example([1, 2, 3], [False, True, True]), Example([1, 2], [False, True])]),
        {2: ROW._replace(number=2)},
        {},
        {"text"},
    )
    assert report(encoded, 16, "train", 0.25) == (
        "train: 2 examples, 5 tokens, 60% of them trained; median length 3, longest 3; 25% of its batches is padding; "
        "left out: 1 longer than --max-length 16 (row 2)"
    )
    assert "padding" not in report(encoded, 16, "train")


@pytest.mark.parametrize("packing", [False, True])
def test_the_padding_told_before_training_is_that_of_an_epoch(
    packing: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = [{"text": "so " * int(n)} for n in rng.integers(1, 60, size=400)]
    settings = Settings(data=str(write_rows(tmp_path / "rows.jsonl", rows)), batch_size=4, packing=packing)
    task = load_task(settings, tokenizer, 128)
    told = task.figures["train"]["padding_share"]
    order, groups = Order(len(task.rows)), []
    while order.epoch < 1 or order.cursor < len(task.rows):
        lengths = np.array([row_length(task.rows[i]) for i in order.take(4, rng)])
        groups += [lengths[group] for group in of_like_length(lengths, 4)]
    assert abs(told - padding_share(groups)) < 0.02
    assert (told < 0.1) == packing
    valid = [batch.segments for batch in task.valid]
    filler = sum(np.count_nonzero(segments == 0) for segments in valid) / sum(segments.size for segments in valid)
    assert task.figures["valid"]["padding_share"] == pytest.approx(filler)
    assert f"{told:.0%} of its batches is padding" in task.report[0]


# --- The first batch, shown ---


def shown_examples(lines: Sequence[str]) -> list[list[tuple[int, str, bool]]]:
    """Read back what was printed: of each example its tokens, as (position, text, trained)."""
    examples: list[list[tuple[int, str, bool]]] = []
    for line in lines:
        if line.startswith("  segment"):
            examples.append([])
        elif match := re.fullmatch(r" +(\d+)  (.*)", line):
            position, trained = int(match[1]), False
            for piece in match[2].split("│"):
                trained = trained or piece.startswith("⟦")
                examples[-1].append((position, piece.strip("⟦⟧").replace("\\n", "\n"), trained))
                trained = trained and not piece.endswith("⟧")
                position += 1
    return examples


def show(capsys: pytest.CaptureFixture[str], model: Path, *flags: object) -> list[str]:
    assert train.main(["--model", str(model), "--show-batch", *map(str, flags)]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_shown_batch_marks_the_very_tokens_that_train(tokenizer: Tokenizer) -> None:
    first, second = Example([40, 41, 42, 43], [True, False, True, True]), Example([44, 45], [False, True])
    batch = collate([[first, second], [second]], pad_id=2)
    texts = [tokenizer.piece(token) for token in range(50)]
    assert list(show_batch(batch, tokenizer)) == [
        "row 1",
        "  segment 1: 4 tokens, 2 trained",
        f"       0  {texts[40]}│{texts[41]}│⟦{texts[42]}│{texts[43]}⟧",
        "  segment 2: 2 tokens, 1 trained",
        f"       0  {texts[44]}│⟦{texts[45]}⟧",
        "row 2, 4 of its 6 places padding",
        "  segment 1: 2 tokens, 1 trained",
        f"       0  {texts[44]}│⟦{texts[45]}⟧",
        "⟦trained⟧: 4 of 8 tokens; 33% of the batch is padding",
    ]
    colored = list(show_batch(batch, tokenizer, color=True))
    assert colored[4] == f"       0  {texts[44]}│\033[7m{texts[45]}\033[0m"


def test_a_token_that_is_no_whole_character_is_shown_by_its_name(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🧀\t")
    names = [tokenizer.backend.id_to_token(token) for token in ids[:-1]]
    *_, line, _ = show_batch(collate([[Example(ids, [False] * len(ids))]], 0), tokenizer)
    assert line == "       0  " + "│".join([*names, "\\t"]) and len(names) == 4


@pytest.mark.parametrize("packing", [(), ("--packing",)])
@pytest.mark.parametrize("part", TRAIN_ON)
@pytest.mark.parametrize("shape", ["chats", "chat pairs", "pairs", "texts"])
def test_what_is_shown_as_trained_is_what_should_train_for_every_shape_packed_or_not(
    shape: str, part: str, packing: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "chats": [{"messages": chat} for chat in CHATS],
        "chat pairs": [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS],
        "pairs": PAIRS,
        "texts": [{"text": pair["prompt"] + pair["completion"]} for pair in PAIRS],
    }
    path = write_rows(
        tmp_path / "rows.jsonl", [row for row in rows[shape] if "Käse" not in json.dumps(row, ensure_ascii=False)]
    )
    before = sorted(tmp_path.iterdir())
    lines = show(
        capsys, model, "--data", path, "--train-on", part, "--batch-size", 3, "--out", tmp_path / "run", *packing
    )
    assert sorted(tmp_path.iterdir()) == before, "it only shows"
    examples = shown_examples(lines)
    assert len(examples) > 3 if packing else len(examples) == 3
    tokenizer = Tokenizer.load(model)
    for example in examples:
        assert [position for position, _, _ in example] == list(range(len(example)))
        text = "".join(piece for _, piece, _ in example)
        (pair,) = [pair for pair in PAIRS if re.search(rf"(?<!\d){re.escape(pair['prompt'])}", text)]
        marked = [(piece, trained) for _, piece, trained in example]
        learnt = "".join(piece for piece, trained in marked if trained)
        whole = "".join(piece for piece, _ in marked[1:])
        expected = {
            "chats": "hm" + STOP + pair["completion"] + STOP,
            "chat pairs": "hm" + STOP + pair["completion"] + STOP,
            "pairs": pair["completion"] + STOP,
            "texts": whole,
        }[shape]
        if part == "last-turn" and "chat" in shape:
            expected = pair["completion"] + STOP
        assert learnt == (whole if part == "everything" else expected)
        assert len(example) == len(tokenizer.encode(text))


def test_the_batch_that_is_shown_is_the_first_that_trains(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    flags = ("--data", data, "--batch-size", 4, "--seed", 3)
    *_, last = show(capsys, model, *flags)
    out = str(tmp_path / "run")
    assert train.main(["--model", str(model), "--out", out, "--steps", "2", "--eval-rows", "0", *map(str, flags)]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert last.startswith(f"⟦trained⟧: {metrics[0]['labelled_tokens']} of {metrics[0]['tokens']} tokens")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"].keys() == {"train", "valid"} and summary["data"]["train"]["examples"] == 11
    capsys.readouterr()
    assert train.main(["--resume", out, "--show-batch"]) == 0
    assert "⟦trained⟧" in capsys.readouterr().out


# --- As flags ---


def test_features_and_masks_are_flags_of_training_and_of_evaluation(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    path = write_rows(tmp_path / "qa.jsonl", [{"question": p["prompt"], "answer": p["completion"]} for p in PAIRS])
    renamed = ("--data", path, "--prompt-feature", "question", "--completion-feature", "answer")
    assert show(capsys, model, *renamed) == show(capsys, model, "--data", usual)
    assert train.main(["--model", str(model), "--show-batch", *map(str, renamed[:-1]), "anser"]) == 2
    assert "no key 'anser', which --completion-feature asks for" in capsys.readouterr().err
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    for flags, same in (
        (("--mask-prompt",), "last-turn"),
        (("--mask_prompt", "false"), "everything"),
        (("--assistant_only_loss", "True"), "all-turns"),
        (("--completion_only_loss", "false"), "everything"),
    ):
        assert show(capsys, model, "--data", chats, *flags) == show(capsys, model, "--data", chats, "--train-on", same)

    def measured(*flags: object) -> dict[str, Any]:
        assert evaluate.main(["--model", str(model), "--json", "--eval-rows", "1", *map(str, flags)]) == 0
        figures: dict[str, Any] = json.loads(capsys.readouterr().out)
        return figures

    assert measured(*renamed) == measured("--data", usual)
    assert measured("--data", usual)["loss"] != measured("--data", usual, "--train-on", "everything")["loss"]


def test_a_run_keeps_the_day_that_its_chat_template_was_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES["smollm3"])
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    flags = [
        "--model",
        str(folder),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--max-length",
        "512",
    ]
    assert train.main([*flags, "--date", "2024-02-29"]) == 0
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--show-batch"]) == 0
    shown = "".join(
        piece for example in shown_examples(capsys.readouterr().out.splitlines()) for _, piece, _ in example
    )
    assert "Today Date: 29 February 2024" in shown
    assert train.main([*flags, "--date", "tomorrow"]) == 2
    assert "--date 'tomorrow'" in capsys.readouterr().err


def test_figures_are_kept_of_each_part(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "a" * 200, "completion": "b"}])
    task = load_task(Settings(data=str(data)), tokenizer, 64)
    examples = [encode_row(row, tokenizer) for row in PAIRS]
    total = sum(part["tokens"] for part in task.figures.values())
    assert total == sum(len(example.tokens) for example in examples)
    assert sum(part["too_long"] for part in task.figures.values()) == 1
