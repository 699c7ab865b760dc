"""Names and regular expressions choose modules as PEFT's do: the whole name, or its end after a dot; never a part."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.strategies import TINY

from minilora.methods.lora import LoRA
from minilora.methods.targets import pattern_value, projections, target_module_names
from minilora.model.names import EMBED, HEAD

KNOWN = [EMBED, *projections(TINY), HEAD]


@st.composite
def parts(draw: st.DrawFn) -> str:
    """A piece of a name, which may be all of it."""
    name = draw(st.sampled_from(KNOWN))
    start = draw(st.integers(0, len(name) - 1))
    return name[start : draw(st.integers(start + 1, len(name)))]


@st.composite
def expressions(draw: st.DrawFn) -> str:
    """Pieces of names as regular expressions, open at an end or not."""
    opened = st.sampled_from(["", ".*", r"(.*\.)?"])
    pieces = draw(st.lists(parts(), min_size=1, max_size=2))
    return "|".join(draw(opened) + re.escape(piece) + draw(opened) for piece in pieces)


def whole(expression: str) -> list[str]:
    """The modules whose name, from the first letter to the last, is what the expression says."""
    return [name for name in KNOWN if re.search(rf"\A(?:{expression})\Z", name)]


@given(expressions())
@example(r"model\.layers\.0")
@example(r".*\.1\.self_attn")
@example("model|lm_head")
@example("q_proj")
@example("lm_head|lm_head.weight")
def test_an_expression_of_targets_is_the_whole_name_from_the_first_letter_to_the_last(expression: str) -> None:
    if expected := whole(expression):
        assert target_module_names(TINY, expression) == expected
    else:
        with pytest.raises(ValueError, match="matches no linear map"):
            target_module_names(TINY, expression)


@given(expressions())
@example(r"model\.layers\.0")
@example(r".*\.1\.self_attn")
def test_an_expression_of_what_is_left_out_is_the_whole_name_too(expression: str) -> None:
    every = target_module_names(TINY, ["all-linear", "lm_head"])
    if left := [name for name in every if name not in whole(expression)]:
        assert target_module_names(TINY, ["all-linear", "lm_head"], exclude=expression) == left


@given(parts())
@example("proj")
@example("layers.0")
@example("self_attn.q_proj")
def test_a_name_of_a_target_is_a_modules_name_or_its_end_after_a_dot(name: str) -> None:
    expected = [known for known in KNOWN if known == name or known.endswith("." + name)]
    if expected:
        assert target_module_names(TINY, [name]) == expected
    else:
        with pytest.raises(ValueError, match="matches no linear map"):
            target_module_names(TINY, [name])


@given(expressions(), st.sampled_from(KNOWN))
@example("q_pro", KNOWN[1])
@example("q|q_proj", KNOWN[1])
@example("self_attn", KNOWN[1])
def test_the_expression_of_a_pattern_is_a_modules_name_or_its_end_after_a_dot(expression: str, name: str) -> None:
    ends = [name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))]
    fits = any(re.search(rf"\A(?:{expression})\Z", end) for end in ends)
    assert pattern_value({expression: 1}, name, 0) == fits


def test_a_lone_entry_that_is_no_name_is_an_expression_and_one_of_several_is_not() -> None:
    expression = r"model\.layers\.1\..*up_proj"
    alone = LoRA(target_modules=(expression,)).for_model(TINY, lambda text: [])
    assert alone.adapted_modules(TINY) == whole(expression)
    with pytest.raises(ValueError, match="matches no linear map"):
        LoRA(target_modules=(expression, "q_proj")).for_model(TINY, lambda text: []).adapted_modules(TINY)
