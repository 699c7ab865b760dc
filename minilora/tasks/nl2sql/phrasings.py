"""English ways to ask for what a query does, in two sets that share no sentence pattern.

A *request* is a noun phrase, put into an opener ("Show me ..."); a *sentence* stands alone. In
both, ``{t}`` is the table together with its conditions, so one pattern serves queries with and
without them. Held-out patterns use words known from the training patterns, in new arrangements.
"""

from dataclasses import dataclass


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


# fmt: off  (the tables below read best as filled lines)
# Words that carry the meaning; each alternative means exactly one thing.
AGGREGATE_CUES = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "largest", "greatest", "maximum"),
    "MIN": ("lowest", "smallest", "minimum"),
    "SUM": ("total", "sum"),
}
COMPARISON_CUES = {">": ("more than", "above", "over", "greater than"), "<": ("less than", "below", "under")}
DISTINCT_CUES = ("different", "distinct", "unique")
# (direction, most, least, place) for rising and for falling order
ORDER_CUES = {
    False: (("ascending", "lowest", "highest", "bottom"), ("ascending", "smallest", "largest", "bottom")),
    True: (("descending", "highest", "lowest", "top"), ("descending", "largest", "smallest", "top")),
}

TRAINING = Phrasings(
    openers=(
        "Show {x}.",
        "Show me {x}.",
        "List {x}.",
        "Give {x}.",
        "Give me {x}.",
        "Find {x}.",
        "Get {x}.",
        "Return {x}.",
        "Display {x}.",
        "Please list {x}.",
        "Please find {x}.",
        "Tell me {x}.",
        "I want {x}.",
        "I need {x}.",
        "Can you show {x}?",
        "Could you find {x}?",
        "We need to know {x}.",
        "I would like to see {x}.",
    ),
    requests={
        "column": (
            "the {a} of the {t}",
            "the {a} of all {t}",
            "the {a} for the {t}",
            "the {a} for all of the {t}",
            "the {a} of every one of the {t}",
        ),
        "distinct": (
            "the {d} values of {a} of the {t}",
            "the {d} {a} values of the {t}",
            "every {d} {a} of the {t}",
            "all {d} values of {a} among the {t}",
            "each {d} value of {a} for the {t}",
        ),
        "count": ("the number of {t}", "the count of {t}", "the number of all {t}", "how many {t} there are"),
        "aggregate": (
            "the {agg} of the {t}",
            "the {agg} of all {t}",
            "the {agg} for the {t}",
            "the {agg} among the {t}",
        ),
        "sorted": (
            "the {a} of the {t} sorted by {n} {order}",
            "the {a} of all {t} ordered by {n} {order}",
            "the {a} for the {t} ranked by {n} {order}",
            "the {a} of the {t} in {direction} order of {n}",
        ),
        "top": (
            "the {a} of the {k} {t} with the {most} {n}",
            "the {a} of the {top} {k} {t} by {n}",
            "the {a} of the {k} {t} that have the {most} {n}",
            "the {a} for the {top} {k} {t} ranked by {n}",
            "the {a} of the first {k} {t} when sorted by {n} {order}",
        ),
        "group_count": (
            "the number of {t} for each {g}",
            "the number of {t} per {g}",
            "the count of {t} for every {g}",
            "how many {t} there are for each {g}",
            "the count of {t} by {g}",
        ),
        "group_aggregate": (
            "the {agg} of the {t} for each {g}",
            "the {agg} of the {t} per {g}",
            "the {agg} of {t} grouped by {g}",
            "the {agg} by {g} of the {t}",
            "for every {g} the {agg} of the {t}",
        ),
    },
    sentences={
        "column": (
            "What is the {a} of the {t}?",
            "What is the {a} for all {t}?",
            "What {a} do the {t} have?",
            "Which {a} do the {t} have?",
            "For the {t}, show the {a}.",
            "For all {t}, give the {a}.",
            "Of the {t}, list the {a}.",
            "Look at the {t} and list the {a}.",
            "Among the {t}, what is the {a}?",
        ),
        "distinct": (
            "What are the {d} values of {a} among the {t}?",
            "Which {d} {a} values do the {t} have?",
            "Among the {t}, what {d} values of {a} are there?",
            "For the {t}, list all {d} values of {a}.",
            "Look at the {t} and show every {d} {a}.",
        ),
        "count": (
            "How many {t} are there?",
            "How many {t} do we have?",
            "What is the number of {t}?",
            "What is the count of the {t}?",
            "Count the {t}.",
            "Count all {t}.",
            "Please count the {t}.",
            "Of the {t}, how many are there?",
        ),
        "aggregate": (
            "What is the {agg} of the {t}?",
            "What is the {agg} among all {t}?",
            "Compute the {agg} of the {t}.",
            "For the {t}, what is the {agg}?",
            "Of all {t}, find the {agg}.",
            "What {agg} is there among the {t}?",
            "Please compute the {agg} for all {t}.",
        ),
        "sorted": (
            "Sort the {t} by {n} {order} and show the {a}.",
            "Order the {t} by {n} {order} and list the {a}.",
            "Rank the {t} by {n} {order} and give the {a}.",
            "In {direction} order of {n}, list the {a} of the {t}.",
            "Sorted by {n} {order}, what is the {a} of the {t}?",
            "What is the {a} of the {t} in {direction} order of {n}?",
        ),
        "top": (
            "Which {k} {t} have the {most} {n}? Show their {a}.",
            "What is the {a} of the {k} {t} with the {most} {n}?",
            "Of the {k} {t} with the {most} {n}, give the {a}.",
            "Take the {top} {k} {t} by {n} and list the {a}.",
            "Sort the {t} by {n} {order} and show the {a} of the first {k}.",
        ),
        "group_count": (
            "How many {t} are there for each {g}?",
            "How many {t} are there per {g}?",
            "Count the {t} per {g}.",
            "For each {g}, how many {t} are there?",
            "Count the {t} by {g}.",
            "For every {g}, count the {t}.",
            "Group the {t} by {g} and count them.",
            "What is the number of {t} in each {g}?",
        ),
        "group_aggregate": (
            "What is the {agg} of the {t} for each {g}?",
            "What is the {agg} per {g} of the {t}?",
            "For each {g}, what is the {agg} of the {t}?",
            "Group the {t} by {g} and compute the {agg}.",
            "For every {g}, find the {agg} of the {t}.",
        ),
    },
    conditions=(
        ("whose", "{c} is {v}", "{c} is {op} {v}"),
        ("whose", "{c} equals {v}", "{c} is {op} {v}"),
        ("where the", "{c} is {v}", "{c} is {op} {v}"),
        ("with", "{c} {v}", "{c} {op} {v}"),
        ("having", "{c} equal to {v}", "{c} {op} {v}"),
        ("in which the", "{c} is equal to {v}", "{c} is {op} {v}"),
        ("that have", "{v} as {c}", "{c} {op} {v}"),
    ),
    aggregates=("{cue} {n}", "{cue} {n}", "{cue} value of the {n}"),
    orders=("in {direction} order", "from {most} to {least}", "with the {most} first"),
)

HELD_OUT = Phrasings(
    openers=(
        "Please show me {x}.",
        "Could you give me {x}?",
        "Can you list {x}?",
        "I want to know {x}.",
        "We would like to see {x}.",
        "Please tell me {x}.",
    ),
    requests={
        "column": (
            "the {a} that the {t} have",
            "the {a} for every one of the {t}",
            "the {a} of all of the {t}",
        ),
        "distinct": (
            "all {d} {a} values among the {t}",
            "the {d} values that the {t} have for {a}",
            "every {d} value of {a} of the {t}",
        ),
        "count": ("the count of all the {t}", "how many {t} we have", "the number of the {t}"),
        "aggregate": (
            "the {agg} that the {t} have",
            "the {agg} among all of the {t}",
            "the {agg} for all of the {t}",
        ),
        "sorted": (
            "the {a} of all {t} in {direction} order by {n}",
            "the {a} of the {t} ranked {order} by {n}",
            "the {a} for all {t} sorted {order} by {n}",
        ),
        "top": (
            "the {a} of the {k} {t} having the {most} {n}",
            "the {a} for the {top} {k} of the {t} by {n}",
            "the {a} of the {top} {k} when the {t} are ranked by {n}",
        ),
        "group_count": (
            "for each {g} the number of {t}",
            "the count of {t} per {g}",
            "the number of {t} grouped by {g}",
        ),
        "group_aggregate": (
            "the {agg} for each {g} of the {t}",
            "the {agg} of the {t} in each {g}",
            "for each {g} the {agg} of all {t}",
        ),
    },
    sentences={
        "column": (
            "For all of the {t}, what is the {a}?",
            "Look at all {t} and give the {a}.",
            "What {a} do all of the {t} have?",
            "Among the {t}, show the {a}.",
        ),
        "distinct": (
            "What {d} values of {a} do the {t} have?",
            "Which values of {a} are {d} among the {t}?",
            "Of the {t}, which {d} {a} values are there?",
        ),
        "count": (
            "Can you count the {t}?",
            "What is the number of all {t}?",
            "How many of the {t} are there?",
            "For the {t}, what is the count?",
        ),
        "aggregate": (
            "For all {t}, compute the {agg}.",
            "Among all {t}, what is the {agg}?",
            "Can you compute the {agg} of all the {t}?",
            "Look at the {t} and compute the {agg}.",
        ),
        "sorted": (
            "Show the {a} when the {t} are sorted by {n} {order}.",
            "By {n} {order}, list the {a} of the {t}.",
            "With the {t} ordered by {n} {order}, what is the {a}?",
        ),
        "top": (
            "For the {k} {t} with the {most} {n}, what is the {a}?",
            "By {n}, what is the {a} of the {top} {k} {t}?",
            "Find the {k} {t} that have the {most} {n} and show the {a}.",
        ),
        "group_count": (
            "Per {g}, how many {t} are there?",
            "Count how many {t} there are for each {g}.",
            "For every {g}, what is the number of {t}?",
            "Group by {g} and count the {t}.",
        ),
        "group_aggregate": (
            "Per {g}, what is the {agg} of the {t}?",
            "Compute the {agg} of the {t} by {g}.",
            "With the {t} grouped by {g}, what is the {agg}?",
        ),
    },
    conditions=(
        ("where", "{c} equals {v}", "{c} is {op} {v}"),
        ("that have", "{c} {v}", "their {c} {op} {v}"),
        ("in which", "{c} is {v}", "{c} is {op} {v}"),
        ("with the", "{c} equal to {v}", "{c} {op} {v}"),
    ),
    aggregates=("{cue} {n}", "{cue} {n}", "{cue} value of {n}"),
    orders=("in {direction} order", "from the {most} to the {least}", "{most} first"),
)
