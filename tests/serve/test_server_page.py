"""The page at /, in a real browser: a column for each model, answers as they stream, and a slider for the scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.browser import BROWSERS, CHROMIUM, chromium
from support.served import NAMES, Library, started

pytest.importorskip("starlette", reason="the server needs Starlette: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install -e '.[serve]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no browser is driven: pip install -e '.[browser]'")

DESK, PHONE = {"width": 1100, "height": 700}, {"width": 360, "height": 740}
expect = playwright.expect


@pytest.fixture(scope="module")
def address(library: Library) -> Iterator[str]:
    with started(*library.flags, "--max-tokens", 1000) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(f"there is no browser here: none of {', '.join(BROWSERS)}")
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open an address; at the end, the page must have complained of nothing and asked nobody else."""
    pages, complaints, asked = [], list[str](), set[str]()

    def open_page(address: str, **options: Any) -> Any:
        page = browser.new_page(**{"viewport": DESK, **options})
        pages.append(page)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.add(re.sub(r"(https?://[^/]*).*", r"\1", request.url)))
        page.goto(address)
        expect.set_options(timeout=60_000)
        asked.discard(address)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not [text for text in complaints if "401" not in text and "400" not in text]
    assert not {each for each in asked if not each.startswith("http://127.0.0.1:") and not each.startswith("data:")}


def column(page: Any, name: str) -> Any:
    return page.locator("section", has=page.get_by_role("heading", name=name, exact=True))


def answer(page: Any, name: str) -> Any:
    return column(page, name).locator(".answer")


def ask(page: Any, prompt: str, tokens: int = 12) -> None:
    page.get_by_label("The prompt is").select_option("text")
    page.get_by_label("most tokens").fill(str(tokens))
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("textbox", name="Prompt").press("Control+Enter")


def shown(text: str) -> str:
    """What a browser keeps of the control characters of a nonsense model."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")


def test_one_prompt_is_answered_by_the_base_and_every_adapter_side_by_side(
    open_page: Callable[..., Any], address: str, library: Library
) -> None:
    page = open_page(address)
    expect(page.get_by_role("heading", level=2)).to_have_text(list(NAMES))
    ask(page, "one and")
    for name in NAMES:
        expect(column(page, name).locator(".count")).to_contain_text("12 tokens")
        assert shown(answer(page, name).text_content()) == shown(library.alone(name, "one and", 12))
    tops = {column(page, name).bounding_box()["y"] for name in NAMES[:3]}
    assert len(tops) == 1, "side by side"
    page.get_by_label("The prompt is").select_option("chat")
    page.get_by_role("button", name="Ask").click()
    prompt = library.tokenizer.chat([{"role": "user", "content": "one and"}], add_generation_prompt=True)
    for name in NAMES:
        expect(column(page, name).locator(".count")).to_contain_text("12 tokens")
        assert shown(answer(page, name).text_content()) == shown(library.alone(name, prompt, 12))


def test_the_slider_turns_an_adapter_from_the_base_to_what_was_trained(
    open_page: Callable[..., Any], address: str, library: Library
) -> None:
    page = open_page(address)
    expect(page.get_by_role("slider")).to_have_count(3)  # neither the base nor a prefix has a scale
    ask(page, "one and")
    expect(column(page, "a").locator(".count")).to_contain_text("12 tokens")
    slider = page.get_by_role("slider", name="scale of a")
    slider.press("Home")
    expect(column(page, "a").locator("output")).to_have_text("0.00")
    expect(answer(page, "a")).to_have_text(answer(page, "base").text_content())
    for _ in range(20):
        slider.press("ArrowRight")
    expect(column(page, "a").locator("output")).to_have_text("1.00")
    expect(answer(page, "a")).not_to_have_text(answer(page, "base").text_content())
    expect(column(page, "a").locator(".count")).to_contain_text("12 tokens")
    assert shown(answer(page, "a").text_content()) == shown(library.alone("a", "one and", 12))
    slider.press("End")
    slider.dblclick()
    expect(column(page, "a").locator("output")).to_have_text("1.00")


def test_answers_appear_as_they_stream_and_escape_stops_them(open_page: Callable[..., Any], address: str) -> None:
    page = open_page(address)
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    ask(page, "one and", 1000)
    expect(stop).to_be_enabled()
    expect(answer(page, "a")).not_to_have_text("")
    assert answer(page, "a").get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    expect(stop).to_be_disabled()
    expect(column(page, "a").locator(".count")).to_have_text("stopped")
    told = page.request.get(f"{address}/health").json()
    assert told["tokens"] < 5 * 1000, "the rows are free again"


def test_a_mistake_is_shown_where_it_belongs(open_page: Callable[..., Any], address: str) -> None:
    page = open_page(address)
    ask(page, "one", 5000)
    expect(answer(page, "a")).to_have_text("max_tokens 5000 is more than this server gives: 1000")
    ask(page, "one", 3)
    expect(column(page, "a").locator(".count")).to_contain_text("3 tokens")


def test_on_a_phone_the_columns_stand_below_each_other_and_nothing_is_cut_off(
    open_page: Callable[..., Any], address: str
) -> None:
    page = open_page(address, viewport=PHONE)
    ask(page, "one and")
    boxes = [column(page, name).bounding_box() for name in NAMES]
    assert len({box["x"] for box in boxes}) == 1 and sorted(box["y"] for box in boxes) == [box["y"] for box in boxes]
    width = page.locator("html").evaluate("html => html.scrollWidth")
    assert width <= PHONE["width"], "no scrolling sideways"
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 32


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_both_be_read(open_page: Callable[..., Any], address: str, scheme: str) -> None:
    """The contrast of text is at least 4.5 to 1 (WCAG AA)."""
    page = open_page(address, color_scheme=scheme)
    ask(page, "one", 3)
    found = {}
    for selector in ("h1", "h2", ".soft", "label", ".answer", "button.first", "#stop"):
        behind = "section, form, body, button"
        ink, paper = page.locator(selector).first.evaluate(
            "(e, behind) => [getComputedStyle(e).color, getComputedStyle(e.closest(behind)).backgroundColor]", behind
        )
        found[selector] = contrast(ink, paper)
    assert min(found.values()) >= 4.5, found
    dark = luminance(page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")) < 0.2
    assert dark == (scheme == "dark")


def luminance(color: str) -> float:
    """The relative luminance of an `rgb(…)`, as WCAG defines it."""
    red, green, blue = (float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3])
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_asks_for_the_key_where_one_is_needed(open_page: Callable[..., Any], library: Library) -> None:
    with started(*library.flags, "--api-key", "sesame") as address:
        page = open_page(address)
        expect(page.get_by_role("alert")).to_contain_text("the API key is missing or wrong")
        page.get_by_label("API key").fill("sesame")
        ask(page, "one and")
        expect(column(page, "a").locator(".count")).to_contain_text("12 tokens")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.get_by_label("API key")).to_be_hidden()
        page.reload()
        expect(page.get_by_role("heading", level=2)).to_have_text(list(NAMES))  # the key is remembered
