"""Lists, and texts that stand for them: what files say of one list is one list."""

import pytest

from d2dmoe_pl.data.listed_values import listed
from d2dmoe_pl.errors import ConfigError


@pytest.mark.parametrize("separator", [",", None])
@pytest.mark.parametrize("empty", [None, "", "  ", "[]", "()", "( )", "set()", []])
def test_nothing(empty, separator):
    assert listed(empty, separator, "") == []


@pytest.mark.parametrize("separator", [",", None])
@pytest.mark.parametrize(
    "value",
    [
        ["fear", "joy"],
        "['fear', 'joy']",
        '["fear", "joy"]',
        "('fear', 'joy')",
        "{'joy', 'fear'}",
        " {'fear',\n 'joy'} ",
    ],
)
def test_two(value, separator):
    assert listed(value, separator, "") == ["fear", "joy"]


def test_one_in_a_tuple():
    assert listed("('fear',)", ",", "") == ["fear"]


@pytest.mark.parametrize("text", ["(fear)", "{fear}", "(fear joy)", "fear (mild)"])
def test_other_texts_in_brackets_are_texts(text):
    assert listed(text, None, "") == text.split()


@pytest.mark.parametrize("separator", [",", None])
@pytest.mark.parametrize(
    "text", ["['fear' 'joy']", "('fear') and ('joy')", "{'fear': 1}", "('fear' 'joy')", '("a" b)', "{'a' 'b'}", "('a')"]
)
def test_brackets_of_no_list(text, separator):
    with pytest.raises(ConfigError, match=r"column has .*; must be a list as Python or JSON writes it"):
        listed(text, separator, "column")
