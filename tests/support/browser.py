"""Headless Chromium, and the pages of a built book in it with what it complains of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDE, PHONE = {"width": 1600, "height": 1000}, {"width": 400, "height": 800}


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    root = os.name != "nt" and os.geteuid() == 0  # for whom Chromium has no sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, page: Path, viewport: dict[str, int], scheme: str = "light", query: str = "") -> Iterator[Any]:
    """A page, with all that the browser complained of while it was open in `page.complaints`."""
    tab = browser.new_page(viewport=viewport, color_scheme=scheme)
    tab.complaints = []
    tab.on("console", lambda message: message.type in ("error", "warning") and tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("requestfailed", lambda request: tab.complaints.append(f"not found: {request.url}"))
    tab.on("request", lambda request: request.url.startswith("http") and tab.complaints.append(f"asks {request.url}"))
    tab.goto(page.as_uri() + query, timeout=120_000)  # milliseconds, on a busy machine, until all is loaded
    yield tab
    tab.close()
