"""Python's literals: what Python reads in them is what their JSON says, however they are cut."""

from __future__ import annotations

import ast
import json

import pytest
from hypothesis import given, settings, strategies as st

from server.python_values import PythonValue
from tests.server.test_call_forms import nested, texts


def cut(text: str, sizes: list[int]) -> str | None:
    """The JSON of a literal that comes in pieces of these sizes, or None if it is none."""
    value, held, told, left = PythonValue(), "", "", f"{text} "
    for size in [*sizes, len(left)]:
        held, left = held + left[:size], left[size:]
        held = held[value.feed(held) :]
        told += value.json
    return told if value.ended else None


@given(value=nested, sizes=st.lists(st.integers(1, 5), max_size=40))
@settings(deadline=None, max_examples=60)
def test_what_python_writes(value: object, sizes: list[int]) -> None:
    for text in (repr(value), json.dumps(value)):
        told = PythonValue.whole(text)
        assert told is not None
        assert json.loads(told) == value
        assert cut(text, sizes) == cut(text, [1] * len(text)) == told


LITERALS = [
    *(
        "'''a 'b' \"c\"\n'''",
        '"""x""y"""',
        '""',
        "''",
        r"r'\d\'x'",
        "u'é'",
        r"'\x41\101\0\u00e9\U0001f600\a\q\''",
    ),
    *("'a\\\nb'", "1_000", "0x1F", "-0b11", "1.", ".5", "+3", "1e5", "-2.5E-3", "[1, 2,]", "{'a': [],}"),
    *("True", "None", "[ True , None ]", "0", "-0", "[[], {}]"),
]


@pytest.mark.parametrize("text", LITERALS)
@pytest.mark.filterwarnings("ignore:invalid escape")
def test_every_kind_of_literal(text: str) -> None:
    told = cut(text, [])
    assert told is not None
    assert json.loads(told) == ast.literal_eval(text)
    assert cut(text, [1] * len(text)) == told


NONE = [
    *(
        "x",
        "b'x'",
        "f'x'",
        "(1, 2)",
        "{1, 2}",
        "{1: 2}",
        "{'a'}",
        "[1 2]",
        "[1,,2]",
        "[}",
        "{]",
        "007",
        "1__0",
    ),
    *("nan", "inf", "1j", r"'\xg1'", r"'\U00110000'", "[,]", "{'a': }", "{'a' 1}", "--1", "1" * 5000),
]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_literal_or_has_no_json(text: str) -> None:
    assert cut(text, []) is None
    assert cut(text, [1] * len(text)) is None


@given(text=texts, sizes=st.lists(st.integers(1, 5), max_size=40))
@settings(deadline=None, max_examples=60)
def test_any_text_is_read_alike_however_it_is_cut(text: str, sizes: list[int]) -> None:
    assert cut(text, sizes) == cut(text, []) == cut(text, [1] * len(text))


def test_half_a_character_is_written_as_json_writes_it() -> None:
    told = PythonValue.whole(r'"\ud83d\ude00"')
    assert told == r'"\ud83d\ude00"'
    assert json.loads(told) == "😀"
