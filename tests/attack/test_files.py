"""A sample of files with mistakes: whatever a file holds, its reader works, or says in a line what is wrong with it."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("memfd_create and limits", allow_module_level=True)

from attack import faulty, files
from attack.files import CLEAR, CRASH, HANG, MEMORY, TRACEBACK, UNNAMED, WORKS, Files, classed
from attack.mutants import mutant


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def test_files_without_a_mistake_work(good_files: Files) -> None:
    """Else every mistake would be met by the error that is there without it."""
    for case in good_files.cases:
        good_files.anew()
        ended = faulty.limited(case.command, case.flags, files.SECONDS, files.BYTES)
        assert classed(ended, Path(case.file)) == WORKS, (case, ended.output)


def test_a_file_with_a_mistake_works_or_is_told_in_a_line_that_names_it(good_files: Files) -> None:
    outcomes = [good_files.attack(seed) for seed in range(3 * len(good_files.cases))]
    assert [outcome for outcome in outcomes if outcome.kind not in (WORKS, CLEAR)] == []
    assert {outcome.kind for outcome in outcomes} == {WORKS, CLEAR}


def test_a_seed_makes_the_same_file_each_time(good_files: Files) -> None:
    for case in good_files.cases:
        file = good_files.good / case.file
        data = file.read_bytes()
        made = [mutant(data, file.suffix, random.Random(seed)) for seed in (1, 1, 2, 3)]
        assert made[0] == made[1] and made[1:] != [data] * 3


def test_each_kind_of_outcome_is_known_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that takes a hang for an error would find none."""

    def outcome(act: object) -> str:
        monkeypatch.setattr("minilora.generate.main", act)
        return classed(faulty.limited("generate", [], 1, 2**28), Path("model/config.json"))

    def says(text: str, code: int) -> object:
        return lambda argv: print(text) or code

    def spins(argv: object) -> int:
        while True:
            time.process_time()

    def crashes(argv: object) -> int:
        faulty.os.kill(faulty.os.getpid(), faulty.signal.SIGTRAP)
        return 0

    def fills(argv: object) -> int:
        try:
            return len(bytearray(2**30))
        except MemoryError:
            print("error: out of memory")
            return 2

    assert outcome(says("fine", 0)) == WORKS
    assert outcome(says("error: x/config.json: wrong", 2)) == CLEAR
    assert outcome(says("error: wrong", 2)) == UNNAMED
    assert outcome(lambda argv: {}["missing"]) == TRACEBACK
    assert outcome(spins) == HANG
    assert outcome(crashes) == CRASH
    assert outcome(fills) == MEMORY
