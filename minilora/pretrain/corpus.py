"""The pretraining text of the small base model: installed Python sources and generated English.

The English teaches general skills rather than facts: to copy names from context, to follow a
pattern that the context shows, and to understand everyday question words. It contains no SQL.
"""

import ast
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from minilora.pretrain.notes import fresh_names, notes
from minilora.pretrain.paraphrases import paraphrases
from minilora.tasks.nl2sql import words
from minilora.tasks.nl2sql.pseudo_words import pseudo_word

MAX_DOCUMENT = 1500
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "sqlite3", "turtledemo", "ensurepip",
            "pydoc_data", "site-packages", "dist-packages", "__pycache__"}  # fmt: skip
_SQL = re.compile(r"\b(SELECT|INSERT INTO|CREATE TABLE)\b|(?i:select \* from|sqlite)")


def python_documents() -> Iterator[str]:
    """Yield language-reference topics, docstrings and sources of the standard library, in fixed order."""
    for name in sorted(pydoc_data.topics.topics):
        yield from _cut(pydoc_data.topics.topics[name])
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            yield from _cut("\n\n".join(_docstrings(source)))
            yield from _cut(source)


def _docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, dedented, each after the name of its class or function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield f"{node.name}: {docstring}"


def _cut(text: str) -> Iterator[str]:
    """Cut text at blank lines into documents of at most ``MAX_DOCUMENT`` characters."""
    document = ""
    for block in re.split(r"\n\s*\n", text):
        block = block.strip("\n")
        if len(block) > MAX_DOCUMENT or _SQL.search(block):
            continue  # a block this long is a table of data rather than prose or code
        if document and len(document) + len(block) + 2 > MAX_DOCUMENT:
            yield document
            document = ""
        document = f"{document}\n\n{block}" if document else block
    if document:
        yield document


def english_documents(seed: int) -> Iterator[str]:
    """Yield generated English paragraphs without end; a seed always gives the same stream."""
    rng = random.Random(f"english {seed}")
    generators, weights = zip(*GENERATORS, strict=True)
    while True:
        yield rng.choices(generators, weights)[0](rng)


def story(rng: random.Random) -> str:
    """Tell who has, did or likes what, and come back to some of it later."""
    people = [*rng.sample(words.PEOPLE, 3), pseudo_word(rng).capitalize()]
    rng.shuffle(people)
    facts = []
    for person in people[: rng.randint(2, 4)]:
        thing = f"{rng.choice(words.ADJECTIVES)} {_noun(rng)}"
        statement, question, answer = rng.choice(_FACTS)
        other = rng.choice([name for name in people if name != person])
        slots = {"p": person, "x": thing, "y": rng.choice(words.PLACES), "z": other}
        facts.append([pattern.format_map(slots) for pattern in (statement, question, answer)])
    text = " ".join(fact[0] for fact in facts)
    rng.shuffle(facts)
    if rng.random() < 0.5:
        return text + " " + " ".join(rng.choice(_RECALLS) + fact[2] for fact in facts)
    return text + "".join(f"\nQuestion: {fact[1]}\nAnswer: {fact[2]}" for fact in facts)


_RECALLS = ("Remember that ", "So ", "As was said, ", "It is true that ", "We heard again that ", "Indeed, ")
_FACTS = (
    ("{p} found the {x} in the {y}.", "What did {p} find in the {y}?", "{p} found the {x}."),
    ("{p} keeps the {x} near the {y}.", "Where does {p} keep the {x}?", "{p} keeps the {x} near the {y}."),
    ("The {x} of {p} was left at the {y}.", "Who left the {x} at the {y}?", "{p} left the {x}."),
    ("{p} gave {z} the {x}.", "Who gave {z} the {x}?", "{p} gave the {x} to {z}."),
    ("{p} walked to the {y} with the {x}.", "Which thing did {p} carry?", "{p} carried the {x}."),
    ("{p} would like more than one {x}.", "What would {p} like?", "{p} would like the {x}."),
    ("At the {y}, {p} sold {z} the {x}.", "Where did {p} sell the {x}?", "{p} sold the {x} at the {y}."),
)


def _noun(rng: random.Random) -> str:
    return pseudo_word(rng) if rng.random() < 0.35 else rng.choice(words.THINGS)


def _ordinal(index: int) -> str:
    return ("first", "second", "third", "fourth", "fifth", "sixth")[index]


def table_talk(rng: random.Random) -> str:
    """Describe the columns of a table in words and ask about them."""
    names = fresh_names(rng)
    text, numbers = names.text_columns, names.number_columns
    columns = [*rng.sample(text, rng.randint(1, 3)), *rng.sample(numbers, rng.randint(1, 2))]
    rng.shuffle(columns)
    table = rng.choice(names.tables)
    spoken = [column.replace("_", " ") for column in columns]
    lines = [f"{rng.choice(('Table', 'Records', 'List'))}: {table} ({', '.join(columns)})"]
    position = rng.randrange(len(columns))
    known = rng.choice(columns)
    talk = [
        f"The columns of {table} are {', '.join(spoken[:-1])} and {spoken[-1]}.",
        f"There are {len(columns)} columns in {table}.",
        f"The {_ordinal(position)} column of {table} is {spoken[position]}, written {columns[position]}.",
        f"The last column is {columns[-1]}.",
        f"Each of the {table} has its own {spoken[position]}.",
        f"The {known.replace('_', ' ')} of the {table} is kept as {known}.",
        f"Question: Which column comes first?\nAnswer: {columns[0]}",
        f"Question: How do we write {spoken[position]}?\nAnswer: {columns[position]}",
        f"Question: What are the {table} about?\nAnswer: {', '.join(columns)}",
        f"Question: Which column comes after {columns[0]}?\nAnswer: {columns[1]}",
        f"Question: Is there a column {_noun(rng)}?\nAnswer: no, only {', '.join(columns)}",
    ]
    lines += rng.sample(talk, rng.randint(3, 7))
    return "\n".join(lines)


def records(rng: random.Random) -> str:
    """List a few records with their values, then look values up."""
    names = fresh_names(rng)
    columns = rng.sample(names.text_columns + names.number_columns, rng.randint(2, 3))
    people = rng.sample((*words.PEOPLE, pseudo_word(rng).capitalize()), rng.randint(3, 5))
    table = {p: [_value(rng, c in names.text_columns, names.values) for c in columns] for p in people}
    shape = rng.choice(("{c}: {v}", "{c} = {v}", "the {c} is {v}", "{c} {v}"))
    joint = rng.choice((", ", "; ", " | "))
    lines = []
    for person, row in table.items():
        cells = zip(columns, row, strict=True)
        lines.append(f"{person}: " + joint.join(shape.format(c=c.replace("_", " "), v=v) for c, v in cells))
    for _ in range(rng.randint(2, 5)):
        person, i = rng.choice(people), rng.randrange(len(columns))
        column, value = columns[i].replace("_", " "), table[person][i]
        asked = rng.choice(("What is the {c} of {p}?", "Which {c} does {p} have?", "Give the {c} for {p}."))
        lines.append(f"Question: {asked.format(c=column, p=person)}\nAnswer: {value}")
    return "\n".join(lines)


def _value(rng: random.Random, is_text: bool, values: tuple[str, ...]) -> str:
    return rng.choice(values) if is_text else str(rng.randint(1, 10 ** rng.randint(1, 4)))


def _random_words(rng: random.Random, count: int) -> list[str]:
    pool = rng.choice((words.THINGS, words.ADJECTIVES, words.TABLES, words.PLACES, words.PEOPLE))
    return [pseudo_word(rng) if rng.random() < 0.4 else rng.choice(pool) for _ in range(count)]


def patterns(rng: random.Random) -> str:
    """Apply one made-up rewriting rule to line after line of random words."""
    count = rng.randint(1, 4)
    before = [f"{{{i}}}" for i in range(count)]
    after = rng.sample(before, rng.randint(1, count)) if rng.random() < 0.4 else before
    quote = rng.choice(_QUOTES)
    name = rng.choice((pseudo_word(rng), pseudo_word(rng).upper()))
    left = rng.choice((" ", ", ", " and ", "/", "-")).join(before)
    right = rng.choice(("_", ", ", " ", "|", " + ", ".")).join(quote.replace("x", word) for word in after)
    if rng.random() < 0.3:
        left, right = " ".join(before), "_".join(before)  # how column names are written
    right = rng.choice(_FRAMES).format(x=right, name=name)
    line = rng.choice(_RULES).format(left=left, right=right, name=name)
    change = rng.choice((str, str, str.capitalize, str.upper))
    return "\n".join(line.format(*map(change, _random_words(rng, count))) for _ in range(rng.randint(6, 12)))


_QUOTES = ("x", "x", "x", "'x'", "'x'", '"x"', "[x]", "<x>", "(x)")
_FRAMES = ("{x}", "{x}", "{x}", "({x})", "[{x}]", "{name}({x})", "{name} {x};")
_RULES = ("{left} -> {right}", "{left} => {right}", "{name}({left}) = {right}", "In: {left}\nOut: {right}",
          "We write {left} as {right}.", "{left}: {right}")  # fmt: skip


def copies(rng: random.Random) -> str:
    """Copy, reverse, filter or count lists of random words and numbers."""
    lines = []
    tasks = rng.sample(_TASKS, rng.choice((1, 1, 2, 3)))
    for _ in range(rng.randint(3, 6)):
        items = _random_words(rng, rng.randint(3, 8))
        if rng.random() < 0.3:
            items = [str(rng.randint(1, 10 ** rng.randint(1, 4))) for _ in items]
        task, apply = rng.choice(tasks)
        lines.append(f"List: {', '.join(items)}\n{task}: {apply(items)}")
    return "\n".join(lines)


_TASKS: tuple[tuple[str, Callable[[list[str]], str]], ...] = (
    ("Copy", ", ".join),
    ("Again", " ".join),
    ("Reversed", lambda items: ", ".join(items[::-1])),
    ("First", lambda items: items[0]),
    ("Last", lambda items: items[-1]),
    ("First two", lambda items: ", ".join(items[:2])),
    ("Without the first", lambda items: ", ".join(items[1:])),
    ("Every second one", lambda items: ", ".join(items[::2])),
    ("Count", lambda items: str(len(items))),
    ("Sorted", lambda items: ", ".join(sorted(items))),
    ("Quoted", lambda items: ", ".join(f"'{item}'" for item in items)),
    ("Joined", "_".join),
    ("Capitals", lambda items: " ".join(item.capitalize() for item in items)),
)

GENERATORS: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (notes, 0.64),
    (paraphrases, 0.07),
    (patterns, 0.07),
    (copies, 0.07),
    (table_talk, 0.06),
    (records, 0.06),
    (story, 0.03),
)
