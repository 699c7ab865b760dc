"""The figures of a run, where others read them: pandas and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.commands import CONFIG, PAIRS, TEXTS, assert_refused, contents, good, run, write_rows

from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.model.config import Config
from minilora.runs.metrics import METRICS_FILE, TENSORBOARD, MetricsFile


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of a short run of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, CONFIG, random_weights(Config.from_dict(CONFIG), seed=0), "float32")
    train_tokenizer(TEXTS * 3, CONFIG["vocab_size"], folder)
    rows = write_rows(folder / "rows.jsonl", PAIRS * 4)
    return ["--model", folder, "--data", rows, "--steps", 4, "--eval-every", 2, "--eval-rows", 0]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar in TensorBoard's files, as they stand there, in the order of writing."""
    loader = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / TENSORBOARD).iterdir()):
        rest = path.read_bytes()
        while rest:  # a record is its length in 8 bytes, 4 of checksum, the event, 4 of checksum
            size = int.from_bytes(rest[:8], "little")
            event, rest = loader.FromString(rest[12 : 12 + size]), rest[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_pandas_reads_the_metrics_of_a_run_in_one_line(job: list[object], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    good("train", *job, "--out", tmp_path / "run")
    table = pandas.read_json(tmp_path / "run" / METRICS_FILE, lines=True)
    assert [*table.step] == [1, 2, 2, 3, 4, 4]
    assert {"loss", "valid_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= {*table.columns}
    assert table.valid_loss.count() == 2 and table.loss.count() == 4 and table.loss.dtype == float


def test_what_is_no_finite_number_is_null_and_still_json(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(step=1, loss=math.nan, valid_loss=math.inf, grad_norm=2.0)
    metrics.close()
    [line] = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "valid_loss": None, "grad_norm": 2}


def test_tensorboard_is_told_what_the_metrics_say_and_a_resumed_run_says_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for start, stop in ((0, 9), (6, 12)):  # saved at 6, killed after 9, and resumed
        metrics = MetricsFile(tmp_path, start, TENSORBOARD)
        for step in range(start + 1, stop + 1):
            metrics.write(step=step, loss=step + start / 10, tokens=7)
            if step % 3 == 0:
                metrics.write(step=step, valid_loss=step / 2)
        metrics.close()
    found = events(tmp_path)
    assert found.keys() == {"train/loss", "train/tokens", "eval/loss"}
    assert [step for step, _ in found["train/loss"]] == [*range(1, 13)]
    losses = [1, 2, 3, 4, 5, 6, 7.6, 8.6, 9.6, 10.6, 11.6, 12.6]
    assert [value for _, value in found["train/loss"]] == pytest.approx(losses)
    assert found["eval/loss"] == [(3, 1.5), (6, 3), (9, 4.5), (12, 6)]


def test_a_run_reports_to_tensorboard_only_if_asked(job: list[object], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    good("train", *job, "--out", tmp_path / "plain")
    assert not (tmp_path / "plain" / TENSORBOARD).exists()
    good("train", *job, "--out", tmp_path / "told", "--report-to", "tensorboard")
    good("train", "--resume", tmp_path / "told")
    lines = [json.loads(line) for line in (tmp_path / "told" / METRICS_FILE).read_text().splitlines()]
    losses = [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert events(tmp_path / "told")["train/loss"] == losses and len(losses) == 4


def test_without_its_package_the_advice_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert_refused(run("train", "--report-to", "tensorboard"), "pip install 'minilora[tensorboard]'")
    assert contents(tmp_path) == {}
