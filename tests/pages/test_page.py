"""The page of a run: its figures are those of the run's files, and it is one file that loads nothing."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pages.conftest import HOSTILE
from support.commands import assert_refused, contents, good, read, run

from minilora.pages import charts, page
from minilora.pages.charts import MOST_POINTS, Series, chart, thinned
from minilora.pages.page import FILTERS, is_page
from minilora.pages.view import MOST_TABLE_ROWS, NOTHING, table_of_steps, weight_map
from minilora.pages.words import marked

MOST_BYTES = 3_000_000
FORMATS = {
    **dict.fromkeys(("base_loss", "adapted_loss", "drift_kl", "best_valid_loss"), "loss"),
    **dict.fromkeys(("base_exact_match", "adapted_exact_match"), "percent"),
    "peak_memory_bytes": "bytes",
}  # else they are counts


class Reader(HTMLParser):
    """What a page loads, and the text of each figure and each element of some classes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.figures: dict[tuple[str, str], str] = {}
        self.data: dict[str, Any] = {}
        self.reading: tuple[str, str] | None = None
        self.script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.loaded += [f"{key}={given[key]}" for key in ("src", "srcset", "data", "action") if key in given]
        if "href" in given and not (given["href"] or "").startswith("#"):
            self.loaded.append(f"href={given['href']}")
        if "data-figure" in given:
            self.reading = given["data-figure"] or "", given.get("data-run") or "0"
            self.figures[self.reading] = ""
        self.script = given.get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self.reading = None if tag == "td" else self.reading

    def handle_data(self, data: str) -> None:
        if self.reading:
            self.figures[self.reading] += data
        if self.script:
            self.data, self.script = json.loads(data), False


def page_of(folder: Path) -> Reader:
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


# --- Its figures ---


def test_the_figures_of_the_page_are_those_of_the_summary(folder: Path) -> None:
    summary = read(folder / "summary.json")
    shown = {key: text for (key, _), text in page_of(folder).figures.items()}
    assert shown.keys() == {key for key, value in summary.items() if key not in ("advice", "data", "base_fingerprint")}
    for key, text in shown.items():
        assert text == FILTERS[FORMATS.get(key, "count")](summary[key]), key
    assert shown["adapted_loss"] == f"{summary['adapted_loss']:.3f}"
    assert shown["adapted_exact_match"] == f"{summary['adapted_exact_match']:.1%}"
    assert shown["trainable_parameters"] == f"{summary['trainable_parameters']:,}"


def test_the_curves_are_those_of_the_metrics(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    drawn = page_of(folder).data["charts"]
    loss = drawn["loss"]
    by_label = {one["label"]: dict(zip(loss["x"], one["y"], strict=True)) for one in loss["series"]}
    for label, key in (("training, each step", "loss"), ("validation", "valid_loss")):
        expected = {line["step"]: line[key] for line in lines if key in line}
        assert {x: y for x, y in by_label[label].items() if y is not None} == pytest.approx(expected, rel=1e-5)
    summary = read(folder / "summary.json")
    held_out = by_label["held out, before and after"]
    assert (held_out[0], held_out[70]) == (summary["base_loss"], summary["adapted_loss"])
    assert drawn["rate"]["series"][0]["y"] == pytest.approx(
        [line["learning_rate"] for line in lines if "loss" in line], rel=1e-5
    )


def test_the_map_and_the_losses_with_less_are_those_of_the_findings(folder: Path) -> None:
    found, data = read(folder / "report.json"), page_of(folder).data
    assert data["cells"].keys() == found["changes"].keys()
    for module, cell in data["cells"].items():
        assert {key: cell[key] for key in found["changes"][module]} == found["changes"][module]
    rank = data["charts"]["rank"]
    assert rank["x"] == [0, 1, 2, 3, 4]
    assert rank["series"][0]["y"][1:] == [point["loss"] for point in found["less"]["ranks"]]


@given(st.dictionaries(st.integers(0, 3), st.floats(0, 1), min_size=1))
def test_the_strongest_colour_is_that_of_the_largest_change(ratios: dict[int, float]) -> None:
    changes = {
        f"model.layers.{i}.mlp.up_proj": {"ratio": ratio, "effective_rank": 2 * ratio} for i, ratio in ratios.items()
    }
    shown = weight_map(changes)
    shares = {i: shown["layers"][i]["up"]["ratio_share"] for i in ratios}
    assert all(0 <= share <= 1 for share in shares.values()) and shown["columns"] == ["up"]
    assert max(shares.values()) == (1 if max(ratios.values()) else 0)


def test_a_page_is_made_anew_without_the_model_and_is_the_same_to_the_byte(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    assert good("report", folder).strip() == str(folder / "report.html")
    assert contents(folder) == before
    few = tmp_path / "few"
    few.mkdir()
    for name in ("settings.json", "metrics.jsonl", "summary.json", "report.json"):
        shutil.copy(folder / name, few / name)
    good("report", few)
    assert page_of(few).figures == page_of(folder).figures


def test_a_run_that_has_not_finished_has_a_page_too(folder: Path, tmp_path: Path) -> None:
    for name in ("settings.json", "metrics.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    good("report", tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "has not finished" in text and f"train --resume {tmp_path}" in text


@pytest.mark.parametrize("flags", [["--method", "prefix"], ["--method", "full"], ["--inspect", "no"]])
def test_every_kind_of_run_has_a_page(train: Any, flags: list[str]) -> None:
    folder = train("parts", *flags)
    text = (folder / "report.html").read_text()
    assert ('class="cell"' in text) == (flags[-1] == "full")
    assert ("changes no weight matrix" in text) == (flags[-1] == "prefix")


# --- One file ---


@pytest.mark.parametrize("which", ["folder", "hostile"])
def test_a_page_loads_nothing_and_is_small(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which) / "report.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < MOST_BYTES
    assert Reader(text).loaded == []
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, flags=re.S))
    assert "@import" not in styles and "url(" not in styles
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="(.*?)"', text)[0])
    assert policy.startswith("default-src 'none'; ") and "http" not in policy and "script-src 'sha256-" in policy


def test_a_long_run_with_long_answers_has_a_page_that_is_small(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "long")
    lines = [{"step": step, "loss": 1 / step, "learning_rate": 0.1, "grad_norm": 1.0} for step in range(1, 100_001)]
    (tmp_path / "long" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read(folder / "report.json")
    answer = found["answers"]["rows"][0] | dict.fromkeys(("asked", "right", "before", "now"), "<&> " * 375)
    found["answers"]["rows"] = [answer] * 60
    found["changes"] = {
        f"model.layers.{i // 7}.mlp.{i % 7}_proj": next(iter(found["changes"].values()))
        | {"singular_values": [0.123456] * 256}
        for i in range(7 * 36)
    }
    (tmp_path / "long" / "report.json").write_text(json.dumps(found))
    good("report", tmp_path / "long")
    assert (tmp_path / "long" / "report.html").stat().st_size < MOST_BYTES


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(1, 12))
def test_a_thinned_curve_has_few_points_and_keeps_the_mean_and_the_end(ys: list[float], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "MOST_POINTS", most)
        x, y = thinned(range(len(ys)), ys)
    assert len(x) == len(y) <= most and x[-1] == len(ys) - 1
    if len(ys) <= most:
        assert y == pytest.approx(ys, rel=1e-5, abs=1e-9)
    assert MOST_POINTS >= 1000


def test_a_logarithmic_axis_of_ranks_begins_at_1() -> None:
    drawn = chart("rank", "loss", [Series("a", [0, 1, 64], [3.0, 2.0, 1.0])], log_x=True)
    assert (drawn["x"], drawn["series"][0]["y"], drawn["log_x"]) == ([1, 64], [2.0, 1.0], True)


@given(st.integers(1, 200), st.integers(1, 50))
def test_the_table_of_steps_is_short_and_has_the_last_step_and_the_validations(steps: int, every: int) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1.0} for step in range(1, steps + 1)]
    lines += [{"step": step, "valid_loss": 0.5} for step in range(every, steps + 1, every)]
    table = table_of_steps(lines)
    assert table[-1]["step"] == steps and len(table) <= 2 * MOST_TABLE_ROWS
    shown = [row["step"] for row in table if row["valid_loss"] is not None]
    assert shown[:MOST_TABLE_ROWS] == [*range(every, steps + 1, every)][:MOST_TABLE_ROWS]


# --- Text that would act ---


def test_hostile_rows_stand_on_the_page_as_text(hostile: Path) -> None:
    """No element comes of them: the page has the elements of any other page of its kind."""
    text = (hostile / "report.html").read_text(encoding="utf-8")
    reader = page_of(hostile)
    assert reader.tags.count("script") == 3 and reader.tags.count("style") == 1 and "img" not in reader.tags
    assert 'onerror="document' not in text and "<!-- <style>" not in text
    assert "{{ 7 * 7 }}" in text, "no template reads it"
    rows = read(hostile / "report.json")["answers"]["rows"]
    assert {row["asked"] for row in rows} == {f"{one} ->" for one in HOSTILE}


def test_no_text_can_close_the_data_of_a_page() -> None:
    text = page.render("run.html", {"title": "", "run": _empty()}, {"charts": {}, "cells": {"</script>": "<!--"}})
    assert text.count("</script>") == 3 and "\\u003c/script\\u003e" in text


def _empty() -> dict[str, Any]:
    view: dict[str, Any] = {key: {} for key in ("changed_settings", "summary", "charts", "map")}
    lists: dict[str, Any] = {key: [] for key in ("lines", "steps", "answers", "files", "next")}
    settings = {"method": "lora"}
    return view | lists | {"name": "", "folder": "", "task": "", "base": "", "settings": settings, "found": NOTHING}


# --- Words ---


@given(st.text("ab .(", max_size=20), st.text("ab .(", max_size=20))
@example("SELECT a", "SELECT b")
def test_the_words_that_do_not_differ_stand_in_both_texts_in_order(text: str, right: str) -> None:
    pieces = marked(text, right)
    assert "".join(piece.text for piece in pieces) == text.strip()
    rest = right.strip()
    for piece in pieces:
        if not piece.differs:
            assert piece.text in rest
            rest = rest.partition(piece.text)[2] if len(piece.text) else rest


def test_words_are_marked_with_a_pencil() -> None:
    assert [tuple(piece) for piece in marked(" SELECT name FROM cats", "SELECT age FROM cats")] == [
        ("SELECT ", False),
        ("name", True),
        (" FROM cats", False),
    ]
    assert marked("same", "same ") == [("same", False)]


# --- The command ---


def test_two_runs_are_compared_figure_by_figure(folder: Path, hostile: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    good("report", folder, hostile, "--out", out)
    reader = Reader(out.read_text(encoding="utf-8"))
    for i, one in enumerate((folder, hostile)):
        summary = read(one / "summary.json")
        for key, format in {"adapted_loss": "loss", "drift_kl": "loss", "trainable_parameters": "count"}.items():
            assert reader.figures[key, str(i)] == FILTERS[format](summary[key])
    assert reader.loaded == [] and is_page(out)
    names = [one["label"] for one in reader.data["charts"]["loss"]["series"]]
    assert "run, training" in names and "a <b> & 'c', training" in names
    assert {name.partition(" ")[0] for name in reader.data["cells"]} == {"0", "1"}


def test_the_better_figure_is_set_off_and_settings_that_differ_are_listed(train: Any, tmp_path: Path) -> None:
    one, other = train("parts", "--seed", 1, out="one"), train("parts", "--rank", 2, "--steps", 9, out="other")
    good("report", one, other, "--out", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    losses = [read(run / "summary.json")["adapted_loss"] for run in (one, other)]
    assert f'data-run="{losses.index(min(losses))}"><strong>{min(losses):.3f}</strong>' in text
    assert [name for name in ("--rank", "--seed", "--steps", "--alpha") if f"<code>{name}</code></th>" in text] == [
        "--rank", "--seed", "--steps",
    ]  # fmt: skip


def test_runs_of_one_name_are_told_apart_by_their_folders(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "run")
    good("report", folder, other, "--out", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert f'<th scope="col">{folder}</th>' in text and f'<th scope="col">{other}</th>' in text


def test_a_mistake_is_told_in_a_line(folder: Path, tmp_path: Path) -> None:
    assert_refused(run("report"), "no run is given")
    assert_refused(run("report", tmp_path / "nowhere"), "nowhere: no such folder")
    assert_refused(run("report", tmp_path), "holds no run (settings.json is missing)")
    (tmp_path / "notes.html").write_text("mine")
    assert_refused(run("report", folder, "--out", tmp_path / "notes.html"), "notes.html exists and is no page")
    assert (tmp_path / "notes.html").read_text() == "mine"
