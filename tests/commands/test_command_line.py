"""The command line itself: commands by name, flags as they are written, mistakes in one line, terminals of any kind."""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import REPOSITORY, Result, assert_refused, command_module, run

import minilora
from minilora.__main__ import COMMANDS, main
from minilora.cli.parser import Listed, Parser, any_terminal, comma_list, did_you_mean
from minilora.cli.train_flags import choose_settings, parse

NEEDED = {  # what a command asks for before it looks at anything else
    "merge": ["--adapter", "a", "--out", "b"],
    "combine": ["--out", "b"],
    "convert": ["--out", "b"],
    "random_checkpoint": ["SmolLM2-135M", "--out", "b"],
    "rows.wordnet": ["--out", "b"],
    "rows.docstrings": ["--out", "b"],
}
FLAGS = {
    "plan.scale": "--plot",
    "chat": "--model",
    "generate": "--model",
    "evaluate": "--model",
    "plan": "--measure",
    "serve": "--model",
}  # of others: --out
every_command = pytest.mark.parametrize("command", COMMANDS)


def called(*words: str) -> Result:
    """What `minilora WORDS` prints and returns."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(words))
        except SystemExit as end:  # of --help
            code = int(str(end.code))
    return Result(code, out.getvalue(), err.getvalue())


# --- Commands by name ---


def test_every_module_that_is_a_command_is_listed_with_a_line() -> None:
    """A command is what ends in `sys.exit(main())`; the step that `plan` measures is a part of one."""
    found = set()
    for path in (REPOSITORY / "minilora").rglob("*.py"):
        if "sys.exit(main())" in path.read_text(encoding="utf-8"):
            found.add(path.relative_to(REPOSITORY / "minilora").with_suffix("").as_posix().replace("/", "."))
    assert {name.removesuffix(".__main__") for name in found} - {"__main__", "plan.measured_step"} == set(COMMANDS)
    for shown in (called(), called("--help"), called("-h")):
        assert shown.code == 0
        assert all(f"  {name} " in shown.out and what in shown.out for name, what in COMMANDS.items())


@every_command
def test_a_command_by_its_name_is_the_module_of_that_name(command: str) -> None:
    shown = called(command, "--help")
    assert shown.code == 0 and shown.out.startswith(f"usage: python -m minilora.{command} ")
    assert called(command.replace("_", "-"), "--help") == shown


def test_a_command_that_there_is_not_is_told_with_the_nearest() -> None:
    assert_refused(called("trian", "--steps", "3"), "'trian'", "did you mean train?")
    assert_refused(called("xyz"), "'xyz'", "evaluate, generate")


def test_the_console_command_is_the_same_as_the_module() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    assert (name, target) == (minilora.__name__, f"{main.__module__}:{main.__name__}")


# --- Flags ---


@every_command
def test_an_unknown_flag_is_one_line_with_the_nearest_known_one(command: str) -> None:
    """Also where a flag that the command needs is missing, since that may be the one that was meant."""
    right = FLAGS.get(command, "--out")
    slip = right + right[-1]
    for words in ([slip, "x"], [f"{slip}=x"], [slip, "x", *NEEDED.get(command, [])]):
        result = called(command, *words)
        assert_refused(result, f"unknown flag {slip}: did you mean {right}?")
        assert result.err.count("\n") == 1 and not result.out


@every_command
def test_no_command_takes_the_beginning_of_a_flag_for_the_flag(command: str) -> None:
    start = FLAGS.get(command, "--out")[:-1]
    assert_refused(called(command, start, "x", *NEEDED.get(command, [])), f"unknown flag {start}: did you mean --")


def test_lr_is_the_learning_rate() -> None:
    settings, _, _ = choose_settings(parse(["--lr", "1e-4"]))
    assert settings.learning_rate == 1e-4 and settings.schedule == "cosine"


def test_a_word_that_belongs_to_no_flag_is_told() -> None:
    assert_refused(run("train", "rows.jsonl"), "'rows.jsonl' belongs to no flag")


def test_the_flags_of_plan_and_compare_are_told_beside_those_of_train() -> None:
    assert_refused(run("plan", "--labeled", "0.5"), "--labeled: did you mean --labelled?")
    assert_refused(run("plan", "--rnak", "4"), "--rnak: did you mean --rank?")
    assert_refused(run("compare", "--cyfer"), "--cyfer: did you mean --cipher?")


@given(st.sampled_from(["train", "evaluate", "merge"]), st.data())
def test_a_name_that_begins_a_known_one_is_told_as_that_one(command: str, data: st.DataObject) -> None:
    known = ["--steps", "--save-every", "--learning-rate", "--model"]
    name = data.draw(st.sampled_from(known))
    length = data.draw(st.integers(len("--s") + 1, len(name)))
    assert name in did_you_mean(name[:length], known)
    assert did_you_mean("--zzzz", known) == ""


@given(st.lists(st.lists(st.integers(0, 99), min_size=1), min_size=1))
def test_a_list_may_stand_in_one_word_or_in_several(groups: list[list[int]]) -> None:
    parser = Parser()
    parser.add_argument("--ranks", nargs="+", action=Listed, type=comma_list(int))
    words = [",".join(map(str, group)) for group in groups]
    assert parser.read(["--ranks", *words]).ranks == [number for group in groups for number in group]


def test_every_flag_that_takes_a_list_takes_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, _ = command_module("compare").parse(["--methods", "full,lora", "--ranks", "4,8", "--seeds", "1,2"])
    assert (args.methods, args.ranks, args.seeds) == (["full", "lora"], [4, 8], [1, 2])
    assert command_module("combine").parse(["--weights", "0.5,2", "--out", "x"]).weights == [0.5, 2]
    assert command_module("benchmark").parse(["-w", "W1,W2"]).workload == ["W1", "W2"]
    assert_refused(run("benchmark", "-w", "W1,W9"), "--workload 'W9'", "W1, W2")
    assert_refused(run("compare", "--seeds", "1,x"), "--seeds", "'1,x'")


# --- Terminals ---


@every_command
def test_help_is_shown_on_a_terminal_without_unicode(command: str) -> None:
    """The child's own frame does this: without it, the first … ends the command."""
    words = [sys.executable, "-c", f"from minilora.__main__ import main; main([{command!r}, '--help'])"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"usage: ") and done.stdout.isascii()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_a_terminal_cannot_show_is_escaped_as_json_does_it(text: str) -> None:
    """So that the lines of `generate --json` stay JSON there."""
    any_terminal()  # makes the way of escaping known
    line = json.dumps({"text": text}, ensure_ascii=False)
    for encoding in ("ascii", "latin-1", "cp1252"):
        assert json.loads(line.encode(encoding, "minilora.json").decode(encoding)) == {"text": text}
