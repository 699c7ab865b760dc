"""The book: built without a warning, every link leads somewhere, and a browser has nothing to complain of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx", reason="pip install -e '.[book]'")
pytest.importorskip("furo", reason="pip install -e '.[book]'")
pytest.importorskip("myst_nb", reason="pip install -e '.[book]'")

from bs4 import BeautifulSoup
from support.browser import CHROMIUM, PHONE, WIDE, chromium, opened
from support.commands import assert_refused, run

from minilora.book.equations import DOCS, ROOT, definitions, table
from minilora.book.figures import FIGURES

PAGES = ("README", "docs/README", "docs/lora", "docs/notebook", "docs/operations", "docs/dora", "docs/model")
PAGES += ("docs/training", "docs/specification", "minilora/lora.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book, built once, also where several processes share the tests."""
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    place = tmp_path_factory.getbasetemp().parent / f"book-{run_id}" if run_id else tmp_path_factory.mktemp("book")
    if run_id:
        try:
            place.mkdir()
        except FileExistsError:  # another process builds it
            while not (place / "done").exists():
                time.sleep(0.5)
            return place / "site"
    command = [sys.executable, "-m", "minilora.book", "--out", str(place / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    (place / "done").write_text(done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    return place / "site"


@cache
def read(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with chromium() as browser:
        yield browser


# --- The pages ---


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: {*re.findall(r'\bid="([^"]+)"', text)} for path, text in pages.items()}
    broken = []
    for path, text in pages.items():
        for tag, target in {*re.findall(r'<(a|img|script|link)\b[^>]*?\b(?:href|src)="([^"]*)"', text)}:
            parts = urlsplit(unescape(target))
            if parts.scheme:
                assert tag == "a" or parts.scheme == "data", f"{path} loads {target}"
                continue
            there = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            lost = parts.fragment and there in anchors and unquote(parts.fragment) not in anchors[there]
            if not there.is_file() or lost:
                broken.append((path.name, target))
    assert len(pages) > 100 and broken == []


def test_each_equation_has_beside_it_its_functions_as_they_are_and_all_its_laws(site: Path) -> None:
    for row in table():
        page = read(site / row.page.relative_to(ROOT).with_suffix(".html"))
        together = page.find(id=row.equation)
        assert together.find(class_="math") and f"\\tag{{{row.equation}}}" in together.text
        assert [li.text.strip() for li in together.find(class_="laws").find_all("li")] == [law for law, _ in row.tests]
        shown = [block.text.strip() for block in page.find_all(class_="function")]
        for name, path in row.functions:
            assert definitions(path)[name].text.strip() in shown
            assert name in together.text


def test_a_function_and_a_law_lead_to_the_very_lines(site: Path) -> None:
    lora = read(site / "docs" / "lora.html")
    for words, lines in (("lora_backward", "def lora_backward("), ("merged equals adapted", "def test_merged_equals_")):
        link = next(a for a in lora.find_all("a") if a.text == words)
        path, _, anchor = link["href"].partition("#")
        target = read((site / "docs" / path).resolve()).find(id=anchor)
        following = "".join(str(getattr(part, "text", part)) for part in target.next_siblings)
        assert lines in following[:200].partition("\n\n")[0]


def test_the_sidebar_has_every_page_once_under_the_captions_of_the_first_page(site: Path) -> None:
    sidebar = read(site / "README.html").find(class_="sidebar-tree")
    groups = {}
    for caption in sidebar.find_all(class_="caption"):
        links = caption.find_next_sibling("ul").select('a:not([href*="#"])')
        groups[caption.text] = [(site / link["href"]).relative_to(site).with_suffix("").as_posix() for link in links]
    bold = re.findall(r"^\*\*(.+)\*\*$", (DOCS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [*groups] == ["Start", *bold]
    listed = [page for pages in groups.values() for page in pages]
    documents = [path.stem for path in DOCS.glob("*.md")] + ["notebook"]
    assert sorted(listed) == sorted([f"docs/{name}" for name in documents] + ["weights/README", "tests/golden/README"])


# --- In a browser ---


def test_a_browser_has_nothing_to_complain_of_on_ten_pages(site: Path, browser: Any) -> None:
    for name in PAGES:
        with opened(browser, site / f"{name}.html", WIDE) as page:
            assert page.complaints == [], name
            assert page.locator(".katex-error").count() == 0, name
            assert page.locator(".math:not(:has(.katex))").count() == 0, name


def test_code_stands_beside_its_equation_on_a_wide_screen_and_below_it_on_a_phone(site: Path, browser: Any) -> None:
    def boxes(page: Any) -> list[dict[str, float]]:
        return [page.locator(f"#L4 > {part}").bounding_box() for part in (".math-wrapper", ".beside")]

    with opened(browser, site / "docs" / "lora.html", WIDE) as page:
        equation, code = boxes(page)
        assert code["x"] > equation["x"] + equation["width"]
        assert abs(code["y"] - equation["y"]) < 60
    with opened(browser, site / "docs" / "lora.html", PHONE) as page:
        equation, code = boxes(page)
        assert code["y"] > equation["y"] + equation["height"] - 1  # but for rounding


def test_no_page_is_wider_than_a_phone(site: Path, browser: Any) -> None:
    for name in PAGES:
        with opened(browser, site / f"{name}.html", PHONE) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name


def test_the_first_steps_move_B_before_A_under_the_keys_of_a_keyboard(site: Path, browser: Any) -> None:
    with opened(browser, site / "docs" / "lora.html", WIDE) as page:
        figure = page.locator("figure[data-figure=first-steps]")
        slider = figure.get_by_role("slider")
        slider.focus()

        def norms() -> dict[str, float]:
            maps = figure.locator(".map:has(canvas)").all()
            said = [(m.locator("b").inner_text(), m.locator(".caption").inner_text()) for m in maps]
            return {name: float(caption.split("=")[1]) for name, caption in said}

        start = norms()
        assert start["Bᵀ"] == start["A − A₀"] == start["dA"] == start["ΔW = s B A"] == 0 < start["dBᵀ"]
        page.keyboard.press("ArrowRight")
        first = norms()
        assert first["A − A₀"] == 0 < min(first["Bᵀ"], first["dA"], first["ΔW = s B A"])
        page.keyboard.press("End")
        assert figure.locator("output").inner_text() == "after 10 steps"
        assert min(norms().values()) > 0


def test_the_slider_of_ranks_cuts_a_change_and_shows_the_loss(site: Path, browser: Any) -> None:
    with opened(browser, site / "docs" / "lora.html", WIDE) as page:
        figure = page.locator("figure[data-figure=rank-against-loss]")
        figure.get_by_role("slider").focus()
        losses = {}
        for key, rank in (("Home", "rank 0"), ("ArrowRight", "rank 1"), ("End", "all of ΔW")):
            page.keyboard.press(key)
            assert figure.locator("output").inner_text() == rank
            losses[rank] = float(figure.locator("text.value").text_content())
        assert losses["rank 0"] > losses["rank 1"] > losses["all of ΔW"]
        assert "100 % of ‖ΔW‖²" in figure.locator("p").inner_text()


def test_the_search_works_without_a_network(site: Path, browser: Any) -> None:
    with opened(browser, site / "search.html", WIDE, query="?q=rslora") as page:
        found = page.locator("#search-results li a", has_text=re.compile("^LoRA$"))
        found.first.wait_for(timeout=120_000)  # results come one after the other
        assert page.complaints == []


# --- The command ---


def test_the_still_pictures_are_those_that_the_pages_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minilora.book.numbers.FULL_STEPS", 2)
    assert run("book", "--pictures", tmp_path).code == 0
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {*FIGURES}
    for name in drawn:
        assert f"(images/{name})" in (DOCS / "lora.md").read_text(encoding="utf-8")
        assert (DOCS / "images" / name).is_file()


def test_a_folder_of_something_else_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert_refused(run("book", "--out", tmp_path), "--out", str(tmp_path))
    assert (tmp_path / "mine").read_text() == "mine"
