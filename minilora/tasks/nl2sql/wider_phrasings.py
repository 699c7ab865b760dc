"""The wider part of the training phrasings: with phrasings.TRAINING, all the ways in which training rows may ask."""

from minilora.tasks.nl2sql.phrasings import TRAINING, Phrasings

# fmt: off  (the tables below read best as filled lines)
_OPENERS = (
    "Please give me {x}.",
    "Please return {x}.",
    "Please get {x}.",
    "Please write down {x}.",
    "Please look up {x}.",
    "Could you show me {x}?",
    "Could you tell me {x}?",
    "Could you list {x}?",
    "Could you please find {x}?",
    "Can you find {x}?",
    "Can you give me {x}?",
    "Can you tell me {x}?",
    "Can you please report {x}?",
    "Would you show me {x}?",
    "Would you please list {x}?",
    "Would you tell us {x}?",
    "Do you know {x}?",
    "I would like to know {x}.",
    "I wish to know {x}.",
    "I wish to see {x}.",
    "I want to see {x}.",
    "I need to see {x}.",
    "We want to see {x}.",
    "We want {x}.",
    "We need {x}.",
    "We would like {x}.",
    "We wish to know {x}.",
    "Let me see {x}.",
    "Let us know {x}.",
    "Tell us {x}.",
    "Show us {x}.",
    "Write down {x}.",
    "Print {x}.",
    "Look up {x}.",
    "Report {x}.",
    "Fetch {x}.",
    "It would help to know {x}.",
    "Now list {x}.",
)
_REQUESTS = {
    "column": (
        "the {a} that belongs to the {t}",
        "the {a} of each of the {t}",
        "the {a} among all the {t}",
        "the {a} which the {t} have",
        "the {a} for each one of the {t}",
    ),
    "distinct": (
        "the {d} {a} that the {t} have",
        "all the {d} values for {a} of the {t}",
        "every {d} value for {a} among all {t}",
        "the {d} values in {a} for all the {t}",
        "the {d} values which all the {t} show for {a}",
        "each {d} value that the {t} show in {a}",
        "the {d} {a} values found with the {t}",
    ),
    "count": (
        "the count of all of the {t}",
        "how many of the {t} exist",
        "the number of all the {t}",
        "how many {t} exist",
        "the count of every one of the {t}",
    ),
    "aggregate": (
        "the {agg} for every one of the {t}",
        "the {agg} over all {t}",
        "the {agg} which the {t} have",
        "the {agg} over all of the {t}",
    ),
    "sorted": (
        "the {a} for all of the {t} by {n} {order}",
        "the {a} of the {t} when sorted by {n} {order}",
        "the {a} of all the {t} ordered {order} of {n}",
        "the {a} for the {t} in {direction} {n} order",
    ),
    "top": (
        "the {a} of the {k} {t} that come {top} by {n}",
        "the {a} for the {k} of the {t} with the {most} {n}",
        "the {a} of the {k} of all {t} with {most} {n}",
        "the {a} of the {top} {k} of all {t} sorted by {n}",
    ),
    "group_count": (
        "per {g} the number of {t}",
        "for every {g} the count of the {t}",
        "by {g} how many {t} there are",
        "for each of the {g} values the number of {t}",
        "the number of all {t} in each {g}",
    ),
    "group_aggregate": (
        "per {g} the {agg} of the {t}",
        "the {agg} of all {t} for every {g}",
        "by {g} the {agg} for the {t}",
        "for each of the {g} values the {agg} of the {t}",
        "the {agg} in every {g} of the {t}",
    ),
}
_SENTENCES = {
    "column": ("All {t}: what is the {a}?", "Take the {t} and show the {a}.", "Which {a} is there for the {t}?"),
    "distinct": (
        "Take the {t} and list each {d} {a}.",
        "How do the {d} {a} values of the {t} read?",
        "Which {d} values does {a} have for the {t}?",
        "Which values in {a} are {d} for the {t}?",
        "Which of the {a} values are {d} for all {t}?",
        "Over the {t}, which values of {a} are {d}?",
    ),
    "count": ("Find out how many {t} there are.", "The {t}: how many are there?", "How many are the {t}?"),
    "aggregate": (
        "Take the {t} and find the {agg}.",
        "Work out the {agg} of the {t}.",
        "Which is the {agg} of the {t}?",
        "Over all {t}, what is the {agg}?",
    ),
    "sorted": (
        "Take the {t} by {n} {order} and show the {a}.",
        "By {n} {order}, what is the {a} of all {t}?",
        "When the {t} are ordered by {n} {order}, what is the {a}?",
    ),
    "top": (
        "Which are the {k} {t} with the {most} {n}? Give the {a}.",
        "By {n}, take the {top} {k} {t} and show the {a}.",
        "With the {t} sorted by {n} {order}, list the {a} of the first {k}.",
        "Look for the {k} {t} with the {most} {n} and list the {a}.",
        "Find the {a} of the {k} {t} that have the {most} {n}.",
    ),
    "group_count": (
        "Find out how many {t} there are by {g}.",
        "In each {g}, how many {t} do we have?",
        "Take the {t} by {g} and count them.",
        "Per {g}, show the number of {t}.",
        "Per {g}, what is the count of all {t}?",
    ),
    "group_aggregate": (
        "Take the {t} by {g} and find the {agg}.",
        "In every {g}, what is the {agg} of the {t}?",
        "By {g}, work out the {agg} of the {t}.",
        "Per {g}, show the {agg} of all {t}.",
        "Per {g}, find the {agg} for the {t}.",
    ),
}
_CONDITIONS = (
    ("which have", "{v} for {c}", "{c} {op} {v}"),
    ("for which the", "{c} is {v}", "{c} is {op} {v}"),
    ("whose", "{c} is equal to {v}", "{c} is {op} {v}"),
    ("of which the", "{c} equals {v}", "{c} is {op} {v}"),
    ("having", "{c} {v}", "their {c} {op} {v}"),
    ("which have the", "{c} {v}", "{c} {op} {v}"),
    ("that have a", "{c} of {v}", "{c} {op} {v}"),
    ("that show", "{c} {v}", "their {c} {op} {v}"),
    ("that come with", "{c} {v}", "{c} {op} {v}"),
)
# fmt: on


def _added(known: dict[str, tuple[str, ...]], more: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {pattern: known[pattern] + more[pattern] for pattern in known}


WIDER = Phrasings(
    openers=TRAINING.openers + _OPENERS,
    requests=_added(TRAINING.requests, _REQUESTS),
    sentences=_added(TRAINING.sentences, _SENTENCES),
    conditions=TRAINING.conditions + _CONDITIONS,
    aggregates=TRAINING.aggregates,
    orders=TRAINING.orders,
)
