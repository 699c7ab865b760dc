"""The nl2sql task: deterministic, really held out, unambiguous to run, and complete in its forms."""

import random
import re
import sqlite3

import pytest

from minilora.tasks.nl2sql.phrasings import HELD_OUT, TRAINING, Phrasings
from minilora.tasks.nl2sql.rows import (
    FORMS,
    HELD_OUT_NAMES,
    TRAINING_NAMES,
    Condition,
    Query,
    ask,
    draw_query,
    nl2sql_rows,
    to_sql,
)

SPLITS = ("train", "valid", "test")
ROWS = {split: nl2sql_rows(split, 1500, seed=3) for split in SPLITS}
PROMPT = re.compile(r"Table: (\w+) \(([\w, ]+)\)\nQuestion: (.+[.?])\nSQL:")


def parse(row: dict[str, str]) -> tuple[str, list[str], str]:
    match = PROMPT.fullmatch(row["prompt"])
    assert match, row["prompt"]
    return match[1], match[2].split(", "), match[3]


def skeleton(row: dict[str, str]) -> str:
    """The question with every name and value blanked out: the phrasing that it is an instance of."""
    table, columns, question = parse(row)
    for value in re.findall(r"'([^']*)'", row["completion"]):
        question = re.sub(rf"\b{value}\b", "V", question)
    for name in sorted([*columns, table], key=len, reverse=True):
        question = re.sub(rf"\b{name.replace('_', ' ')}\b", "N", question)
    return re.sub(r"\d+", "V", question)


def clauses(sql: str) -> str:
    """The shape of a statement: its keywords and commas without names and values."""
    kept = r"'[^']*'|[A-Z]+\b|[*,]|\w+"
    return " ".join(t for t in re.findall(kept, sql) if re.fullmatch(r"[A-Z]{2,}|[*,]", t))


def patterns(phrasings: Phrasings) -> set[str]:
    groups = (*phrasings.requests.values(), *phrasings.sentences.values())
    return set(phrasings.openers).union(*groups)


def cue_words(phrasings: Phrasings) -> set[str]:
    text = " ".join((*patterns(phrasings), *phrasings.orders, *phrasings.aggregates))
    text += " ".join(" ".join(condition) for condition in phrasings.conditions)
    return set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text).lower()))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    for split in SPLITS:
        assert nl2sql_rows(split, 50, seed=3) == nl2sql_rows(split, 50, seed=3) == ROWS[split][:50]
        assert nl2sql_rows(split, 50, seed=4) != ROWS[split][:50]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        nl2sql_rows("validation", 1)


def test_no_row_occurs_twice() -> None:
    prompts = [row["prompt"] for split in SPLITS for row in ROWS[split]]
    assert len(set(prompts)) == len(prompts) == 3 * 1500


def test_valid_and_test_differ_whatever_their_seeds() -> None:
    valid = {row["prompt"] for seed in range(3) for row in nl2sql_rows("valid", 2000, seed)}
    test = {row["prompt"] for seed in range(3) for row in nl2sql_rows("test", 2000, seed)}
    assert not valid & test


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_the_documented_shape(split: str) -> None:
    for row in ROWS[split]:
        table, columns, question = parse(row)
        assert table in question and 3 <= len(columns) <= 5 and len(set(columns)) == len(columns)
        assert row["completion"].startswith(" SELECT ")
        assert row["completion"] == " " + row["completion"].strip()
        assert len(row["prompt"]) < 300


def test_the_pools_are_large_and_share_no_word() -> None:
    train, held_out = TRAINING_NAMES, HELD_OUT_NAMES
    assert len(set(train.tables)) >= 120 and len(set(held_out.tables)) >= 30
    assert len({*train.text_columns, *train.number_columns}) >= 150
    assert len({*held_out.text_columns, *held_out.number_columns}) >= 40

    def parts(pool: tuple[str, ...]) -> set[str]:
        return {part for name in pool for part in re.split("[_ ]", name.lower())}

    train_columns = parts(train.text_columns + train.number_columns)
    assert not train_columns & parts(held_out.text_columns + held_out.number_columns)
    assert not parts(train.tables) & parts(held_out.tables)
    assert not parts(train.values) & parts(held_out.values)
    assert not set(train.text_columns) & set(train.number_columns)
    assert not set(held_out.text_columns) & set(held_out.number_columns)


def test_held_out_tables_columns_and_phrasings_never_occur_in_training_rows() -> None:
    held_out = HELD_OUT_NAMES.tables + HELD_OUT_NAMES.text_columns + HELD_OUT_NAMES.number_columns
    held_out_words = {word for name in held_out for word in name.split("_")}
    for row in ROWS["train"]:
        assert held_out_words.isdisjoint(re.findall(r"[A-Za-z]+", row["prompt"].replace("_", " ")))
    trained = {skeleton(row) for row in nl2sql_rows("train", 10_000)}
    assert len(trained) > 2000
    assert trained.isdisjoint(skeleton(row) for split in ("valid", "test") for row in ROWS[split])


def test_held_out_phrasings_are_new_arrangements_of_known_words() -> None:
    assert patterns(TRAINING).isdisjoint(patterns(HELD_OUT))
    assert set(TRAINING.conditions).isdisjoint(HELD_OUT.conditions)
    assert cue_words(HELD_OUT) <= cue_words(TRAINING)
    for pattern, _, _ in FORMS.values():
        assert len(TRAINING.requests[pattern]) + len(TRAINING.sentences[pattern]) >= 10
        assert len(HELD_OUT.requests[pattern]) >= 3 and len(HELD_OUT.sentences[pattern]) >= 3


@pytest.mark.parametrize("split", SPLITS)
def test_every_statement_runs(split: str) -> None:
    for row in ROWS[split]:
        table, columns, _ = parse(row)
        with sqlite3.connect(":memory:") as database:
            database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
            places = ", ".join("?" * len(columns))
            database.execute(f"INSERT INTO {table} VALUES ({places})", tuple(range(len(columns))))
            database.execute(row["completion"]).fetchall()
        database.close()


@pytest.mark.parametrize("split", SPLITS)
def test_every_form_occurs(split: str) -> None:
    shapes = {clauses(row["completion"]) for row in ROWS[split]}
    rng = random.Random(0)
    for form in FORMS:
        for _ in range(20):
            assert clauses(to_sql(draw_query(rng, TRAINING_NAMES, form))) in shapes, form


@pytest.mark.parametrize("split", SPLITS)
def test_the_question_decides_the_statement(split: str) -> None:
    """Blanking the names out, a skeleton of a question always goes with one shape of statement."""
    seen: dict[str, str] = {}
    for row in nl2sql_rows(split, 5000):
        shape = re.sub(r"\b(?=\w*[a-z])\w+\b", "n", re.sub(r"'[^']*'|\d+", "v", row["completion"]))
        shape = re.sub(r"\bn, n\b", "n", shape)
        key = re.sub(r"N and N\b", "N", skeleton(row))
        assert seen.setdefault(key, shape) == shape, row


def test_a_query_is_written_in_sql() -> None:
    query = Query(
        "aggregate", "birds", ("name", "wing_span", "region"), ("wing_span",), "AVG",
        (Condition("region", "=", "Norway"), Condition("age", ">", 3)),
    )  # fmt: skip
    assert to_sql(query) == "SELECT AVG(wing_span) FROM birds WHERE region = 'Norway' AND age > 3"
    question = ask(query, TRAINING, random.Random(0))
    assert all(part in question for part in ("wing span", "birds", "region", "Norway", "3"))
