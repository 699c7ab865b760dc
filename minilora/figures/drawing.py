"""Colours and saving, shared by all pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from minilora.formats.whole import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY = "#08519c", "#d94801", "#8c8c8c"


def save(figure: Any, path: Path) -> Path:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    return path
