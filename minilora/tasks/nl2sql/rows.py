"""Natural language to SQL: the default fine-tuning task, generated from a small grammar.

A :class:`Query` is drawn at random, then written out twice: in English by :func:`ask` and in SQL
by :func:`to_sql`. Validation and test rows use table names, column names, text values and
sentence patterns that no training row uses, so a good score cannot come from memory.
"""

import random
import zlib
from dataclasses import dataclass

from minilora.tasks.nl2sql import words
from minilora.tasks.nl2sql.phrasings import (
    AGGREGATE_CUES,
    COMPARISON_CUES,
    DISTINCT_CUES,
    HELD_OUT,
    ORDER_CUES,
    TRAINING,
    Phrasings,
)
from minilora.tasks.nl2sql.pseudo_words import pseudo_word


@dataclass(frozen=True)
class Names:
    """The names and text values that tables are made of."""

    tables: tuple[str, ...]
    text_columns: tuple[str, ...]
    number_columns: tuple[str, ...]
    values: tuple[str, ...]


TRAINING_NAMES = Names(words.TABLES, words.TEXT_COLUMNS, words.NUMBER_COLUMNS, words.VALUES)
HELD_OUT_NAMES = Names(
    words.HELD_OUT_TABLES, words.HELD_OUT_TEXT_COLUMNS, words.HELD_OUT_NUMBER_COLUMNS, words.HELD_OUT_VALUES
)


@dataclass(frozen=True)
class Condition:
    """One comparison of a WHERE clause; a text value is a str and a number an int."""

    column: str
    operator: str
    value: str | int


@dataclass(frozen=True)
class Query:
    """One question about one table, before it is put into any language."""

    pattern: str  # which phrasings ask it
    table: str
    schema: tuple[str, ...]
    select: tuple[str, ...] = ()
    aggregate: str = ""
    conditions: tuple[Condition, ...] = ()
    group: str = ""
    order: str = ""
    descending: bool = False
    limit: int = 0


# form: (pattern, columns selected, conditions)
FORMS = {
    "one column": ("column", 1, 0),
    "two columns": ("column", 2, 0),
    "one column, condition": ("column", 1, 1),
    "two columns, condition": ("column", 2, 1),
    "one column, two conditions": ("column", 1, 2),
    "distinct": ("distinct", 1, 0),
    "distinct, condition": ("distinct", 1, 1),
    "count": ("count", 0, 0),
    "count, condition": ("count", 0, 1),
    "count, two conditions": ("count", 0, 2),
    "aggregate": ("aggregate", 1, 0),
    "aggregate, condition": ("aggregate", 1, 1),
    "sorted": ("sorted", 1, 0),
    "top": ("top", 1, 0),
    "group and count": ("group_count", 0, 0),
    "group and aggregate": ("group_aggregate", 1, 0),
}
_FORM_NAMES = tuple(FORMS)


def training_names(rng: random.Random) -> Names:
    """The names of one training row: half of the time rare or made-up ones, so that they have to be copied."""
    if rng.random() < 0.5:
        return TRAINING_NAMES

    def name() -> str:
        return pseudo_word(rng) if rng.random() < 0.5 else rng.choice(words.THINGS)

    firsts, seconds = [name() for _ in range(3)], [name() for _ in range(3)]
    pairs = [f"{first}_{second}" for first in firsts for second in seconds]  # these are easily mixed up
    columns = list(dict.fromkeys([*(name() for _ in range(5)), *pairs]))
    rng.shuffle(columns)
    values = [rng.choice(words.VALUES), rng.choice(words.PEOPLE), pseudo_word(rng).capitalize(), name()]
    return Names((name() + "s",), tuple(columns[::2]), tuple(columns[1::2]), tuple(values))


def draw_query(rng: random.Random, names: Names, form: str = "") -> Query:
    """Draw a table and a query on it, of the given form or of any."""
    pattern, selected, conditions = FORMS[form or rng.choice(_FORM_NAMES)]
    size = rng.randint(3, 5)
    texts = rng.randint(1, size - 1)
    text = rng.sample(names.text_columns, texts)
    numbers = rng.sample(names.number_columns, size - texts)
    schema = text + numbers
    rng.shuffle(schema)
    table = rng.choice(names.tables)

    group = text[0] if pattern.startswith("group") else ""
    order = numbers[0] if pattern in ("sorted", "top") else ""
    aggregate = "COUNT" if "count" in pattern else ""
    if "aggregate" in pattern:
        aggregate, select = rng.choice(tuple(AGGREGATE_CUES)), [numbers[0]]
    else:
        select = rng.sample([c for c in schema if c != order], selected)
    free = [c for c in schema if c not in select]
    where = tuple(_draw_condition(rng, names, c, c in text) for c in rng.sample(free, conditions))
    return Query(
        pattern, table, tuple(schema), tuple(select), aggregate, where, group, order,
        descending=bool(order) and rng.random() < 0.5,
        limit=rng.randint(2, 20) if pattern == "top" else 0,
    )  # fmt: skip


def _draw_condition(rng: random.Random, names: Names, column: str, is_text: bool) -> Condition:
    if is_text:
        return Condition(column, "=", rng.choice(names.values))
    return Condition(column, rng.choice("=><"), rng.randint(1, 10 ** rng.randint(1, 4)))


def to_sql(query: Query) -> str:
    """Write the query in SQL."""
    target = ", ".join(query.select)
    if query.aggregate:
        target = f"{query.aggregate}({target or '*'})"
    if query.group:
        target = f"{query.group}, {target}"
    if query.pattern == "distinct":
        target = f"DISTINCT {target}"
    sql = f"SELECT {target} FROM {query.table}"
    if query.conditions:
        quoted = ((c, f"'{c.value}'" if isinstance(c.value, str) else c.value) for c in query.conditions)
        sql += " WHERE " + " AND ".join(f"{c.column} {c.operator} {value}" for c, value in quoted)
    if query.group:
        sql += f" GROUP BY {query.group}"
    if query.order:
        sql += f" ORDER BY {query.order} {'DESC' if query.descending else 'ASC'}"
    if query.limit:
        sql += f" LIMIT {query.limit}"
    return sql


def ask(query: Query, phrasings: Phrasings, rng: random.Random) -> str:
    """Ask for the query in English, in one of the ways that the phrasings allow."""
    things = query.table
    if query.conditions:
        lead, equality, comparison = rng.choice(phrasings.conditions)
        stated = [_state(c, equality, comparison, rng) for c in query.conditions]
        things = f"{things} {lead} {' and '.join(stated)}"

    slots = {
        "t": things,
        "a": " and ".join(map(_spoken, query.select)),
        "d": rng.choice(DISTINCT_CUES),
        "n": _spoken(query.order),
        "g": _spoken(query.group),
        "k": str(query.limit),
    }
    if query.order:
        direction, most, least, top = rng.choice(ORDER_CUES["descending" if query.descending else "ascending"])
        slots |= {"direction": direction, "most": most, "least": least, "top": top}
        slots["order"] = rng.choice(phrasings.orders).format_map(slots)
    if query.aggregate in AGGREGATE_CUES:
        cue = rng.choice(AGGREGATE_CUES[query.aggregate])
        shape = "{cue} of the {n}" if cue == "sum" else rng.choice(phrasings.aggregates)
        slots["agg"] = shape.format(cue=cue, n=slots["a"])

    if rng.random() < 0.5:
        return rng.choice(phrasings.sentences[query.pattern]).format_map(slots)
    request = rng.choice(phrasings.requests[query.pattern]).format_map(slots)
    return rng.choice(phrasings.openers).format(x=request)


def _state(condition: Condition, equality: str, comparison: str, rng: random.Random) -> str:
    shape, cue = equality, ""
    if condition.operator != "=":
        shape, cue = comparison, rng.choice(COMPARISON_CUES[condition.operator])
    return shape.format(c=_spoken(condition.column), v=condition.value, op=cue)


def _spoken(column: str) -> str:
    return column.replace("_", " ")


def nl2sql_rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return ``count`` different rows of the "train", "valid" or "test" split.

    The validation and test splits draw from the same held-out names and phrasings; a checksum of
    the prompt decides which of the two a row belongs to, so they never share a row.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"unknown split {split!r}: use 'train', 'valid' or 'test'")
    phrasings = TRAINING if split == "train" else HELD_OUT
    rng = random.Random(f"nl2sql {split} {seed}")
    rows: dict[str, str] = {}
    while len(rows) < count:
        query = draw_query(rng, training_names(rng) if split == "train" else HELD_OUT_NAMES)
        question = ask(query, phrasings, rng)
        prompt = f"Table: {query.table} ({', '.join(query.schema)})\nQuestion: {question}\nSQL:"
        if split != "train" and (zlib.crc32(prompt.encode()) % 2 == 0) != (split == "valid"):
            continue
        rows[prompt] = f" {to_sql(query)}"
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]
