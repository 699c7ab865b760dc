"""The commands with `--device cuda`, where the stand-in for CuPy stands in for a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import good, read
from support.device import Device

from minilora import backend


class CuPy(Device):
    """The stand-in as `import cupy` finds it, with a GPU that answers."""

    class cuda:
        class runtime:
            getDeviceCount = staticmethod(lambda: 1)

        @staticmethod
        def Device(number: int) -> SimpleNamespace:
            assert number == 0
            return SimpleNamespace(use=lambda: None)

    def get_default_memory_pool(self) -> CuPy:
        return self

    def total_bytes(self) -> int:
        return 10**6


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "cupy", CuPy())
    yield
    backend.use("cpu")


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "lora"),
        ("--method", "full"),
        ("--method", "prefix"),
        ("--frozen", "nf4", "--mixed-precision", "bf16", "--optimizer", "adamw_8bit"),
        ("--frozen", "offloaded", "--dropout", "0.2", "--activation-checkpointing"),
    ],
    ids=" ".join,
)
def test_on_a_device_a_run_trains_and_what_it_leaves_is_resumed_measured_generated_with_and_merged(
    flags: tuple[str, ...], cuda: None, model: Path, data: Path, tmp_path: Path
) -> None:
    run_of, device = tmp_path / "run", ("--device", "cuda")
    common = ("--model", model, "--data", data / "parts", "--untie", *flags, *device)
    good("train", *common, "--out", run_of, "--steps", 3, "--eval-every", 2, "--eval-rows", 2, "--grad-accumulation", 2)
    summary = read(run_of / "summary.json")
    assert summary["adapted_loss"] != summary["base_loss"]
    good("train", "--resume", run_of)
    learnt = ("--model", run_of, *device) if "full" in flags else ("--model", model, "--adapter", run_of, *device)
    measured = json.loads(good("evaluate", *learnt, "--data", data / "parts", "--json"))
    rounding = 0.1 if "nf4" in flags else 1e-4
    assert measured["loss"] == pytest.approx(summary["adapted_loss"], rel=rounding)
    assert good("generate", *learnt, "--prompt", "one and", "--max-tokens", 3)
