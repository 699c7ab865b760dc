"""The files of tests/golden/ stay few and small."""

from __future__ import annotations

from support.golden import CASES, GOLDEN


def test_the_golden_files_stay_small_and_each_folder_is_a_case() -> None:
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(sizes) < 400_000
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)
