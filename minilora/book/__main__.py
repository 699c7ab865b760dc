"""Build the book: docs/ as a site in which each equation stands beside the function that computes it.

It needs no network: packages come from `pip install -e '.[book]'`, and what a browser loads lies in docs/. Open
index.html in the folder. Whatever Sphinx would warn of is an error, and then nothing is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from minilora.book.equations import DOCS, ROOT
from minilora.cli import errors
from minilora.cli.parser import Parser
from minilora.formats.whole import building, check_new

BUILT = ".buildinfo"  # Sphinx leaves it in what it has built


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m minilora.book",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("site"),
        help="the site's folder: a new one, or an older book (%(default)s)",
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="instead, draw the still pictures that stand in docs/images"
    )
    return parser.read(argv)


def book_command(argv: list[str] | None) -> None:
    args = parse(argv)
    if not (DOCS / "conf.py").is_file():
        raise ValueError(f"{DOCS} holds no book: run this in a clone of the repository")
    if args.pictures:
        draw_pictures(args.pictures)
    else:
        build(args.out)
        print(f"open {args.out / 'index.html'}")


def draw_pictures(folder: Path) -> None:
    from minilora.book.pictures import draw_first_steps, draw_rank_against_loss

    print(draw_first_steps(folder / "first-steps.png"))
    print(draw_rank_against_loss(folder / "rank-against-loss.png"))


def build(out: Path) -> None:
    """The site at `out`, whole or not at all; an older book there is replaced. ValueError for a fault of the pages."""
    try:
        from sphinx.cmd.build import build_main
    except ImportError as error:
        raise ValueError(f"{error}: the book needs pip install -e '.[book]'") from error
    if not (out / BUILT).is_file():
        check_new(out)
    with tempfile.TemporaryDirectory() as place:
        site = Path(place, "site")
        where = ["-c", str(DOCS), "-d", str(Path(place, "doctrees")), str(ROOT), str(site)]
        if build_main(["-q", "-W", "--keep-going", *where]):
            raise ValueError("the pages have faults, told above: nothing was written")
        if (out / BUILT).is_file():
            shutil.rmtree(out)
        with building(out) as folder:
            shutil.copytree(site, folder, dirs_exist_ok=True)


def main(argv: list[str] | None = None) -> int:
    return errors.run(book_command, argv)


if __name__ == "__main__":
    sys.exit(main())
