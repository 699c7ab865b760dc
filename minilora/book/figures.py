"""Two pictures of docs/ that a reader of the book can move: each gets its numbers, and figures.js draws it."""

from __future__ import annotations

import base64
import json
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from docutils import nodes

from minilora.backend import HostArray
from minilora.book.numbers import first_steps, rank_against_loss

FIGURES = {"first-steps.png": first_steps, "rank-against-loss.png": rank_against_loss}  # by the still picture


def bring_to_life(doctree: nodes.document) -> None:
    """Put the numbers of a figure around its still picture, which stays where no script runs."""
    for image in [*doctree.findall(nodes.image)]:
        name = PurePosixPath(image["uri"]).name
        if name in FIGURES:
            numbers = json.dumps(FIGURES[name](), default=packed).replace("<", "\\u003c")
            opening = f'<figure class="live" data-figure="{PurePosixPath(name).stem}">'
            closing = f'<script type="application/json">{numbers}</script></figure>'
            paragraph = image.parent
            paragraph.replace_self([raw(opening), image, raw(closing)])


def raw(html: str) -> nodes.raw:
    return nodes.raw("", html, format="html")


def packed(array: HostArray) -> dict[str, Any]:
    """An array as text: its shape, its largest number, and each number as a share of that, in 16 bits and base64."""
    largest = float(np.abs(array).max()) or 1.0
    shares = np.round(array / largest * 32767).astype("<i2")
    return {"shape": array.shape, "largest": largest, "data": base64.b64encode(shares.tobytes()).decode()}
