"""`pytest tests/specification --implementation FILE.py`: the laws of `laws/` held against anybody's implementation.

Without the flag, minilora's own tests run, and the laws on minilora, which goes through the same door.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.kit import OURS, Implementation
from support.law_report import Law, as_terminal_table, law_of, write_report

LAWS = Path(__file__).parent / "laws"
THEIRS = pytest.StashKey[Implementation]()
LAWS_FOUND: list[Law] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("the laws of LoRA")
    group.addoption("--implementation", type=Path, metavar="FILE.py", help="hold the laws against this implementation")
    group.addoption(
        "--specification-report", type=Path, metavar="FILE", help="write the table of laws to FILE.md and FILE.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The implementation is loaded once, before anything is collected, so that its errors come first and alone."""
    path = config.getoption("--implementation", default=None)
    if path is None and config.getoption("--specification-report", default=None):
        raise pytest.UsageError("--specification-report needs --implementation FILE.py")
    if path is not None:
        try:
            config.stash[THEIRS] = Implementation(path)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        if config.option.tbstyle == "auto":  # the table at the end says it shorter
            config.option.tbstyle = "no"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Somebody else's implementation is asked the laws only: the other files are about minilora."""
    is_ours = collection_path.name.startswith("test_") and LAWS not in collection_path.parents
    return True if is_ours and THEIRS in config.stash else None


@pytest.fixture(scope="session")
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return request.config.stash[THEIRS] if THEIRS in request.config.stash else Implementation(OURS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if call.when == "call" and LAWS in item.path.parents:
        path = item.config.stash[THEIRS].path if THEIRS in item.config.stash else OURS
        report.user_properties.append(("law", law_of(item, call.excinfo, report.outcome, path)._asdict()))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Reports come from other processes, too, if pytest-xdist runs the tests."""
    if report.when == "call":
        LAWS_FOUND.extend(Law(**value) for name, value in report.user_properties if name == "law")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    theirs = config.stash.get(THEIRS, None)
    if theirs is None or not LAWS_FOUND:
        return
    laws = sorted(LAWS_FOUND, key=lambda law: law.place)
    terminalreporter.section(f"the laws of LoRA, held against {theirs.path}")
    for line in as_terminal_table(laws):
        terminalreporter.write_line(line)
    if path := config.getoption("--specification-report"):
        written = write_report(path, theirs.path, laws)
        terminalreporter.write_line(f"written: {', '.join(map(str, written))}")
