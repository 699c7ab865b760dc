"""English ways to ask for what a query does, in two sets that share no sentence pattern.

A *request* is a noun phrase, put into an opener ("Show me ..."); a *sentence* stands alone. In both, `{t}` is the
table together with its conditions, so one pattern serves queries with and without them. Held-out patterns use words
known from the training patterns, in new arrangements.
"""

from dataclasses import dataclass
from pathlib import Path

from minilora.tasks.tables import read_table

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Phrasings:
    """One complete set of ways to ask: everything a question is put together from."""

    openers: tuple[str, ...]
    requests: dict[str, tuple[str, ...]]
    sentences: dict[str, tuple[str, ...]]
    # how a condition is led in, stated for equality, and stated for a comparison
    conditions: tuple[tuple[str, str, str], ...]
    aggregates: tuple[str, ...]
    orders: tuple[str, ...]


TRAINING = Phrasings(**read_table(_FOLDER / "training_phrasings.json"))
HELD_OUT = Phrasings(**read_table(_FOLDER / "held_out_phrasings.json"))

# Words that carry the meaning; each alternative means exactly one thing.
_CUES = read_table(_FOLDER / "cues.json")
AGGREGATE_CUES: dict[str, tuple[str, ...]] = _CUES["aggregate"]
COMPARISON_CUES: dict[str, tuple[str, ...]] = _CUES["comparison"]
DISTINCT_CUES: tuple[str, ...] = _CUES["distinct"]
# (direction, most, least, place) for rising and for falling order
ORDER_CUES: dict[str, tuple[tuple[str, str, str, str], ...]] = _CUES["order"]
