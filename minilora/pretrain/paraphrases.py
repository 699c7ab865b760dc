"""Plain English about what question words mean, over random things."""

import random
from pathlib import Path

from minilora.tasks.nl2sql import words
from minilora.tasks.nl2sql.pseudo_words import pseudo_word
from minilora.tasks.tables import read_table

_TABLES = read_table(Path(__file__).with_name("paraphrases.json"))


def paraphrases(rng: random.Random) -> str:
    """Return sentences that say which phrases mean the same, about one or more made-up tables."""
    slots = _slots(rng)
    same_things, one_shape = rng.random() < 0.6, rng.random() < 0.3
    shape, lines = rng.choice(_TABLES["same"]), []
    for _ in range(rng.randint(4, 8)):
        if not same_things:
            slots = _slots(rng)
        if not one_shape:
            shape = rng.choice(_TABLES["same"])
        if rng.random() < 0.9:
            line = shape.format(*rng.sample(rng.choice(_TABLES["synonyms"]), 2))
        else:
            line = rng.choice(_TABLES["other"]).format(*map(rng.choice, rng.sample(_TABLES["synonyms"], 2)))
        line = line.format_map(slots)
        lines.append(line[0].upper() + line[1:])
    lines += [line.format_map(slots) for line in rng.sample(_TABLES["small_facts"], rng.randint(0, 2))]
    return "\n".join(lines)


def _slots(rng: random.Random) -> dict[str, str]:
    column = rng.choice(rng.choice((words.TEXT_COLUMNS, words.NUMBER_COLUMNS, words.THINGS)))
    return {
        "t": f"{pseudo_word(rng)}s" if rng.random() < 0.3 else rng.choice(words.TABLES),
        "c": pseudo_word(rng) if rng.random() < 0.3 else column.replace("_", " "),
        "v": str(rng.randint(1, 10 ** rng.randint(1, 4))),
        "w": pseudo_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(words.VALUES),
        "k": str(rng.randint(2, 20)),
    }
