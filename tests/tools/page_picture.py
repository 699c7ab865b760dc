"""Take the picture of the server's page in docs/serve.md.

python -m minilora.serve --model M --adapter kitchen=runs/a --adapter pirate=runs/b --port 8000
python tests/tools/page_picture.py http://127.0.0.1:8000/ "Two soups and three cardamom buns, please."
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.browser import chromium

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "serve.png"


def take(address: str, prompt: str, most_tokens: int = 40) -> None:
    """Ask the prompt, wait for all answers, and write the picture."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 486})
        page.goto(address)
        page.get_by_label("most tokens").fill(str(most_tokens))
        page.get_by_role("textbox", name="Prompt").fill(prompt)
        page.get_by_role("textbox", name="Prompt").press("Control+Enter")
        page.get_by_role("button", name="Stop", disabled=False).wait_for()
        page.get_by_role("button", name="Stop", disabled=True).wait_for(timeout=600_000)
        page.screenshot(path=PICTURE)


if __name__ == "__main__":
    take(*sys.argv[1:3])
