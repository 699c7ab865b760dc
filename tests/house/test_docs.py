"""The pages of docs/ keep their word: links lead somewhere, and each equation has its function and its property."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from support.pages import anchors, displayed, prose
from tools import mutation, settings_page, specification, specification_of_others

from minilora.book.equations import DOCS, LINK, ROOT, TABLE, definitions, file_of, table
from minilora.figures.tables import BEGIN, END

OTHERS = ("README.md", "weights/README.md", "tests/golden/README.md")
PAGES = [*sorted(DOCS.glob("*.md")), *filter(Path.is_file, (ROOT / name for name in OTHERS))]
MATHEMATICS = [
    ROOT / "minilora" / name
    for name in (
        "lora.py", "model/block.py", "model/model.py",
        "training/schedules.py", "training/step.py",
    )
]  # fmt: skip
for folder in ("ops", "training/optimizers"):
    MATHEMATICS += sorted((ROOT / "minilora" / folder).glob("*.py"))
NAMING = MATHEMATICS + [
    ROOT / "minilora" / name for name in ("model/sites.py", "model/generation.py", "runs/evaluation.py")
]  # whose docstrings name their equations

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def public_mathematics(path: Path) -> set[str]:
    """The public functions of a file, and its public classes that compute: those with methods, protocols apart."""
    names = {name for name in definitions(path) if not re.search(r"(^|\.)_", name)}
    protocols = set(re.findall(r"^class (\w+)\(Protocol\)", path.read_text(encoding="utf-8"), flags=re.M))
    classes = {name.partition(".")[0] for name in names if "." in name}
    functions = {name for name in names if "." not in name and not name[0].isupper()}
    return functions | (classes - protocols)


def equations_named(path: Path) -> dict[str, set[str]]:
    """The equations that the docstrings of a function, or of a class and its methods, say they compute."""
    named: dict[str, set[str]] = {}
    for definition in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(definition, ast.FunctionDef | ast.ClassDef):
            for node in ast.walk(definition):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    for numbers in re.findall(r"\(docs: (.*?)\)", ast.get_docstring(node) or ""):
                        named.setdefault(definition.name, set()).update(numbers.split(", "))
    return named


# --- Links ---


@each_page
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    broken = []
    for _, target in LINK.findall(prose(page)):
        if re.match(r"https?://", target):
            continue
        path, (_, _, anchor) = file_of(page, target), target.partition("#")
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_every_page_is_linked_from_the_first_one() -> None:
    linked = {file_of(TABLE, target) for _, target in LINK.findall(prose(TABLE))}
    assert set(DOCS.glob("*.md")) - {TABLE} <= linked


def test_every_test_file_is_in_the_order_of_reading() -> None:
    pages = (DOCS / "testing.md", DOCS / "specification.md")
    linked = {file_of(page, target) for page in pages for _, target in LINK.findall(prose(page))}
    assert set((ROOT / "tests").rglob("test_*.py")) <= linked
    assert {path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"} <= linked


# --- The table of equations ---


def test_every_equation_has_one_number_one_row_and_every_row_its_equation() -> None:
    numbered = [
        (number, page) for page in PAGES for block in displayed(page) for number in re.findall(r"\\tag\{(.*?)\}", block)
    ]
    assert len({number for number, _ in numbered}) == len(numbered), "a number is given twice"
    rows = [(row.equation, row.page) for row in table()]
    assert sorted(rows) == sorted(numbered)


def test_every_number_mentioned_is_that_of_an_equation() -> None:
    known = {row.equation for row in table()}
    mentioned = {number for page in PAGES for number in re.findall(r"\(([LOMTC]\d+)\)", prose(page))}
    assert mentioned <= known


def test_every_function_in_the_table_exists() -> None:
    missing = [name for row in table() for name, path in row.functions if name not in definitions(path)]
    assert not missing
    assert all(row.functions for row in table())


def test_every_property_in_the_table_is_a_test() -> None:
    missing = [
        statement
        for row in table()
        for statement, path in row.tests
        if f"test_{statement.replace(' ', '_')}" not in definitions(path)
    ]
    assert not missing
    assert all(row.tests for row in table())


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_of_the_mathematics_has_a_row(path: Path) -> None:
    rows = {(name.partition(".")[0], file) for row in table() for name, file in row.functions}
    assert {name for name in public_mathematics(path) if (name, path) not in rows} == set()


@pytest.mark.parametrize("path", NAMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_the_equations_that_the_table_gives_their_function(path: Path) -> None:
    """As "(docs: L3)". Those of a method may stand in the docstring of its class."""
    in_table: dict[str, set[str]] = {}
    for row in table():
        for name, file in row.functions:
            if file == path:
                in_table.setdefault(name.partition(".")[0], set()).add(row.equation)
    assert equations_named(path) == in_table


def test_the_measured_figures_beside_the_derivation_are_those_of_the_claims() -> None:
    words = " ".join((DOCS / "lora.md").read_text(encoding="utf-8").split())
    judged = json.loads((DOCS / "claims.json").read_text(encoding="utf-8"))
    evidence = {(model, claim): found for model, claims in judged.items() for claim, found, _ in claims}
    of_ranks = "the change of full fine-tuning has a low intrinsic rank"
    largest, random, kept, enough = re.findall(r"(?:hold|numbers|keeps|and rank) (\d+)", evidence["tinysmol", of_ranks])
    for sentence in (
        f"the 8 largest of 256 singular values hold {largest} %",
        f"where random numbers have {random} %",
        f"Cut to rank 8, $\\Delta W$ keeps {kept} % of the gain in held-out loss,",
        f"and with rank {enough} more than 95 %",
    ):
        assert sentence in words
    assert "rank 1 is enough for 95 %" in evidence["SmolLM2-135M-Instruct", of_ranks]
    enciphered = evidence["tinysmol", "for extreme distribution shifts full fine-tuning may be necessary"]
    full, lora, many = re.findall(r"\d\.\d+", enciphered)
    assert f"rank 8 ends at a loss of {lora}, rank 64 at {many}, full fine-tuning at {full}" in words


# --- The list of explained mutants ---


def test_every_explained_mutant_is_of_a_line_that_is_there() -> None:
    for mutant in mutation.explained():
        parts = mutant.function.split(".")
        files = [ROOT.joinpath(*parts[:n]).with_suffix(".py") for n in range(1, len(parts))]
        (file,) = filter(Path.is_file, files)
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        assert set(mutant.before) <= set(lines), mutant


def test_the_table_of_mutants_was_made_from_the_files_as_they_are() -> None:
    stale = mutation.stale()
    assert not stale, (
        f"docs/mutation.md is stale: {len(stale)} files have no row, or have changed since it was made. "
        f"Run python tests/tools/mutation.py {' '.join(stale)}"
    )


# --- What GitHub renders ---


@each_page
def test_displayed_mathematics_is_balanced(page: Path) -> None:
    for block in displayed(page):
        bare = re.sub(r"\\[{}]", "", block)
        assert bare.count("{") == bare.count("}"), block
        assert re.findall(r"\\begin\{(\w+)\}", block) == re.findall(r"\\end\{(\w+)\}", block)[::-1], block
        assert len(re.findall(r"\\Bigl|\\bigl", block)) == len(re.findall(r"\\Bigr|\\bigr", block)), block


@each_page
def test_inline_mathematics_is_closed_on_its_line_and_survives_markdown(page: Path) -> None:
    """A dollar opens after a space or a bracket and closes before a space or punctuation. Between them, Markdown would
    swallow a backslash before punctuation, and take asterisks for emphasis."""
    for line in prose(page).splitlines():
        dollars = line.count("$")
        assert dollars % 2 == 0, line
        well_formed = re.findall(r"(?<![^\s(*])\$([^$\s](?:[^$]*[^$\s])?)\$(?![^\s.,;:)?])", line)
        assert 2 * len(well_formed) == dollars, line
        for formula in well_formed:
            assert not re.search(r"\\[^a-zA-Z]|\*|<", formula), formula
            assert formula.count("{") == formula.count("}"), formula


def test_the_page_of_settings_says_what_the_declarations_say() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), (
        "docs/settings.md is stale: run python tests/tools/settings_page.py"
    )


def test_the_page_of_the_specification_says_what_the_tests_say() -> None:
    assert specification.PAGE.read_text(encoding="utf-8") == specification.page(), (
        "docs/specification.md is stale: run python tests/tools/specification.py"
    )


def test_the_page_of_others_says_what_was_found_of_every_law() -> None:
    found = specification_of_others.results()
    assert found.keys() == specification_of_others.OTHERS.keys()
    part = specification_of_others.PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert part.strip() == specification_of_others.page_part(found).strip(), (
        "docs/specification-of-others.md is stale: run python tests/tools/specification_of_others.py"
    )
    laws = {
        specification.spelt(name.removeprefix("test_").replace("_", " "))
        for path in specification.LAWS
        for name in definitions(path)
        if name.startswith("test_")
    }
    for name, run in found.items():
        asked = {law.partition(" (")[0] for law in specification_of_others.outcomes(run)}
        assert asked == laws, f"{name} was not asked every law as it is now: run it again"
