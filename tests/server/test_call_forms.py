"""Calls in forms other than JSON: what templates write is read, and what grammars let through is right."""

from __future__ import annotations

import ast
import functools
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from engine.grammar import GrammarCompiler, GrammarState
from engine.text import TextProcessor
from engine.tool_prompt import GLM_MARKS
from server.tool_formats import FORMATS, Function, format_of
from server.tool_grammars import FormError
from server.tool_values import json_of
from server.xml_calls import TaggedCall
from tests import chat_templates
from tests.server.conftest import EOS_ID, TEXT
from tests.server.test_tool_calls import read
from tests.server.test_tool_formats import follows, with_tokens

ITEM = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string"}},
    "required": ["n"],
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "size": {"type": "number"},
        "on": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
        "extra": {"type": "object"},
        "any": {},
    },
    "required": ["text", "count"],
    "additionalProperties": False,
    "$defs": {"item": ITEM},
}
FUNCTIONS = {"save": SCHEMA, "time": None, "get-it": {"properties": {"q": {"type": ["integer", "string"]}}}}
TEMPLATES = {
    "qwen3_coder": chat_templates.QWEN3_CODER,
    "seed_oss": chat_templates.SEED_OSS,
    "glm45": chat_templates.GLM_45,
    "glm47": chat_templates.GLM_47,
    "olmo3": chat_templates.OLMO_3,
    "deepseek_v31": chat_templates.DEEPSEEK_V31,
    "deepseek_v3": chat_templates.DEEPSEEK_R1_WITH_TOOLS,
}
WRITTEN = ("pythonic", "llama4_pythonic")
"""Their templates write no literals; these tests do."""
PARTS = [
    *(
        "</parameter>",
        "\n",
        "</parameter",
        "<parameter=text>",
        "</function>",
        "<tool_call>",
        "</tool_call>",
        "a",
    ),
    *("'", '"', '"""', "\\", "\\n", "\\u00e9", "é", "日", "😀", "{", "}", "[", "]", "(", ")", ",", "=", ": "),
    *("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
    *(" ", "\t", "True", "None", "null", "12", "</seed:tool_call>", "text=", "#", "<", "```", "\r"),
]
texts = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
numbers = st.one_of(st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False))
nested = st.recursive(
    st.one_of(texts, numbers, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
VALUES = {
    "text": texts,
    "count": st.integers(-(10**20), 10**20),
    "size": numbers,
    "on": st.booleans(),
    "note": st.one_of(st.none(), texts.filter(lambda text: text not in ("null", "None"))),
    "items": st.lists(nested, max_size=2),
    "extra": st.dictionaries(texts, nested, max_size=2),
    "any": st.one_of(st.none(), st.booleans(), st.lists(nested, max_size=2), st.just("some words")),
}
calls_of = st.one_of(
    st.just(("time", {})),
    st.tuples(st.just("get-it"), st.fixed_dictionaries({"q": st.one_of(st.integers(), st.just("a b"))})),
    st.tuples(
        st.just("save"),
        st.fixed_dictionaries({}, optional=VALUES).flatmap(
            lambda a: st.permutations(list(a.items())).map(dict)
        ),
    ),
)
ENDS = re.compile(
    r"</parameter>\s*(<parameter=|</function>|</tool_call>|</seed:tool_call>)|"
    r"</arg_value>\s*(<arg_key>|</?tool_call>)"
)


@functools.cache
def text_of(name: str) -> TextProcessor:
    return TextProcessor(TEXT.tokenizer, TEMPLATES[name])


def rendered(name: str, calls: list[tuple[str, Any]], content: str = "") -> str:
    """The calls, as a model's template writes them."""
    if name in WRITTEN:
        some = ", ".join(
            f"{f}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for f, a in calls
        )
        return f"[{some}]" if name == "pythonic" else f"<|python_start|>[{some}]<|python_end|>"
    told = [{"function": {"name": function, "arguments": arguments}} for function, arguments in calls]
    message = {"role": "assistant", "content": content, "tool_calls": told}
    text = text_of(name).render_chat(
        [message], tools=[{"type": "function", "function": {"name": "f"}}], add_generation_prompt=False
    )
    written = text.partition("assistant")[2].removeprefix("|>")
    return re.sub(r"(<\|user\|>|<\|im_end\|>\n|<seed:eos>|<｜end▁of▁sentence｜>)\Z", "", written).lstrip("\n")


def right(arguments: dict[str, Any]) -> bool:
    """Whether no text has in it what closes a value, nor what may be text and is JSON."""
    told = [value for value in arguments.values() if isinstance(value, str)]
    told.append(json.dumps(arguments.get("any")))
    return not any(ENDS.search(value + end) for value in told for end in ("</parameter>\n", "</arg_value>\n"))


def found(parsed: tuple[str, list[tuple[str, str]]]) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = parsed
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("name", [*TEMPLATES, *WRITTEN])
@given(data=st.data(), calls=st.lists(calls_of, min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_what_a_template_writes_is_read_however_it_is_cut(
    name: str, data: st.DataObject, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    if issubclass(FORMATS[name].form, TaggedCall):
        calls = [call for call in calls if right(call[1])]
    text = rendered(name, calls)
    form = FORMATS[name]
    whole = read(form.parser(FUNCTIONS), [text])
    assert found(whole) == ("", calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form.parser(FUNCTIONS), pieces) == whole
    assert read(form.parser(FUNCTIONS), [*text, ""]) == whole


@pytest.mark.parametrize(
    "written",
    [
        '{"a": ["</parameter><parameter=x>"]}',
        '{"</parameter></function>": ""}',
        "{'</parameter></function>': {}}",
    ],
)
def test_json_may_have_any_tag_in_its_strings(written: str) -> None:
    text = f"<function=save><parameter=extra>{written}</parameter></function>"
    parser = FORMATS["seed_oss"].parser
    for pieces in ([text], [*text, ""]):
        _, [(_, arguments)] = found(read(parser(FUNCTIONS), pieces))
        assert arguments == {"extra": ast.literal_eval(written)}


LETTERS = TEXT.encode("ab1{}[]\",:\n</>=é .-T'", add_special_tokens=False)


def walk(state: GrammarState, draw: random.Random, pieces: list[str], closing: list[str]) -> str:
    """A random answer that a grammar lets through, of letters and pieces; it soon takes those that close."""
    tokens: list[int] = []
    words = np.empty((1, state.words), np.int32)

    def taken(piece: str) -> bool:
        nonlocal state, tokens
        new = TEXT.encode(piece, add_special_tokens=False)
        trial = GrammarState(state._matcher.deep_copy(), state.words * 32, state._eos)
        if not all(map(trial.advance, new)):
            return False
        state, tokens = trial, tokens + new
        return True

    while not state.ended:
        assert len(tokens) < 2000, TEXT.decode(tokens)
        late = len(tokens) > 150
        if (late and any(map(taken, draw.sample(closing, len(closing))))) or (
            draw.random() < 0.4 and taken(draw.choice(pieces))
        ):
            continue
        state.masks([0], [0], words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if EOS_ID in allowed and (late or len(allowed) == 1 or draw.random() < 0.2):
            assert state.advance(EOS_ID)
            break
        some = [token for token in LETTERS if token in allowed] or [t for t in allowed if t != EOS_ID]
        token = int(draw.choice(some))
        assert state.advance(token)
        tokens.append(token)
    return TEXT.decode(tokens)


HARD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "word": {"enum": ["red", "a b", 'q"', "1", 1, None, True]},
        "code": {"type": "string", "pattern": "^[ab/]{2,3}$", "maxLength": 3},
        "some": {"type": "string", "minLength": 1, "maxLength": 4},
        "day": {"type": "string", "format": "date"},
        "mixed": {"anyOf": [{"type": "integer", "minimum": 10}, {"$ref": "#/$defs/name"}, {"type": "null"}]},
        "list": {"type": ["array", "null"], "items": {"type": "string"}},
        "one": {"const": "x</par"},
        "free": True,
        "long": {"minLength": 3},
        "sized": {"minimum": 3},
        "whole": {"type": "integer", "minimum": 3, "maximum": 12},
        "flag": {"type": "boolean"},
        "deep": {"type": "object", "properties": {"t": {"type": "string"}}, "required": ["t"]},
    },
    "required": ["word", "mixed", "missing"],
    "$defs": {"name": {"type": "string", "minLength": 2}},
}
OPEN: dict[str, Any] = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}
CLOSING = {
    "qwen3_coder": ["\n</parameter>\n", '"', "}", "]", "</function>\n</tool_call>"],
    "seed_oss": ["</parameter>\n", '"', "}", "]", "</function>\n</seed:tool_call>"],
    "glm45": ["</arg_value>\n", '"', "}", "]", "</tool_call>"],
    "glm47": ["</arg_value>", '"', "}", "]", "</tool_call>"],
    "olmo3": ['"', "}", "]", ")", "</function_calls>"],
    "pythonic": ['"', "}", ")", "]"],
    "deepseek_v3": ['"', "}", "]", "\n```<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
}
WITHIN = [
    "</parameter>",
    "</arg_value>",
    "<arg_key>a</arg_key>\n<arg_value>",
    "<tool_call>",
    '{"t": "</parameter><parameter=x>',
    "2024-01-02",
    "null",
]


@pytest.mark.parametrize("name", CLOSING)
def test_what_a_grammar_lets_through_is_a_right_call(name: str) -> None:
    form = FORMATS[name]
    schemas = {"save": SCHEMA, "hard": HARD, "open": OPEN, "time": None}
    pieces = [form.begin, *CLOSING[name], *WITHIN, *(f"<function={each}>\n" for each in schemas)]
    for may_call in (*([each] for each in schemas), list(schemas)):
        functions = [Function(each, schemas[each]) for each in may_call]
        spec = form.grammar(functions, text=len(functions) > 1, schema=None, several=True)
        grammar = GrammarCompiler(TEXT.tokenizer, [EOS_ID]).compile(spec)
        for seed in range(2):
            text = walk(grammar.start(), random.Random(seed), pieces, CLOSING[name])
            _, calls = read(form.parser(schemas), [text])
            assert calls or len(functions) > 1
            for function, arguments in calls:
                assert function in may_call
                told = json.loads(arguments)
                jsonschema.validate(told, schemas[function] or {"additionalProperties": False})


def let_through(name: str, answer: str, schema: Any, *, text: bool = False) -> bool:
    """Whether a call's grammar lets an answer through."""
    spec = FORMATS[name].grammar([Function("f", schema)], text=text, schema=None, several=False)
    return follows(spec, answer)


OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
BOUNDED = {"type": "string", "maxLength": 3000}
DATE = {"type": "string", "format": "date"}
NOT_TRUE = {"type": "boolean", "not": {"const": True}}
MIXED = {"properties": {"a": {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "string"}]}}}


@pytest.mark.parametrize(
    ("schema", "value", "right"),
    [
        *(
            (MIXED, value, right)
            for value, right in (("12", True), ("5", False), ("a5", True), ("null", True))
        ),
        *(
            ({"properties": {"a": {"format": "date", "type": "string"}}}, d, d[5] < "2")
            for d in ("2024-12-31", "2024-31-12")
        ),
        *(
            ({"properties": {"a": {"type": "boolean"}}}, value, value != "yes")
            for value in ("true", "True", "yes")
        ),
        # What an optional argument is, and words that go on.
        *(
            ({"properties": {"a": OR_NULL}}, value, value != "None")
            for value in ("null", "None", "nul", "nullify", "null ")
        ),
        *(
            ({"properties": {"a": {"type": ["boolean", "string"]}}}, value, not value.startswith("True "))
            for value in ("true", "True ", "trues", "null", "12")
        ),
        *(
            ({"properties": {"a": {"anyOf": [{"enum": [12, None]}, BOUNDED]}}}, value, value != "1x")
            for value in ("null", "12", "x", "1x")
        ),
        *(({"properties": {"a": {"minimum": 3}}}, value, bool(value)) for value in ("12", "")),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, NOT_TRUE]}}}, "true", False),
        ({"properties": {"a": False, "b": True}}, "x", False),
        *(
            ({"properties": {"a": {"type": ["array", "string"]}}}, value, value != "[x")
            for value in ("[]", "[x", "12", "{x")
        ),
        *(
            ({"properties": {"a": BOUNDED}}, value, "</parameter>" not in value)
            for value in ("", "x<</parameter" * 9, "x</parameter>y")
        ),
    ],
)
def test_text_that_would_be_read_as_something_wrong_is_not_let_through(
    schema: Any, value: str, right: bool
) -> None:
    answer = (
        f"<seed:tool_call>\n<function=f>\n<parameter=a>{value}</parameter>\n</function>\n</seed:tool_call>"
    )
    assert let_through("seed_oss", answer, schema) == right
    if right:
        _, [(_, arguments)] = found(read(FORMATS["seed_oss"].parser({"f": schema}), [answer]))
        jsonschema.validate(arguments, schema)


def test_olmos_words_are_those_of_json() -> None:
    schema = {"properties": {"on": {"type": "boolean"}, "no": {"type": "null"}}}
    for name, words in (("pythonic", ("True", "None")), ("olmo3", ("true", "null"))):
        for on, no in (("True", "None"), ("true", "null")):
            call = f"f(on={on}, no={no})"
            call = f"[{call}]" if name == "pythonic" else f"<function_calls>{call}</function_calls>"
            assert let_through(name, call, schema) == ((on, no) == words)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": ["integer", "null"]}, "None null 12"),
        ({"anyOf": [{"$ref": "#/$defs/on"}, {"type": "null"}], "default": None}, "None True"),
        ({"anyOf": [{"enum": [12]}, {"type": "boolean", "title": "x"}]}, "True true 12"),
        ({}, "None null True true 12"),
        ({"type": ["boolean", "null"], "enum": [None, 12]}, "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "boolean", "enum": [True]}]}, "true 12"),
    ],
)
def test_pythons_words_may_stand_wherever_their_values_may(schema: Any, words: str) -> None:
    """An optional argument is None to a model that writes Python, and not the text "None"."""
    whole = {"properties": {"a": schema}, "$defs": {"on": {"type": "boolean"}}}
    some = ("None", "null", "True", "true", "12")
    assert [word for word in some if let_through("pythonic", f"[f(a={word})]", whole)] == words.split()


def test_text_beside_calls_does_not_open_one_in_another_way() -> None:
    for name, opened in (
        ("qwen3_coder", "<function=f>\n<parameter=b>\nx\n</parameter>\n</function>"),
        ("llama4_pythonic", "<|python_start|>[f(b=1)]<|python_end|>"),
        ("deepseek_v31", '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"b": 1}<｜tool▁call▁end｜>'),
    ):
        schema = {"properties": {"a": {}}, "additionalProperties": False}
        assert let_through(name, "So: it is", schema, text=True)
        assert not let_through(name, f"So: {opened}", schema, text=True)


def test_marks_that_are_tokens_do_not_open_calls_in_text() -> None:
    marks = ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"]
    text = with_tokens("<think>", *marks, special=False)
    form = format_of(text, "deepseek_v31")
    function = Function("f", {"properties": {"a": {}}, "additionalProperties": False})
    spec = form.grammar([function], text=True, schema=None, several=True)
    assert follows(spec, "<think> So.", text)
    for before in ("", "<think>"):
        for by_letters in (False, True):
            wrong = f'{before}{marks[1]}f{marks[2]}{{"b": 1}}{marks[3]}'
            assert not follows(spec, wrong, text, by_letters=by_letters)

    spec = format_of(text, "qwen3_coder").grammar([function], text=True, schema=None, several=True)
    wrong = "<function=f>\n<parameter=b>\nx\n</parameter>\n</function>"
    assert follows(spec, "<think>So.", text)
    assert not any(follows(spec, f"{before}{wrong}", text) for before in ("<think>", "<think>So: "))


@pytest.mark.parametrize("special", [True, False])
def test_values_stand_between_marks_that_are_tokens(special: bool) -> None:
    """Where those that GLM's vocabulary has are one, the letters are none of them, and stay in a text."""
    text = with_tokens("<tool_call>", "</tool_call>", *GLM_MARKS, special=special)
    schema = {"properties": {"s": {"type": "string"}, "n": OR_NULL, "on": {"type": "boolean"}, "d": DATE}}
    schemas = {"f": {**schema, "additionalProperties": {"type": "integer"}}}
    form = format_of(text, "glm45")
    spec = form.grammar([Function("f", schemas["f"])], text=False, schema=None, several=True)

    def takes(*parts: tuple[str, str], between: str = "") -> bool:
        said = [f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in parts]
        answer = f"<tool_call>f\n{''.join(said)}{between}</tool_call>"
        if taken := follows(spec, answer, text):
            assert not follows(spec, answer, text, by_letters=True)
            _, [(_, arguments)] = found(read(form.parser(schemas), [answer]))
            jsonschema.validate(arguments, schemas["f"])
            assert [str(value) for value in arguments.values()] == [
                {"null": "None", "true": "True"}.get(value, value) for _, value in parts
            ]
        return taken

    right = ("s", ""), ("n", "null"), ("on", "true"), ("d", "2024-01-02"), ("x", "1"), ("y", "2")
    assert takes()
    assert takes(*right)
    assert all(takes(part) for part in [*right, ("s", "a\n<arg_keys>"), ("n", ""), ("on", "True")])
    wrong = ("s", "a</arg_value>"), ("s", "<arg_key>"), ("on", "yes"), ("d", ""), ("x", "one"), ("x y\n", "1")
    assert not any(takes(part) for part in wrong)
    assert not takes(*reversed(right))
    assert not takes(between="\n")
    told = Function("f", {"properties": {"a": {"enum": ["</arg_value>"]}}})
    with pytest.raises(FormError, match="</arg_value>"):
        form.grammar([told], text=False, schema=None, several=False)


@pytest.mark.parametrize(
    ("text", "kinds", "value"),
    [
        *(("NaN", {"number"}, "NaN"), ("12", {"number", "integer"}, 12), (" 12 ", {"string", "integer"}, 12)),
        *(
            ("1.5", {"string", "integer"}, "1.5"),
            ("1.0", {"string", "integer"}, 1.0),
            ("1e999", {"string"}, "1e999"),
        ),
        *(('"x"', {"string", "null"}, '"x"'), ('"x"', {"array"}, "x"), ("[1, 'x']", {"array"}, [1, "x"])),
        *(("yes", {"boolean"}, "yes"), ("False", {"boolean"}, False), ("[" * 5000, {"array"}, "[" * 5000)),
    ],
)
def test_what_text_means(text: str, kinds: set[str], value: Any) -> None:
    assert json.loads(json_of(text, frozenset(kinds))) == value
