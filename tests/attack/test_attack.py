"""A sample of the attacks: whatever happens to a command, it leaves all or nothing, and a way on to the same bytes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable

import pytest

if sys.platform != "linux":
    pytest.skip("memfd_create and limits", allow_module_level=True)

from attack import faulty
from attack.promises import COMMANDS, Ground, Tried, full_disks, full_files, kills, random_kills, signals


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


def assert_held(attacks: Iterable[Tried]) -> None:
    tried = list(attacks)
    assert tried and not [attack for attack in tried if attack.broken]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_leaves_all_or_nothing_and_a_way_on(command: str, ground: Ground) -> None:
    assert_held(kills(ground, command, every=31))
    assert_held(random_kills(ground, command, times=1))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_told_by_name_and_costs_nothing_that_was_there(command: str, ground: Ground) -> None:
    assert_held(full_disks(ground, command, every=37))
    assert_held(full_files(ground, command, every=40_000))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_is_obeyed_and_the_command_goes_on_to_the_same_bytes(command: str, ground: Ground) -> None:
    assert_held(signals(ground, command, times=3))


def test_the_attacks_strike(ground: Ground) -> None:
    """A harness whose attacks miss would see every promise held."""
    ground.clear()
    flags, watched = ground.flags("merge", ground.out()), ground.folder / "attacked"
    assert faulty.run("merge", flags, watched).operations > 30
    assert ground.found("merge") == ground.expected["merge"]
    ground.clear()
    assert faulty.killed_at(9, "merge", flags, watched).code == -signal.SIGKILL
    assert ground.found("merge") is None
    ground.clear()
    assert faulty.full_from(9, "merge", flags, watched).clear
    assert faulty.at_size(5000, "merge", flags).clear
    assert faulty.after(0.0, signal.SIGKILL, "merge", flags).code == -signal.SIGKILL
