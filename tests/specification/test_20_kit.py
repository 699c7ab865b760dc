"""The laws for everybody's implementation catch what goes wrong, and say it in one sentence and one small example."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.kit import IMPLEMENTATIONS, OURS, TEMPLATE, Implementation, functions_asked_for
from support.law_report import BROKEN, DIFFERS, HELD, NOT_OFFERED
from support.wrong import WRONG, Wrong

ROOT = Path(__file__).parents[2]
LAWS = sorted(Path(__file__).with_name("laws").glob("test_*.py"))


def hold(implementation: Implementation, law: str) -> None:
    """Try one law, named by its sentence, with all its variants."""
    name = f"test_{law.replace(' ', '_').replace('-', '_')}"
    for path in LAWS:
        sys.path.insert(0, str(path.parent))
        module = importlib.import_module(path.stem)
        sys.path.remove(str(path.parent))
        if test := getattr(module, name, None):
            marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            variants = [{key: value} for key, values in marks for value in values] or [{}]
            for variant in variants:
                test(implementation=implementation, **variant)
            return
    raise LookupError(law)


def laws_of(*arguments: str, report: Path) -> tuple[int, str, dict[str, str]]:
    """Exit status, output, and the status of each law as the command's report has it."""
    command = [sys.executable, "-m", "pytest", "tests/specification", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(
        [*command, "--specification-report", str(report)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    laws = (
        json.loads(report.with_suffix(".json").read_text("utf-8"))["laws"]
        if report.with_suffix(".json").exists()
        else []
    )
    return run.returncode, run.stdout + run.stderr, {law["law"]: law["status"] for law in laws}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.function}_{wrong.slip}".replace(" ", "_"))
def test_a_wrong_implementation_breaks_the_law_that_names_its_error(wrong: Wrong) -> None:
    implementation = Implementation(OURS)
    implementation.module = wrong.module()
    with pytest.raises((AssertionError, ValueError)):  # ValueError: of shapes that do not fit
        hold(implementation, wrong.law)


def test_the_command_tells_held_differs_broken_and_not_offered_with_the_smallest_counterexample(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def lora_forward(x, W, A, B, scale):\n    return x @ W.T + scale**2 * (x @ A.T) @ B.T\n"
        "def lora_merge(W, A, B, scale):\n    W += scale * B @ A\n    return W\n"
        "import sys\nassert 'minilora' not in sys.modules\n",
        "utf-8",
    )
    code, output, laws = laws_of("--implementation", str(path), report=tmp_path / "report.md")
    assert code == 1
    assert laws["The output is that of the weight with s times B A added"] == BROKEN
    assert laws["With B zero the output is that of W alone"] == HELD
    assert laws["Merging makes a new weight"] == DIFFERS
    assert laws["Unmerging undoes merging"] == NOT_OFFERED
    assert "with x = [[" in output
    assert "scale = 2.0" in output
    assert "mine.py" in (tmp_path / "report.md").read_text("utf-8")


def test_minilora_goes_through_the_same_door_and_keeps_every_law(tmp_path: Path) -> None:
    code, output, laws = laws_of("-n", "2", "--implementation", str(OURS), report=tmp_path / "report")
    assert code == 0, output
    assert set(laws.values()) == {HELD}


def test_every_function_of_the_template_is_asked_for_by_a_law_documented_and_offered_by_minilora() -> None:
    page = (ROOT / "docs" / "testing.md").read_text("utf-8")
    text = "".join(path.read_text("utf-8") for path in LAWS)
    ours = OURS.read_text("utf-8")
    for name in functions_asked_for():
        stem = name.removesuffix("_forward").removesuffix("_gradients")
        assert name in text or f'"{stem}"' in text, f"no law asks for {name}"
        assert f"def {name}(" in ours, f"minilora does not offer {name}"
        assert f"`{name}(" in page, f"docs/testing.md says nothing of {name}"


def test_the_template_offers_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    code, _, laws = laws_of("--implementation", str(TEMPLATE), report=tmp_path / "report.json")
    assert code == 0
    assert set(laws.values()) == {NOT_OFFERED}


@pytest.mark.parametrize(
    ("name", "exceptions"),
    [
        ("materialised", {}),
        ("transposed", {"A starts with the variance 1 over 3 in": DIFFERS}),
        ("sequential", {"A and B are moved together": BROKEN}),
    ],
)
def test_the_ways_that_explanations_write_lora_keep_what_they_offer_but_for_one_slip(
    name: str, exceptions: dict[str, str], tmp_path: Path
) -> None:
    """W + s B A formed in full, and everything transposed, are LoRA; a start of another width is a convention.

    B moved by the new A is another descent, and no other law sees it.
    """
    path = IMPLEMENTATIONS / f"{name}.py"
    arguments = ("--hypothesis-profile=mutation", "--implementation", str(path))
    code, output, laws = laws_of(*arguments, report=tmp_path / "report")
    assert code == bool(exceptions), output
    offered = {law: status for law, status in laws.items() if status != NOT_OFFERED}
    assert len(offered) >= 15
    assert {law: status for law, status in offered.items() if status != HELD} == exceptions


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def lora_foward(x, W, A, B, scale): ...\ndef lora_merge(W, A, B, scale): ...", "is it lora_forward?"),
        ("x = 1", "offers none of the functions"),
        ("import nowhere_to_be_found", "mine.py:1: ModuleNotFoundError"),
        ("DTYPE = 'float16'\ndef lora_merge(W, A, B, scale): ...", 'say "float32" or "float64"'),
    ],
)
def test_a_file_that_cannot_be_an_implementation_is_told_why(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, "utf-8")
    code, output, laws = laws_of("--implementation", str(path), report=tmp_path / "report")
    assert code == 4
    assert told in output
    assert "Traceback" not in output
    assert not laws
