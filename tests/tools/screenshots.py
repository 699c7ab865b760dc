"""Take pictures of a book's pages, to look at: python tests/tools/screenshots.py SITE OUT [PAGE …]

Each page on a wide screen, on a phone and in the dark.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.browser import PHONE, WIDE, chromium, opened

PAGES = ("README", "docs/README", "docs/lora", "docs/notebook", "docs/operations", "docs/qlora", "docs/model")
PAGES += ("docs/training", "docs/specification", "docs/comparison")


def main(site: Path, out: Path, *pages: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for page in pages or PAGES:
            for name, viewport, scheme in (("wide", WIDE, "light"), ("phone", PHONE, "light"), ("dark", WIDE, "dark")):
                with opened(browser, site.resolve() / f"{page}.html", viewport, scheme) as tab:
                    tab.screenshot(path=out / f"{page.replace('/', '-')}-{name}.png", full_page=True)
                    print(page, name, *tab.complaints)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
