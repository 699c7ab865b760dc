"""The figures of a data set, known before training starts: how much there is, how much of it trains, what is lost."""

from typing import Any

import numpy as np

from minilora.data.examples import Encoded, left_out


def figures(encoded: Encoded, padding_share: float | None = None) -> dict[str, Any]:
    """Examples and tokens of a part; how many tokens are labelled; its rows left out; lengths in tokens.

    `padding_share` is that of the batches in which the part will be read, None where these are not known.
    """
    lengths = np.sort(encoded.examples.lengths)
    tokens, labels = int(lengths.sum()), int(encoded.examples.labels.sum())
    return {
        "examples": len(lengths),
        "tokens": tokens,
        "labels": labels,
        "label_share": labels / max(tokens, 1),
        "padding_share": padding_share,
        "median_length": int(lengths[len(lengths) // 2]) if len(lengths) else 0,
        "longest": int(lengths[-1]) if len(lengths) else 0,
        "too_long": len(encoded.too_long),
        "unlabelled": len(encoded.unlabelled),
        "shapes": sorted(encoded.shapes),
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
