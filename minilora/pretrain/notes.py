"""Requests rewritten as terse notes, in formats that are made up afresh for every document.

Each document shows one format on several requests, so the way to predict it is to read the
request, to copy its names, and to follow the format seen so far. That is the skill that a
fine-tuned model later needs for one particular format, which no document here shows.
"""

import random
from pathlib import Path

from minilora.tasks.nl2sql import words
from minilora.tasks.nl2sql.phrasings import TRAINING
from minilora.tasks.nl2sql.pseudo_words import pseudo_word
from minilora.tasks.nl2sql.rows import Names, Query, ask, draw_query
from minilora.tasks.tables import read_table

# A repeated entry is drawn more often. The functions are spelled out, because even the short names of SQL functions are
# left for fine-tuning to teach.
_TABLES = read_table(Path(__file__).with_name("notes.json"))
_REPEATED_FORMS = ("one column, condition", "aggregate", "count, condition", "sorted")


class NoteFormat:
    """A randomly invented way to write a query down; one instance writes all its notes alike."""

    def __init__(self, rng: random.Random) -> None:
        case = rng.choice((str.lower, str.lower, str.upper, str.capitalize))
        made_up = rng.random() < 0.2
        labels = _TABLES["labels"]
        self.labels = {part: case(pseudo_word(rng) if made_up else rng.choice(labels[part])) for part in labels}
        self.functions = {name: case(rng.choice(names)) for name, names in _TABLES["functions"].items()}
        self.directions = [case(word) for word in rng.choice(_TABLES["directions"])]
        self.distinct = case(rng.choice(("unique", "different", "each one", "no repeats")))
        self.comparisons = dict(zip("=><", rng.choice(_TABLES["comparisons"]), strict=True))
        self.quote = rng.choice(("'{}'", "'{}'", "'{}'", "'{}'", '"{}"', "{}", "<{}>"))
        self.column = rng.choice(("{}", "{}", "{}", "{}", "`{}`", "[{}]"))
        self.spoken = rng.random() < 0.15
        self.call = rng.choice(_TABLES["calls"])
        self.both = rng.choice((" and ", " & ", " + ", "; ", ", "))
        self.comma = rng.choice((", ", ", ", ", ", " and ", " + ", "/"))
        self.part = rng.choice(_TABLES["parts"])
        self.separator: str = rng.choice(_TABLES["separators"])
        self.end = rng.choice(("", "", "", ".", ";"))
        self.parts = list(labels)
        if rng.random() < 0.6:
            rng.shuffle(self.parts)

    def _name(self, column: str) -> str:
        return self.column.format(column.replace("_", " ") if self.spoken else column)

    def write(self, query: Query) -> str:
        """Write the query as one note in this format, with the space or line break that starts it."""
        pieces = {"table": query.table, "target": self.comma.join(map(self._name, query.select))}
        if query.aggregate:
            function = self.functions[query.aggregate]
            inner = pieces["target"] or "all"
            pieces["target"] = self.call.format(f=function, c=inner)
        if query.pattern == "distinct":
            pieces["target"] = f"{self.distinct} {pieces['target']}"
        if query.conditions:
            pieces["conditions"] = self.both.join(
                f"{self._name(c.column)} {self.comparisons[c.operator]} "
                + (self.quote.format(c.value) if isinstance(c.value, str) else str(c.value))
                for c in query.conditions
            )
        if query.group:
            pieces["group"] = self._name(query.group)
        if query.order:
            pieces["order"] = f"{self._name(query.order)} {self.directions[query.descending]}"
        if query.limit:
            pieces["limit"] = str(query.limit)
        written = (self.part.format(label=self.labels[p], x=pieces[p]) for p in self.parts if p in pieces)
        start = self.separator if self.separator.startswith("\n") else " "
        return start + self.separator.join(written) + self.end


def fresh_names(rng: random.Random) -> Names:
    """Return a small set of names and values: known words, pseudo-words, and pairs of both.

    Words of the SQL task's held-out part are among them, as a base model knows the words of a task before it is taught
    the task; its held-out phrasings are not.
    """

    def mixed(known: tuple[str, ...], count: int) -> tuple[str, ...]:
        made = [pseudo_word(rng) for _ in range(count // 2)]
        return (*rng.sample(known, count), *made)

    def columns(known: tuple[str, ...]) -> tuple[str, ...]:
        pool = mixed(known, 4) + mixed(words.THINGS, 2)
        firsts, seconds = rng.sample((*words.ADJECTIVES, *pool), 2), rng.sample((*words.THINGS, *pool), 3)
        pairs = (f"{first}_{second}" for first in firsts for second in seconds)  # these are easily mixed up
        return tuple(dict.fromkeys((*pool, *pairs, f"{pseudo_word(rng)}_{pseudo_word(rng)}")))

    text = columns(words.TEXT_COLUMNS + words.HELD_OUT_TEXT_COLUMNS)
    values = mixed(words.VALUES + words.HELD_OUT_VALUES, 8)
    return Names(
        (*mixed(words.TABLES + words.HELD_OUT_TABLES, 4), pseudo_word(rng) + "s"),
        text,
        tuple(column for column in columns(words.NUMBER_COLUMNS + words.HELD_OUT_NUMBER_COLUMNS) if column not in text),
        (*values, *(pseudo_word(rng).capitalize() for _ in range(4)), *rng.sample(words.PEOPLE, 2)),
    )


def notes(rng: random.Random) -> str:
    """Return a document of a few requests, all noted down in one new format."""
    names, written = fresh_names(rng), NoteFormat(rng)
    table, request, note = rng.choice(_TABLES["headings"])
    form = rng.choice(_REPEATED_FORMS) if rng.random() < 0.15 else ""
    schema = rng.choice(_TABLES["shapes"])
    gap = rng.choice(("\n", "\n\n"))
    lines: list[str] = []
    length = rng.randint(300, 700)
    while length > 0:
        query = draw_query(rng, names, form)
        things = schema.format(query.table, ", ".join(query.schema))
        text = f"{table}: {things}\n{request}: {ask(query, TRAINING, rng)}\n{note}:{written.write(query)}"
        lines.append(text)
        length -= len(text)
    return gap.join(lines)
