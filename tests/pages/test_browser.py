"""The pages in a real browser: no error, no address asked for; by mouse and by keys, in light and dark, on a phone.

They need Chromium, and `pip install 'minilora[browser]'` for the package that drives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import CHROMIUM, chromium
from support.commands import good, read

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'minilora[browser]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page. At the end it must have made no complaint, and have asked for nothing but itself."""
    complaints: list[str] = []
    contexts = []

    def opened(path: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def comparison(folder: Path, hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "both.html"
    good("report", folder, hostile, "--out", out)
    return out


@pytest.fixture(params=["a run", "a hostile run", "a comparison"])
def path(request: pytest.FixtureRequest, folder: Path, hostile: Path, comparison: Path) -> Path:
    pages = {"a run": folder / "report.html", "a hostile run": hostile / "report.html", "a comparison": comparison}
    return pages[request.param]


def plot(page: Any, name: str) -> Any:
    return page.locator(f'[data-chart="{name}"]')


def test_every_curve_is_drawn(opened: Open, path: Path) -> None:
    page = opened(path)
    figures = page.locator(".plot")
    assert figures.count() >= 2
    for i in range(figures.count()):
        assert figures.nth(i).locator("canvas").bounding_box()["width"] > 200


def test_no_text_of_a_row_acts(opened: Open, hostile: Path, comparison: Path) -> None:
    for path in (hostile / "report.html", comparison):
        page = opened(path)
        assert "taken" not in page.title()
        assert page.locator("img").count() == 0 and page.locator("script").count() == 3


def test_a_click_on_a_cell_shows_its_singular_values(opened: Open, folder: Path) -> None:
    page = opened(folder / "report.html")
    page.locator('[data-cell="model.layers.1.self_attn.q_proj"]').click()
    found = read(folder / "report.json")["changes"]["model.layers.1.self_attn.q_proj"]
    shown = [float(text) for text in page.locator("#change .sigma b").all_text_contents()]
    assert shown == pytest.approx(found["singular_values"], rel=1e-3) and len(shown) == 4
    detail = page.locator("#change .detail").text_content()
    assert f"effective rank {found['effective_rank']:.2f}" in detail and f"{100 * found['ratio']:.2f} %" in detail


def test_the_map_is_walked_and_its_cells_are_chosen_without_a_mouse(opened: Open, folder: Path) -> None:
    page = opened(folder / "report.html")
    assert page.locator('.map .cell[tabindex="0"]').count() == 1, "one stop of the tab key for the whole map"
    page.locator('.map .cell[tabindex="0"]').focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#change .detail h4").text_content() == "model.layers.1.self_attn.k_proj"


def test_a_curve_is_zoomed_and_read_by_keys_and_by_buttons(opened: Open, folder: Path) -> None:
    page = opened(folder / "report.html")
    loss = plot(page, "loss")
    shown = loss.locator(".tools output")
    assert shown.text_content() == "step 0 to 70"
    loss.focus()
    page.keyboard.press("+")
    low, high = (float(number) for number in re.findall(r"[\d.]+", shown.text_content()))
    assert high - low == pytest.approx(36, abs=1.5)
    page.keyboard.press("Shift+ArrowRight")
    assert float(re.findall(r"[\d.]+", shown.text_content())[0]) > low
    page.keyboard.press("0")
    assert shown.text_content() == "step 0 to 70"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    values = loss.locator(".u-legend .u-value").all_text_contents()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert values[:2] == ["2", f"{lines[1]['loss']:.3f}"]
    loss.get_by_role("button", name="zoom in").click()
    assert shown.text_content() != "step 0 to 70"
    loss.get_by_role("button", name="show all").click()
    assert shown.text_content() == "step 0 to 70"


def test_a_curve_is_zoomed_by_dragging(opened: Open, folder: Path) -> None:
    page = opened(folder / "report.html")
    plot(page, "loss").scroll_into_view_if_needed()
    box = plot(page, "loss").locator(".u-over").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, middle, steps=4)
    page.mouse.up()
    page.wait_for_timeout(50)
    low, high = (float(number) for number in re.findall(r"[\d.]+", plot(page, "loss").locator("output").text_content()))
    assert (low, high) == pytest.approx((17, 53), abs=1.5)


def test_tokens_are_read_without_a_mouse(opened: Open, folder: Path) -> None:
    page = opened(folder / "report.html")
    row = page.locator("#tokens .tokens").first
    row.focus()
    page.keyboard.press("ArrowRight")
    found = read(folder / "report.json")["tokens"][0]
    place = next(i for i, value in enumerate(found["now"]) if value is not None)
    told = page.locator("#tokens output").text_content()
    assert f"loss {found['before'][place]:.3f} before, {found['now'][place]:.3f} now" in told


def test_a_choice_shows_the_other_model_and_the_other_answers(opened: Open, folder: Path) -> None:
    page = opened(folder / "report.html")
    token = page.locator("#tokens .token[title]").first
    before = token.evaluate("one => getComputedStyle(one).backgroundColor")
    page.locator('#tokens input[value="before"]').check()
    assert token.evaluate("one => getComputedStyle(one).backgroundColor") != before
    counts = read(folder / "report.json")["answers"]["counts"]
    for kind, count in counts.items():
        page.locator(f'#answers input[value="{kind}"]').check()
        assert page.locator("#answers .answer:visible").count() == count


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_nothing_is_wider_than_the_screen(opened: Open, path: Path, width: int) -> None:
    """Wide tables scroll in a frame of their own."""
    page = opened(path, **{**PHONE, "viewport": {"width": width, "height": 740}, "is_mobile": width < 700})
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    if page.locator(".cell").count():
        page.locator(".cell").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground_in_light_and_in_dark(opened: Open, folder: Path, scheme: str) -> None:
    """By the contrast that WCAG 2 asks of text, 4.5 to 1, on the strongest colours of map and tokens too."""
    page = opened(folder / "report.html", color_scheme=scheme)
    contrasts = page.evaluate(CONTRASTS)
    assert contrasts["body"] >= 7 and min(contrasts.values()) >= 4.5, contrasts
    light = page.evaluate("matchMedia('(prefers-color-scheme: light)').matches")
    assert light == (scheme == "light")


CONTRASTS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const paint = (colors) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (one) => {
        const grounds = [];
        for (let at = one; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const ground = light(paint(grounds)), text = light(paint([...grounds, getComputedStyle(one).color]));
        return (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
    };
    const found = { body: contrast(document.body) };
    for (const selector of [".lead", ".note", "nav a", ".cards div", "mark", "summary", ".detail", ".token.prompt"]) {
        const one = document.querySelector(selector);
        if (one) found[selector] = contrast(one);
    }
    for (const [name, selector] of [["strongest cell", ".cell"], ["strongest token", ".token[title]"]]) {
        const one = document.querySelector(selector);
        for (const share of ["--ratio", "--rank", "--now", "--before"]) one.style.setProperty(share, 1);
        found[name] = contrast(one);
    }
    return found;
}"""
