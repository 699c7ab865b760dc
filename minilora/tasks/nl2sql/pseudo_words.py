"""Words made up from syllables: names that no text has ever mentioned."""

import random

from minilora.tasks.nl2sql import words

_SYLLABLES = tuple(a + b for a in "b c ch d f g h j k l m n p r s sh t th v w z br cl dr gr pl st tr".split()
                   for b in "a e i o u ai ea ee oo ar en il on or um".split())  # fmt: skip
_KNOWN = words.THINGS + words.PLACES + words.ADJECTIVES + words.TABLES
# What fine-tuning is tested on or is to teach must not come up even by accident.
_AVOIDED = frozenset(
    " ".join(
        (*words.HELD_OUT_TABLES, *words.HELD_OUT_TEXT_COLUMNS, *words.HELD_OUT_NUMBER_COLUMNS,
         *words.HELD_OUT_VALUES, "select distinct from where group order limit count")
    ).lower().replace("_", " ").split()
)  # fmt: skip
_ENDINGS = ("", "", "", "n", "r", "l", "s", "t", "ck", "nd", "x", "m")


def pseudo_word(rng: random.Random) -> str:
    """Return a word that most likely was never seen before: spliced from known words, or of syllables."""
    if rng.random() < 0.5:
        word = rng.choice(_KNOWN)[: rng.randint(2, 4)] + rng.choice(_KNOWN)[-rng.randint(3, 5) :]
    else:
        word = "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3)))) + rng.choice(_ENDINGS)
    return pseudo_word(rng) if word in _AVOIDED else word
