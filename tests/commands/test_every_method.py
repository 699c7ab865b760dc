"""What train writes by any method, the other commands take, or they refuse it by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import assert_refused, good, read, run
from support.merging import TOKENS, adapter, base

from minilora.formats.adapters import load_adapter
from minilora.formats.load import load_model
from minilora.methods.bitfit import BitFit
from minilora.methods.method import Method, known_methods
from minilora.model.model import Model, forward
from minilora.model.names import HEAD

NOT_MERGED = {"bottleneck": "BottleneckSite", "prefix": "virtual tokens", "prompt": "virtual tokens"}
ADAPTERS: dict[str, Method] = {
    **{cls().name: cls() for cls in known_methods().values() if cls.freezes_base},
    "bitfit with norms": BitFit(train_norms=True),
}


def logits(model: Model) -> np.ndarray:
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    hidden = forward(model, TOKENS, positions, np.ones_like(TOKENS), keep=False)[0]
    return np.asarray(model.sites[HEAD].forward(hidden)[0])


@pytest.mark.parametrize("file", ["folder", "model.gguf"])
@pytest.mark.parametrize("whole", ["tied", "untied with biases"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_any_method_is_merged_to_what_it_computes_or_refused_by_name(
    tmp_path: Path, name: str, whole: str, file: str
) -> None:
    if file == "model.gguf":
        pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
    model = base(tmp_path / "base", tied=whole == "tied", biases=whole != "tied")
    adapted = adapter(tmp_path / "adapter", model, ADAPTERS[name])
    flags: tuple[object, ...] = ("--model", model, "--adapter", adapted, "--out", tmp_path / file, "--untie")
    flags += ("--format", "gguf") if file == "model.gguf" else ()
    if name in NOT_MERGED:
        assert_refused(run("merge", *flags), NOT_MERGED[name])
        assert not (tmp_path / file).exists()
        return
    good("merge", *flags)
    expected = logits(load_adapter(load_model(model)[0], adapted))
    assert not np.allclose(expected, logits(load_model(model)[0]), atol=1e-2)
    np.testing.assert_allclose(logits(load_model(tmp_path / file)[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", known_methods())
def test_what_any_method_has_learnt_is_measured_generated_with_merged_and_combined_or_refused_by_name(
    name: str, model: Path, data: Path, tmp_path: Path
) -> None:
    def measured(*flags: object) -> float:
        return float(json.loads(good("evaluate", *flags, "--data", data / "parts", "--json"))["loss"])

    run_of, cls = tmp_path / "run", known_methods()[name]
    good(
        "train", "--model", model, "--data", data / "parts", "--method", name, "--untie", "--steps", 3, "--out", run_of
    )
    summary = read(run_of / "summary.json")
    assert summary["adapted_loss"] != summary["base_loss"]
    learnt = ("--model", model, "--adapter", run_of) if cls.freezes_base else ("--model", run_of)
    rounding = 1e-5 if name != "qlora" else 0.1  # that of 4 bits
    assert measured(*learnt) == pytest.approx(summary["adapted_loss"], rel=rounding)
    assert good("generate", *learnt, "--prompt", "one and", "--max-tokens", 3)
    if not cls.freezes_base:
        return  # what it leaves is a model, with nothing to merge or to combine
    merged = run("merge", *learnt, "--untie", "--out", tmp_path / "merged")
    if name in NOT_MERGED:
        assert_refused(merged, NOT_MERGED[name])
    else:
        assert merged.code == 0, merged.err
        assert measured("--model", tmp_path / "merged") == pytest.approx(measured(*learnt), rel=1e-5)
    pair = ("--adapter", f"one={run_of}", "--adapter", f"two={run_of}")
    combined = run("combine", *pair, "--weights", 0.75, 0.25, "--out", tmp_path / "combined")
    if not cls.thin_change:
        assert_refused(combined, str(run_of), f"{name}, and only LoRA")
    else:
        assert combined.code == 0, combined.err
        again = measured("--model", model, "--adapter", tmp_path / "combined")
        assert again == pytest.approx(measured(*learnt), rel=1e-5)
