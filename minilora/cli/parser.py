"""A command line on which a mistake is told in one line: no flag is abbreviated, an unknown one is told its nearest."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse without its abbreviations and its page of usage. Mistakes are ValueErrors, as all others of a command.

    Flags may be written with _ for -, as other tools have them. `also` are flags that belong to this command, though
    another parser reads them.
    """

    def __init__(self, *, also: Iterable[str] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.also = set(also)

    @property
    def flags(self) -> set[str]:
        """The flags that --help shows."""
        return {name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings}

    def read(self, argv: list[str] | None) -> argparse.Namespace:
        """The command line, sys.argv's if None. ValueError for what no flag takes."""
        words = dashed(argv)
        for flag in (word.partition("=")[0] for word in words):
            if re.fullmatch(r"--?[a-zA-Z][\w-]*", flag) and flag not in self._option_string_actions:
                self.error(f"unknown flag {flag}: {did_you_mean(flag, self.flags | self.also) or '--help lists all'}")
        args, others = self.parse_known_args(words)
        if others:
            self.error(f"{others[0]!r} belongs to no flag: --help lists them")
        return args

    def read_known(self, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """The flags of this parser, and all other words."""
        return self.parse_known_args(dashed(argv))

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def dashed(argv: list[str] | None) -> list[str]:
    """The command line, sys.argv's if None, with `--lora_r` written as `--lora-r`. Values stay as they are."""
    argv = sys.argv[1:] if argv is None else argv
    return [re.sub(r"^--\w[\w-]*", lambda name: name[0].replace("_", "-"), word) for word in argv]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean --epochs?`: the names that begin like the word, else the nearest; nothing if none is near."""
    names = sorted(known)
    near = [name for name in names if name.startswith(word)] or difflib.get_close_matches(word, names, n=1)
    return f"did you mean {' or '.join(near[:3])}?" if near else ""


class Listed(argparse.Action):
    """A list in one word or in several: `--ranks 4,8 16`. Its `type` is `comma_list` of the entries' type."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [entry for word in values for entry in word])


def comma_list(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """The entries of a word that may hold several."""

    def entries(word: str) -> list[T]:
        return [kind(entry) for entry in word.split(",") if entry.strip()]

    entries.__name__ = getattr(kind, "__name__", "list")  # for argparse's words: invalid int value
    return entries


def any_terminal() -> None:
    """Let this process print to a terminal of any encoding, and read bytes of any.

    What the terminal cannot show is printed as JSON escapes it, so that a line of JSON stays one. A byte that is no
    text becomes a lone surrogate, which is refused where the text is used, by name.
    """
    codecs.register_error("minilora.json", _as_json)
    for stream, errors in (
        (sys.stdout, "minilora.json"),
        (sys.stderr, "minilora.json"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # it has been read from
                stream.reconfigure(errors=errors)


def _as_json(error: UnicodeError) -> tuple[str, int]:
    """`\\u2026` for …, and two of them for a character beyond U+FFFF."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
