"""MiSS on the places where it may stand."""

from __future__ import annotations

import pytest

from minilora.methods.miss import MiSS

METHODS = {
    "every projection": MiSS(2, target_modules=("all-linear",)),
    "head and a whole norm": MiSS(2, target_modules=("v_proj", "lm_head"), modules_to_save=("norm",)),
}


each = pytest.mark.parametrize("name", METHODS)
