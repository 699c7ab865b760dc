"""Plain English about what question words mean, over random things."""

import random

from minilora.tasks.nl2sql import words
from minilora.tasks.nl2sql.pseudo_words import pseudo_word

# Words of one row mean the same.
SYNONYMS = (
    ("the highest {c}", "the largest {c}", "the greatest {c}", "the maximum {c}", "the most {c}"),
    ("the lowest {c}", "the smallest {c}", "the minimum {c}", "the least {c}"),
    ("the average {c}", "the mean {c}", "the average value of the {c}", "the mean of the {c}"),
    ("the total {c}", "the sum of the {c}", "the {c} added up", "the {c} of all together"),
    ("the number of {t}", "how many {t} there are", "the count of {t}", "the count of all {t}"),
    ("the different {c} values", "the distinct {c} values", "the unique {c} values",
     "each {c} once, without repeats"),
    ("{c} above {v}", "{c} over {v}", "{c} more than {v}", "{c} greater than {v}"),
    ("{c} below {v}", "{c} under {v}", "{c} less than {v}", "{c} smaller than {v}"),
    ("{t} whose {c} is {w}", "{t} with {c} {w}", "{t} where the {c} is {w}", "{t} having {c} equal to {w}",
     "{t} in which the {c} equals {w}", "{t} that have {w} as {c}"),
    ("{t} sorted by {c}", "{t} ordered by {c}", "{t} ranked by {c}", "{t} in order of {c}"),
    ("{t} in descending order of {c}", "{t} from the highest {c} down", "{t} from largest to smallest {c}",
     "{t} with the highest {c} first"),
    ("{t} in ascending order of {c}", "{t} from the lowest {c} up", "{t} from smallest to largest {c}",
     "{t} with the lowest {c} first"),
    ("the number of {t} per {c}", "the number of {t} for each {c}", "the count of {t} by {c}",
     "how many {t} there are for every {c}", "the number of {t} grouped by {c}"),
    ("the top {k} {t} by {c}", "the {k} {t} with the highest {c}",
     "the first {k} {t} when ranked by {c} from the top"),
    ("the bottom {k} {t} by {c}", "the {k} {t} with the lowest {c}", "the last {k} {t} when ranked by {c}"),
)  # fmt: skip

_SAME = (
    "{0} means the same as {1}.", "To ask for {0} is to ask for {1}.", "{0}, that is, {1}.",
    "If somebody wants {0}, show {1}.", "Saying {0} is another way of saying {1}.", "{0} = {1}",
    "By {0} we understand {1}.", "Question: What is meant by {0}?\nAnswer: {1}", "{0}; in other words, {1}.",
    "Somebody asked for {0}. So we looked for {1}.", "In short, {0}: {1}.",
)  # fmt: skip
_OTHER = ("{0} is not {1}.", "Do not mix up {0} and {1}.", "{0} is one thing and {1} is another.")


def paraphrases(rng: random.Random) -> str:
    """Return sentences that say which phrases mean the same, about one or more made-up tables."""
    slots = _slots(rng)
    same_things, one_shape = rng.random() < 0.6, rng.random() < 0.3
    shape, lines = rng.choice(_SAME), []
    for _ in range(rng.randint(4, 8)):
        if not same_things:
            slots = _slots(rng)
        if not one_shape:
            shape = rng.choice(_SAME)
        if rng.random() < 0.9:
            line = shape.format(*rng.sample(rng.choice(SYNONYMS), 2))
        else:
            line = rng.choice(_OTHER).format(*(rng.choice(row) for row in rng.sample(SYNONYMS, 2)))
        line = line.format_map(slots)
        lines.append(line[0].upper() + line[1:])
    lines += [line.format_map(slots) for line in rng.sample(_SMALL_FACTS, rng.randint(0, 2))]
    return "\n".join(lines)


_SMALL_FACTS = (
    "If the {c} of one is {v} and of the other {v}5, then the other has the higher {c}.",
    "A {c} of {v} is not above {v}.",
    "There is one number for each {c} when we count {t} per {c}.",
    "The {c} of the {t} whose {c} is {w} is of course {w}.",
    "When {t} are sorted in ascending order of {c}, the lowest {c} comes first.",
    "When {t} are sorted in descending order of {c}, the highest {c} comes first.",
)


def _slots(rng: random.Random) -> dict[str, str]:
    column = rng.choice(rng.choice((words.TEXT_COLUMNS, words.NUMBER_COLUMNS, words.THINGS)))
    return {
        "t": f"{pseudo_word(rng)}s" if rng.random() < 0.3 else rng.choice(words.TABLES),
        "c": pseudo_word(rng) if rng.random() < 0.3 else column.replace("_", " "),
        "v": str(rng.randint(1, 10 ** rng.randint(1, 4))),
        "w": pseudo_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(words.VALUES),
        "k": str(rng.randint(2, 20)),
    }
