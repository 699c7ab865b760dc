"""Runs whose products are in 16 bits: their flag, and a loss scale that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilora.runs.metrics import read_metrics
from minilora.runs.run import prepare
from minilora.runs.settings import make_settings, read_settings
from minilora.runs.state_file import load_state, save_state
from minilora.train import main
from minilora.training.loss_scale import FIRST, LossScale


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"mixed_precision": "fp8"}, "--mixed-precision 'fp8': choose no, bf16, fp16"),
        ({"mixed_precision": "bf16", "method": "full"}, "--method full has none"),
        ({"mixed_precision": "bf16", "method": "random"}, "--method random has none"),
        ({"mixed_precision": "bf16", "dtype": "float64"}, "goes with --dtype float32, not float64"),
    ],
)
def test_settings_that_make_no_sense_name_the_flag(wrong: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_settings(wrong)


def test_a_run_in_float16_has_a_loss_scale_and_goes_on_with_it_when_resumed(tmp_path: Path) -> None:
    flags = ["--steps", "2", "--batch-size", "2", "--eval-rows", "0", "--fp16", "--out", str(tmp_path)]
    assert main(flags) == 0
    assert [line["loss_scale"] for line in read_metrics(tmp_path) if "loss" in line] == [FIRST, FIRST]
    run = prepare(read_settings(tmp_path), tmp_path)
    load_state(run.state, tmp_path)
    assert run.state.loss_scale == LossScale(FIRST, 2)
    run.state.loss_scale = LossScale(8.0, 3)
    save_state(run.state, tmp_path)
    run.state.loss_scale = LossScale()
    load_state(run.state, tmp_path)
    assert run.state.loss_scale == LossScale(8.0, 3)
