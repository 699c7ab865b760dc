"""The figures of a data set, known before training starts: how much there is, how much of it trains, what is lost."""

import statistics
from typing import Any

from minilora.data.examples import Encoded, left_out


def figures(encoded: Encoded, padding_share: float | None = None) -> dict[str, Any]:
    """Examples and tokens of a part; how many tokens are labelled; its rows left out; lengths in tokens.

    `padding_share` is that of the batches in which the part will be read, None where these are not known.
    """
    lengths = [len(example.tokens) for example in encoded.examples]
    labels = sum(sum(example.trained[1:]) for example in encoded.examples)
    return {
        "examples": len(lengths),
        "tokens": sum(lengths),
        "labels": labels,
        "label_share": labels / max(sum(lengths), 1),
        "padding_share": padding_share,
        "median_length": int(statistics.median_high(lengths)) if lengths else 0,
        "longest": max(lengths, default=0),
        "too_long": len(encoded.too_long),
        "unlabelled": len(encoded.unlabelled),
    }


def report(encoded: Encoded, max_length: int, name: str, padding_share: float | None = None) -> str:
    """The same for people, on one line; rows left out are named."""
    counts = figures(encoded, padding_share)
    text = (
        f"{name}: {counts['examples']:,} examples, {counts['tokens']:,} tokens, {counts['label_share']:.0%} of them "
        f"trained; median length {counts['median_length']:,}, longest {counts['longest']:,}"
    )
    if padding_share is not None:
        text += f"; {padding_share:.0%} of its batches is padding"
    lost = left_out(encoded, max_length)
    return text + (f"; left out: {lost}" if lost else "")
