"""Chat templates from anywhere: each is rendered, or ended in time and told with its reason."""

from __future__ import annotations

import sys
from datetime import datetime

import pytest

from minilora.data import template_process
from minilora.data.template_process import rendered

NOW = datetime(2025, 6, 30)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [ENDLESS, "{{ 10 ** (10 ** 10) }}", "{{ lipsum(n=1000000) }}"])
def test_a_template_that_takes_too_long_is_ended_and_the_next_is_rendered(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    with pytest.raises(ValueError, match="takes more than"):
        rendered(template, NOW, {})
    monkeypatch.undo()
    assert rendered("{{ a }}", NOW, {"a": "\ud83d é"}) == "\ud83d é"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 10**11 }}", "{{ 'a'.zfill(10**11) }}", "{{ '%100000000000d' % 1 }}", "{{ 'a'.center(10**11) }}"],
)
def test_a_template_that_takes_too_much_memory_is_told(template: str) -> None:
    with pytest.raises(ValueError, match="MB of memory"):
        rendered(template, NOW, {})


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ a.b.c }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
        ("{% for", "^unexpected 'end of template'"),
    ],
)
def test_whatever_a_template_raises_is_its_reason(template: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rendered(template, NOW, {})


def test_the_time_is_what_the_template_is_told_and_the_process_is_one_for_all() -> None:
    assert rendered("{{ strftime_now('%d %b %Y') }}", NOW, {}) == "30 Jun 2025"
    child = template_process._process.child
    assert rendered("{{ 1 }}", NOW, {}) == "1" and template_process._process.child is child
