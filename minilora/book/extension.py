"""A Sphinx extension: what the pages of docs/ say in plain Markdown, shown as a book.

Each numbered equation gets the functions that compute it beside it, and the tests that state it, by the table in
docs/README.md. A number such as (L3) leads to its equation, and a link to a file of code to a page that shows
the file. KaTeX sets the mathematics in the reader's browser, from files that lie beside the pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from posixpath import relpath
from typing import Any

from docutils import nodes

from minilora.book import figures
from minilora.book.equations import DOCS, LINK, ROOT, Row, definitions, file_of, table
from minilora.book.sources import anchor_in, source_pages, sources


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("katex", (inline_math, None), (displayed_math, None))
    app.connect("source-read", add_contents)
    app.connect("doctree-read", shape, priority=400)  # before Sphinx gathers downloads
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": False, "parallel_write_safe": True}


# --- Mathematics ---


def inline_math(writer: Any, node: nodes.Node) -> None:
    writer.body.append(f'<span class="math">{writer.encode(node.astext())}</span>')
    raise nodes.SkipNode


def displayed_math(writer: Any, node: nodes.Node) -> None:
    writer.body.append(f'<div class="math displayed">{writer.encode(node.astext())}</div>\n')
    raise nodes.SkipNode


# --- Contents ---


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """The pages in the groups and the order of docs/README.md, as the table of contents of the first page."""
    if docname == "README":
        for caption, pages in contents().items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```", ""])


def contents() -> dict[str, list[str]]:
    """The pages by the bold line above them in docs/README.md. One that is linked above and below is below."""
    first = DOCS / "README.md"
    listed, _, _ = first.read_text(encoding="utf-8").partition("\n## ")
    groups = re.split(r"^\*\*(.+)\*\*$", f"**Start**\n{listed}", flags=re.MULTILINE)[1:]
    group_of = {first: groups[0]}
    for caption, text in zip(groups[::2], groups[1::2], strict=True):
        group_of |= {file_of(first, target): caption for _, target in LINK.findall(text)}
    pages: dict[str, list[str]] = {caption: [] for caption in groups[::2]}
    for path, caption in group_of.items():
        if path.suffix in (".md", ".ipynb") and path != ROOT / "README.md":
            pages[caption].append(path.relative_to(ROOT).as_posix())
    return pages


def add_index(app: Any, error: Exception | None) -> None:
    """The first page under the name that a browser opens in a folder."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "index.html").write_bytes((Path(app.outdir) / "README.html").read_bytes())


# --- Pages ---


def shape(app: Any, doctree: nodes.document) -> None:
    page = Page(app)
    page.lead_links_to_files(doctree)
    page.lead_numbers_to_equations(doctree)
    page.put_code_beside_equations(doctree)
    figures.bring_to_life(doctree)


@cache
def rows() -> dict[str, Row]:
    return {row.equation: row for row in table()}


def leads_to(uri: str, *words: nodes.Node) -> nodes.reference:
    return nodes.reference("", "", *words, refuri=uri, internal=True)


class Page:
    """The page that is being read. It remembers which functions it has shown."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.docname: str = app.env.docname
        self.file = Path(app.env.doc2path(self.docname))
        self.shown: dict[tuple[str, Path], str] = {}

    def uri(self, path: Path, anchor: str = "") -> str:
        """The page of a file of the repository, seen from this one."""
        name = path.relative_to(ROOT).as_posix()
        name = re.sub(r"\.(md|ipynb)$", "", name)
        return relpath(f"{name}.html", str(Path(self.docname).parent)) + (f"#{anchor}" if anchor else "")

    def lead_links_to_files(self, doctree: nodes.document) -> None:
        for node in [*doctree.findall(lambda node: "reftarget" in getattr(node, "attributes", {}))]:
            assert isinstance(node, nodes.Element)
            path = file_of(self.file, node["reftarget"])
            if path in sources():
                node.replace_self(leads_to(self.uri(path, anchor_in(path, node.astext())), *node.children))

    def lead_numbers_to_equations(self, doctree: nodes.document) -> None:
        apart = (nodes.reference, nodes.literal, nodes.literal_block, nodes.title, nodes.math, nodes.math_block)
        for text in [*doctree.findall(nodes.Text)]:
            parent: Any = text.parent
            while parent is not None and not isinstance(parent, apart):
                parent = parent.parent
            if parent is None and len(pieces := [*self.with_links(str(text))]) > 1:
                text.parent.replace(text, pieces)

    def with_links(self, words: str) -> Iterator[nodes.Node]:
        """`… by (L3) …`, in which L3 leads to its equation."""
        for piece in re.split(r"((?<=\()[A-Z]\d+(?=\)))", words):
            if piece in rows():
                yield leads_to(self.uri(rows()[piece].page, piece), nodes.Text(piece))
            elif piece:
                yield nodes.Text(piece)

    def put_code_beside_equations(self, doctree: nodes.document) -> None:
        for block in [*doctree.findall(nodes.math_block)]:
            number = "".join(re.findall(r"\\tag\{(.*?)\}", block.astext()))
            if number in rows() and rows()[number].page == self.file:
                together = nodes.container(classes=["equation"], ids=[number])
                block.replace_self(together)
                together += [nodes.container("", *self.beside(rows()[number]), classes=["beside"]), block]

    def beside(self, row: Row) -> Iterator[nodes.Node]:
        """The functions of an equation, each shown in full where the page first needs it, and its laws."""
        for name, path in row.functions:
            where = leads_to(self.uri(path, name), nodes.literal("", name))
            caption = nodes.paragraph("", "", where, nodes.Text(f" in {path.relative_to(ROOT).as_posix()}"))
            first = self.shown.setdefault((name, path), row.equation)
            if first != row.equation:
                caption += [nodes.Text(", shown at "), leads_to(f"#{first}", nodes.Text(first))]
            yield caption
            if first == row.equation:
                code = definitions(path)[name].text
                yield nodes.literal_block(code, code, language="python", classes=["function"])
        laws = nodes.bullet_list(classes=["laws"])
        for law, path in row.tests:
            link = leads_to(self.uri(path, f"test_{law.replace(' ', '_')}"), nodes.Text(law))
            laws += nodes.list_item("", nodes.paragraph("", "", link))
        yield laws
