"""Make rows from Python's standard library: the source of a function, and the first line of its docstring.

python -m minilora.rows.docstrings --out rows/

Nothing has to be installed. The rows are those of the Python that runs this, so another version of Python gives others.
A whole row, "SOURCE\\n# Summary: LINE", is Python that parses.
"""

import ast
import platform
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from minilora.cli import errors
from minilora.rows.parts import TaskRow, check_arguments, counts_in_words, row_parser, split, write_parts

OTHERS = {  # folders that are not the library itself
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "test", "tests", "idlelib", "lib2to3"),
    *("turtledemo", "ensurepip", "pydoc_data"),
}
MOST_CHARACTERS = 1000  # of a function's source: longer functions are left out, not cut
FEWEST_WORDS = 3  # of a line: "Constructor." says nothing that could be learned

Function = ast.FunctionDef | ast.AsyncFunctionDef


def library_files(library: Path) -> list[Path]:
    """Return the library's Python files in an order that does not depend on the file system. ValueError if none."""
    relative = (path.relative_to(library) for path in library.rglob("*.py"))
    chosen = sorted((path for path in relative if OTHERS.isdisjoint(path.parts)), key=Path.as_posix)
    if not chosen:
        raise ValueError(f"{library} holds no Python source")
    return [library / path for path in chosen]


def functions(file: Path) -> Iterator[tuple[str, str]]:
    """Return the (source without docstring, first line of the docstring) of a file's functions that fit.

    The docstring of a function that fits stands on lines of its own, is the only one in the function, and is not all
    of its body. Its first line is a whole paragraph, so that the sentence ends there; it has at least three words and
    does not occur in the source.
    """
    try:
        with tokenize.open(file) as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, about the library's source
            text = opened.read()
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # a file of another Python
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, Function) and (docstring := ast.get_docstring(node)) and len(node.body) > 1:
            line, *rest = docstring.splitlines()
            source = _without_docstring(node, lines)
            is_paragraph = not rest or not rest[0].strip()
            if source and is_paragraph and len(line.split()) >= FEWEST_WORDS and line not in source:
                yield source, line


def _without_docstring(function: Function, lines: list[str]) -> str:
    """Return the function's source with its decorators, or nothing if it cannot be cut out whole."""
    begin = min(node.lineno for node in (function, *function.decorator_list)) - 1
    docstring = function.body[0]
    kept = lines[begin : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    source = textwrap.dedent("\n".join(kept)).strip()
    try:
        [parsed] = ast.parse(source).body
    except (SyntaxError, ValueError):  # something else stood on the lines of the docstring
        return ""
    inner = (node for node in ast.walk(parsed) if isinstance(node, Function | ast.ClassDef))
    return "" if len(source) > MOST_CHARACTERS or any(map(ast.get_docstring, inner)) else source


def docstring_rows(files: list[Path]) -> dict[str, list[TaskRow]]:
    """Return one row for each different source, under the line of its docstring.

    So all functions that say the same are in one part, and no answer of a held-out row was seen in training.
    """
    rows: dict[str, list[TaskRow]] = {}
    seen = set()
    for file in files:
        for source, line in functions(file):
            if source not in seen:
                seen.add(source)
                row = {"prompt": f"{source}\n# Summary:", "completion": f" {line}"}
                rows.setdefault(line, []).append(row)
    return rows


def docstrings_command(argv: list[str] | None = None) -> None:
    """Parse, write, print."""
    args = row_parser("docstrings", __doc__.split("\n")[0]).read(argv)
    check_arguments(args)
    library = Path(sysconfig.get_path("stdlib"))
    files = library_files(library)
    rows = docstring_rows(files)
    parts = split(rows, args.seed, args.limit)
    write_parts(args.out, parts)
    count = sum(map(len, rows.values()))
    print(f"{count:,} functions with {len(rows):,} different lines in {len(files):,} files of {library}")
    print(counts_in_words(args.out, parts))
    print(f"These are the rows of Python {platform.python_version()}; other versions have others")


def main(argv: list[str] | None = None) -> int:
    return errors.run(docstrings_command, argv)


if __name__ == "__main__":
    sys.exit(main())
