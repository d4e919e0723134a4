"""Calls in a model's text: what is one, and that it does not matter how the text is cut."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings, strategies as st

from server.tool_calls import ToolCallParser
from server.tool_formats import FORMATS

NAMES = {"weather": None, "time": None}
Calls = list[tuple[str, str]]

HERMES: list[tuple[str, str, Calls]] = [
    ('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', "", [("time", "{}")]),
    (
        ' Well.\n<tool_call>\n{"name": "weather", "arguments": {"q": "}<tool_call>\\"", "l": [1, {}]}}'
        '\n</tool_call>\n<tool_call>{"arguments": {"x": 1}, "name": "time"}</tool_call>\n',
        " Well.",
        [("weather", '{"q": "}<tool_call>\\"", "l": [1, {}]}'), ("time", '{"x": 1}')],
    ),
    # A list of calls, arguments as text, none at all, other keys, and text behind.
    (
        '<tool_call>[{"name": "time", "id": 12, "arguments": "{\\"k\\": 2}"}, {"name":"time"}]</tool_call>'
        " Done. ",
        "Done.",
        [("time", '{"k": 2}'), ("time", "{}")],
    ),
    (
        '<tool_call>{"name": "time", "arguments": null}</tool_call>\n'
        '<tool_call>{"arguments": "", "name": "time"}</tool_call>',
        "",
        [("time", "{}"), ("time", "{}")],
    ),
    # What a model may forget: the last brace, the end.
    (
        '<tool_call>{"name": "time", "arguments": {"a": 1}\n</tool_call>\n<tool_call>{"name":"time"}',
        "",
        [("time", '{"a": 1}'), ("time", "{}")],
    ),
    ('<tool_call>{"name": "time", "arguments": {"a": "cut', "", [("time", '{"a": "cut')]),
    # No calls, and every character of them.
    ("a < b <tool", "a < b <tool", []),
    ("  \n two\n\n lines \n", "  \n two\n\n lines \n", []),
    ("x <tool_call> y", "x <tool_call> y", []),
    ("<tool_call></tool_call>", "<tool_call></tool_call>", []),
    ('<tool_call>{"name": "time", "argu', '<tool_call>{"name": "time", "argu', []),
    (
        '<tool_call>\n{"name": "rain", "arguments": {}}\n</tool_call> hm',
        '<tool_call>\n{"name": "rain", "arguments": {}}\n</tool_call> hm',
        [],
    ),
    (
        '<tool_call>{"name": "time", "arguments": 3}</tool_call>',
        '<tool_call>{"name": "time", "arguments": 3}</tool_call>',
        [],
    ),
    ('<tool_call>{"name": true, "arguments": {}}', '<tool_call>{"name": true, "arguments": {}}', []),
    ('<tool_call>{"name" "time"}', '<tool_call>{"name" "time"}', []),
    # One that is none behind one that is.
    (
        '<tool_call>{"name":"time","arguments":{}}, {"name":"rain"}</tool_call>x',
        ', {"name":"rain"}</tool_call>x',
        [("time", "{}")],
    ),
    (
        '<tool_call>{"name":"time","arguments":{}}\n{"name":"ti',
        '{"name":"ti',
        [("time", "{}")],
    ),
    # Arguments twice: the first.
    ('<tool_call>{"name":"time","arguments":{},"parameters":{"a":1}}</tool_call>', "", [("time", "{}")]),
    (
        '<tool_call>{"x": <tool_call>{"name": "time", "arguments": {}}</tool_call>',
        '<tool_call>{"x":',
        [("time", "{}")],
    ),
]
LLAMA: list[tuple[str, str, Calls]] = [
    (
        ' \n{"name": "weather", "parameters": {"a": 1}}; {"name": "time", "parameters": {}}',
        "",
        [("weather", '{"a": 1}'), ("time", "{}")],
    ),
    ('<|python_tag|>{"name": "time", "parameters": {}}', "", [("time", "{}")]),
    ('{"name": "time", "parameters": {}} and so on', "and so on", [("time", "{}")]),
    ('{"name": "time", "parameters": {}}; that is all', "that is all", [("time", "{}")]),
    ('{"name": "Alice", "age": 3}', '{"name": "Alice", "age": 3}', []),
    ('No: {"name": "time", "parameters": {}}', 'No: {"name": "time", "parameters": {}}', []),
    (" ", " ", []),
    ("{", "{", []),
]
MISTRAL: list[tuple[str, str, Calls]] = [
    (
        'Well.[TOOL_CALLS] [{"name": "weather", "arguments": {"a": 1}}, {"name": "time", "arguments": {}}]',
        "Well.",
        [("weather", '{"a": 1}'), ("time", "{}")],
    ),
    ('[TOOL_CALLS][{"name": "time", "arguments": {}}]', "", [("time", "{}")]),
    ("[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    # The newer form, with ids or without, and as it reads where its own tokens are no text.
    (
        'Well. [TOOL_CALLS]weather[ARGS]{"a": {"b": 1}}[TOOL_CALLS]time[ARGS]{}',
        "Well.",
        [("weather", '{"a": {"b": 1}}'), ("time", "{}")],
    ),
    (
        '[TOOL_CALLS]weather[CALL_ID]abc123XYZ[ARGS]{"a": "[TOOL_CALLS]"}\n'
        "[TOOL_CALLS]time[CALL_ID]1[ARGS] {}",
        "",
        [("weather", '{"a": "[TOOL_CALLS]"}'), ("time", "{}")],
    ),
    ('[TOOL_CALLS]time{"a": 1}[TOOL_CALLS] time\n{} Done.', "Done.", [("time", '{"a": 1}'), ("time", "{}")]),
    ('[TOOL_CALLS]time[ARGS]{"a": 1', "", [("time", '{"a": 1')]),
    ('[TOOL_CALLS]time[ARGS]{}, {"name": "time"}', ', {"name": "time"}', [("time", "{}")]),
    ('[TOOL_CALLS][{"name": "time", "arguments": {}}] time{}', "time{}", [("time", "{}")]),
    # None, but the last.
    ("[TOOL_CALLS]rain[ARGS]{}", "[TOOL_CALLS]rain[ARGS]{}", []),
    ("[TOOL_CALLS]time flies", "[TOOL_CALLS]time flies", []),
    ("[TOOL_CALLS]time[ARGS]", "[TOOL_CALLS]time[ARGS]", []),
    ("[TOOL_CALLS]time[ARGS]3", "[TOOL_CALLS]time[ARGS]3", []),
    ("[TOOL_CALLS]time[ARGS][CALL_ID]1{}", "[TOOL_CALLS]time[ARGS][CALL_ID]1{}", []),
    ("[TOOL_CALLS]time[TOOL_CALLS]time[ARGS]{}", "[TOOL_CALLS]time", [("time", "{}")]),
    (f"[TOOL_CALLS]{'time' * 20}[ARGS]{{}}", f"[TOOL_CALLS]{'time' * 20}[ARGS]{{}}", []),
]
GRANITE: list[tuple[str, str, Calls]] = [
    ('<|tool_call|>[{"name": "time", "arguments": {"a": 1}}]', "", [("time", '{"a": 1}')]),
    ("<|tool_call|>time[ARGS]{}", "<|tool_call|>time[ARGS]{}", []),
]
XML: list[tuple[str, str, str, Calls]] = [
    (
        "qwen3_coder",
        "Well.\n<tool_call>\n<function=weather>\n<parameter=a>\nx\n\n</parameter> y\n</parameter>\n"
        "<parameter=b>\n[1, {'c': None}]\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n"
        "<function=time>\n</function>\n</tool_call>",
        "Well.",
        [("weather", '{"a": "x\\n\\n</parameter> y", "b": [1, {"c": null}]}'), ("time", "{}")],
    ),
    # What is forgotten: the tag before, the one behind, a line's end, what closes the function.
    (
        "qwen3_coder",
        "So <function=time><parameter=a>True</parameter></tool_call> Done.",
        "SoDone.",
        [("time", '{"a": true}')],
    ),
    ("qwen3_coder", "<function=time>\n<parameter=a>\nx", "", [("time", '{"a": ')]),
    ("qwen3_coder", "<function=time>\n<parameter=a>\nx\n</parameter>", "", [("time", '{"a": "x"')]),
    ("qwen3_coder", "<function=rain>\n</function>", "<function=rain>\n</function>", []),
    ("qwen3_coder", "<function=time> flies", "<function=time> flies", []),
    ("qwen3_coder", "<function=time>\n<parameter=", "<function=time>\n<parameter=", []),
    ("qwen3_coder", "<tool_call>\n<function=ti", "<tool_call>\n<function=ti", []),
    ("qwen3_coder", "<function=time" + "e" * 300, "<function=time" + "e" * 300, []),
    (
        "qwen3_coder",
        "<tool_call>\n<function=time>\n</function>\n<function=rain>\n</function>\n</tool_call>",
        "<function=rain>\n</function>\n</tool_call>",
        [("time", "{}")],
    ),
    (
        "seed_oss",
        "<seed:tool_call>\n<function=time>\n<parameter=a>\n1 é\n</parameter>\n</function></seed:tool_call>",
        "",
        [("time", '{"a": "\\n1 é\\n"}')],
    ),
]
GLM: list[tuple[str, str, Calls]] = [
    (
        "Well.\n<tool_call>weather\n<arg_key>a</arg_key>\n<arg_value>x\n</arg_value> y</arg_value>\n"
        '<arg_key>b</arg_key>\n<arg_value>[1, {"c": null}]</arg_value>\n</tool_call>\n'
        "<tool_call>time\n</tool_call>\n",
        "Well.",
        [("weather", '{"a": "x\\n</arg_value> y", "b": [1, {"c": null}]}'), ("time", "{}")],
    ),
    (
        "<tool_call>weather<arg_key>a</arg_key><arg_value>true</arg_value></tool_call><tool_call>time</tool_call>",
        "",
        [("weather", '{"a": true}'), ("time", "{}")],
    ),
    (
        "<tool_call> \ntime <arg_key>a</arg_key> <arg_value></arg_value> </tool_call> Done.",
        "Done.",
        [("time", '{"a": ""}')],
    ),
    # What closes one is forgotten, before another one and before text.
    (
        "<tool_call>time<arg_key>a</arg_key><arg_value>1</arg_value>\n<tool_call>time</tool_call>",
        "",
        [("time", '{"a": 1}'), ("time", "{}")],
    ),
    (
        "<tool_call>time<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key></tool_call>",
        "<arg_key>b</arg_key></tool_call>",
        [("time", '{"a": 1}')],
    ),
    # Only what opens calls may bring another one.
    ("<tool_call>time</tool_call>weather</tool_call>", "weather</tool_call>", [("time", "{}")]),
    # Cut.
    ("<tool_call>time\n<arg_key>a</arg_key>\n<arg_value>x", "", [("time", '{"a": ')]),
    ("<tool_call>time\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n", "", [("time", '{"a": "x"')]),
    # None.
    *(
        (text, text, [])
        for text in (
            *("<tool_call>time", "<tool_call>time\n", "<tool_call>time flies</tool_call>", "<tool_call>ti"),
            *("<tool_call>rain</tool_call>", '<tool_call>\n{"name": "time"}\n</tool_call>'),
            *("time<arg_key>a</arg_key><arg_value>1</arg_value>", "<tool_call>" + "time" * 90),
            *("<tool_call>time<arg_key></arg_key><arg_value>", "<tool_call>time<arg_key>a</arg_key>b"),
            "<tool_call>time<arg_key>" + "k" * 300 + "</arg_key><arg_value>",
            "<tool_call>time<arg_key>a</arg_key>" + " " * 300 + "<arg_value>",
        )
    ),
]
PYTHON: list[tuple[str, str, str, Calls]] = [
    (
        "olmo3",
        "Hm. <function_calls>weather(a='it\\'s', b=[1.5, None, {\"k\": True}])\ntime()</function_calls>",
        "Hm.",
        [("weather", '{"a": "it\'s", "b": [1.5, null, {"k": true}]}'), ("time", "{}")],
    ),
    ("olmo3", "<function_calls>rain()</function_calls>", "<function_calls>rain()</function_calls>", []),
    ("pythonic", '[time(a=1), weather(b="x")]', "", [("time", '{"a": 1}'), ("weather", '{"b": "x"}')]),
    ("pythonic", "[time(a=1, b=2,)] Done.", "Done.", [("time", '{"a": 1, "b": 2}')]),
    ("pythonic", "So: [time()]", "So: [time()]", []),
    ("pythonic", "[time (", "[time (", []),
    ("pythonic", "[time(a=now())]", "[time(a=now())]", []),
    ("pythonic", "[time('x')]", "[time('x')]", []),
    ("pythonic", "[time(a=1, b=now())]", "now())]", [("time", '{"a": 1')]),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[time, weather]", "[time, weather]", []),
    ("pythonic", "[time(a='x", "", [("time", '{"a": "x')]),
    ("llama4_pythonic", "So: <|python_start|>[time()]<|python_end|>", "So:", [("time", "{}")]),
    ("llama4_pythonic", "[time()]", "", [("time", "{}")]),
]
BEGINS, OPENS, PARTS_OF, CLOSES, ENDS = (
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    "<｜tool▁calls▁end｜>",
)
DEEPSEEK: list[tuple[str, str, str, Calls]] = [
    (
        "deepseek_v3",
        f'So.{BEGINS}{OPENS}function{PARTS_OF}time\n```json\n{{"a": 1}}\n```{CLOSES}\n'
        f"{OPENS}function{PARTS_OF}weather\n```json\n{{}}\n```{CLOSES}{ENDS}",
        "So.",
        [("time", '{"a": 1}'), ("weather", "{}")],
    ),
    (
        "deepseek_v31",
        f"{BEGINS}{OPENS}time{PARTS_OF}{{}}{CLOSES}{OPENS}time{PARTS_OF}{{}}",
        "",
        [("time", "{}")] * 2,
    ),
    ("deepseek_v3", f"{OPENS}time{PARTS_OF}{{}}", "", [("time", "{}")]),
    ("deepseek_v3", f"{BEGINS}{OPENS}rain{PARTS_OF}{{}}", f"{BEGINS}{OPENS}rain{PARTS_OF}{{}}", []),
    ("deepseek_v3", f"{BEGINS}{OPENS}time", f"{BEGINS}{OPENS}time", []),
    ("deepseek_v3", f"{OPENS}{'time' * 70}{{}}", f"{OPENS}{'time' * 70}{{}}", []),
    ("deepseek_v3", f"{OPENS}time{PARTS_OF}{{}}{CLOSES}{OPENS}tim", f"{OPENS}tim", [("time", "{}")]),
    ("deepseek_v3", f"{BEGINS}{OPENS}time{PARTS_OF}{{}} Done.", "Done.", [("time", "{}")]),
]
TWO = '{"name": "time", "arguments": {"a": "]"}}, {"name": "weather", "arguments": {}}'
CALLED = [("time", '{"a": "]"}'), ("weather", "{}")]
LISTED: list[tuple[str, str, str, Calls]] = [
    ("apriel", f"\n<tool_calls>[{TWO}]</tool_calls>\n", "", CALLED),
    ("apriel", f"Hm.\n<tool_calls>\n[{TWO}]\n</tool_calls> Done.", "Hm.Done.", CALLED),
    ("apriel", "<tool_calls>[]</tool_calls>", "<tool_calls>[]</tool_calls>", []),
    ("nemotron", f"<TOOLCALL>[{TWO}]</TOOLCALL>", "", CALLED),
    ("nemotron", '<TOOLCALL>["time"]</TOOLCALL>', '<TOOLCALL>["time"]</TOOLCALL>', []),
    ("phi4_mini_json", f"functools[{TWO}]", "", CALLED),
    ("phi4_mini_json", "functools.cache, functools[0]", "functools.cache, functools[0]", []),
    ("xlam", f"[{TWO}]", "", CALLED),
    ("xlam", f" \n[{TWO}]\nDone.", "Done.", CALLED),
    ("xlam", f"So: [{TWO}]", f"So: [{TWO}]", []),
    ("xlam", "[]\n", "[]\n", []),
    ("xlam", '[1, {"name": "time"}]', '[1, {"name": "time"}]', []),
    ("xlam", '{"name": "time", "arguments": {}}', '{"name": "time", "arguments": {}}', []),
    ("xlam", " [", " [", []),
]
CASES = [
    *(("hermes", *case) for case in HERMES),
    *(("llama3_json", *case) for case in LLAMA),
    *(("mistral", *case) for case in MISTRAL),
    *(("granite", *case) for case in GRANITE),
    *LISTED,
    *XML,
    *((name, *case) for case in GLM for name in ("glm45", "glm47")),
    *PYTHON,
    *DEEPSEEK,
]


def read(parser: ToolCallParser, pieces: list[str]) -> tuple[str, Calls]:
    """Content and calls of a text that comes in these pieces, the last of which is known to be it."""
    content, names, arguments = "", [], []
    for i, piece in enumerate(pieces):
        parsed = parser.feed(piece, final=i == len(pieces) - 1)
        content += parsed.content
        for delta in parsed.calls:
            if delta.name is not None:
                assert delta.index == len(names)
                names.append(delta.name)
                arguments.append("")
            assert delta.index == len(names) - 1
            arguments[-1] += delta.arguments
    assert parser.calls == len(names)
    return content, list(zip(names, arguments, strict=True))


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_content_and_calls(form: str, text: str, content: str, calls: Calls) -> None:
    assert read(FORMATS[form].parser(NAMES), [text]) == (content, calls)
    assert read(FORMATS[form].parser(NAMES), [*text, ""]) == (content, calls)


@given(case=st.sampled_from(CASES), data=st.data())
@settings(deadline=None, max_examples=200)
def test_where_the_text_is_cut_does_not_matter(
    case: tuple[str, str, str, Calls], data: st.DataObject
) -> None:
    form, text, content, calls = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(FORMATS[form].parser(NAMES), pieces) == (content, calls)


READ_ALIKE = [
    *("hermes", "llama3_json", "mistral", "nemotron", "xlam", "qwen3_coder", "seed_oss"),
    *("olmo3", "llama4_pythonic", "deepseek_v3", "glm47"),
]
PARTS = [
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<tool_call>time", "<arg_key>a</arg_key>"),
    *("<function=time>", "<function=rain>", "<function=", "<parameter=a>", "<parameter=", "</parameter>"),
    *("</parameter>\n</function>", "</function>", "</function", "<seed:tool_call>", "</seed:tool_call>"),
    *("<function_calls>", "</function_calls>", "<|python_start|>", "<|python_end|>", "time(", "a=", ")"),
    *("[time(a=", "'", '"""', "r'", "True", "None", "\\u00", "[1, {'b': ", "weather(b='x'a=2)", "\\"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "```"),
    *("<｜tool▁calls▁end｜>", "json", "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}", "<｜tool"),
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{",
    *("<tool_call>", "</tool_call>", "<tool_", "call>", "<|python_tag|>", "[TOOL_CALLS]", "[TOOL", "text"),
    *("<TOOLCALL>", "</TOOLCALL>", "</TOOL"),
    *("[ARGS]", "[CALL_ID]", "[ARGS", "time", "rain", "abc123", '[TOOL_CALLS]time[ARGS]{"a": '),
    *("\n", " ", "{", "}", "[", "]", ",", ";", ":", '"', "\\", "1", "null", "\u2028", "é", "{}", '"{}"'),
    *('"name"', '"time"', '"rain"', '"arguments"', '"parameters"', '{"a": [1,"}"]}', '"x": 1'),
    *('{"name": "time", "arguments": {}}', '{"arguments": {"b":2}, "name": "weather"}'),
    *('{"name": "time", "arguments": {"a": ', '{"id": 1'),
]


@given(
    form=st.sampled_from(READ_ALIKE),
    text=st.lists(st.sampled_from(PARTS), max_size=14).map("".join),
    data=st.data(),
)
@settings(deadline=None, max_examples=500)
@example("llama3_json", '{1"<|python_tag|>{"name": "time"}', None)
def test_any_text_is_read_alike_however_it_is_cut(form: str, text: str, data: st.DataObject | None) -> None:
    parser = FORMATS[form].parser
    cut = data.draw(st.integers(0, len(text))) if data else 2
    whole = read(parser(NAMES), [text])
    assert read(parser(NAMES), [text[:cut], text[cut:]]) == whole
    assert read(parser(NAMES), [*text, ""]) == whole
    if not whole[1]:
        assert whole[0] == text


BEGUN: list[tuple[str, str, str, Calls]] = [
    ("Well.", f" So. {HERMES[0][0]}", " So.", HERMES[0][2]),
    ("Well. <tool", 'box> <tool_call>{"name": "time"}</tool_call>', "box>", [("time", "{}")]),
    ("Well. <tool", '_call>{"name": "time"}</tool_call>', "", [("time", "{}")]),
    ("Well. <tool_call>\n", '{"name": "time"}</tool_call><tool_call>', "<tool_call>", [("time", "{}")]),
    ('<tool_call>{"name": "ra', 'in"}<tool_call>{"name', 'in"}<tool_call>{"name', []),
    ('<tool_call>{"name": "ti', 'me", "arguments": {}}', "", [("time", "{}")]),
    ('<tool_call>{"name": "time", "arguments": {"a": "', 'b"}}', "", [("time", '{"a": "b"}')]),
    ('<tool_call>{"name": "time"}', "</tool_call> Done.", "Done.", []),
    (
        '<tool_call>{"name": "time"}</tool_call><tool_call>{"name": "weather", "arguments": {"a": 1',
        '}}</tool_call><tool_call>{"name": "time"}</tool_call>',
        "",
        [("weather", '{"a": 1}'), ("time", "{}")],
    ),
    ('<tool_call>{"name": "time"}</tool_call> <tool', "s", "s", []),
    ("Well. ", "", "", []),
    ("Well. ", "Yes", "Yes", []),
]


@pytest.mark.parametrize(("begun", "answer", "content", "calls"), BEGUN)
def test_an_answer_may_go_on_with_a_begun_call(begun: str, answer: str, content: str, calls: Calls) -> None:
    for pieces in ([answer], [*answer, ""]):
        parser = FORMATS["hermes"].parser(NAMES)
        parser.begin(begun)
        assert parser.open == ("<tool" in begun[-100:].rpartition("</tool_call>")[2])
        assert read(parser, pieces) == (content, calls)


@given(
    form=st.sampled_from(READ_ALIKE),
    parts=st.lists(st.sampled_from(PARTS), max_size=14),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_begun_text_is_not_told_and_what_it_leaves_open_is(
    form: str, parts: list[str], data: st.DataObject
) -> None:
    text = "".join(parts)
    cut, between = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))
    begun, answer = text[:cut], text[cut:]
    parser = FORMATS[form].parser(NAMES)
    parser.begin(begun)
    content, calls = read(parser, [answer[:between], answer[between:]])
    whole, all_calls = read(FORMATS[form].parser(NAMES), [text])
    assert calls == all_calls[len(all_calls) - len(calls) :]
    assert is_within(content, answer)
    if not all_calls:
        assert content == answer
    elif not calls:  # white space at its end is content, as of any answer without calls
        content = content.rstrip()
    assert whole.endswith(content)
    before = whole[: len(whole) - len(content)]
    assert is_within(before.rstrip(), begun)


def is_within(some: str, text: str) -> bool:
    """Whether these characters are in the text, in their order."""
    rest = iter(text)
    return all(character in rest for character in some)


def test_arguments_come_while_they_are_written() -> None:
    parser = FORMATS["hermes"].parser(NAMES)
    assert not parser.feed('Hm <tool_call>\n{"name": "time", "arguments": ').calls
    (first,) = parser.feed('{"a": "b').calls
    assert (first.index, first.name, first.arguments) == (0, "time", '{"a": "b')
    (more,) = parser.feed(" c").calls
    assert (more.index, more.name, more.arguments) == (0, None, " c")


def test_text_comes_as_soon_as_it_can_be_no_call() -> None:
    parser = FORMATS["hermes"].parser(NAMES)
    assert [parser.feed(piece).content for piece in ("So ", "<tool", "s> ", "it")] == [
        "So",
        "",
        " <tools>",
        " it",
    ]


def test_long_answers_take_time_in_proportion() -> None:
    """Text that goes on beginning calls, and one call without an end: no text is read twice."""
    for text in (
        '<tool_call>{"' * 10_000,
        '<tool_call>{"arguments": {"' + "[" * 100_000,
        "<tool_call>" * 100_000,
        "x" + "\n" * 100_000,
    ):
        for size in (7, len(text)):
            pieces = [text[i : i + size] for i in range(0, len(text), size)]
            before = time.process_time()
            content, calls = read(FORMATS["hermes"].parser(NAMES), pieces)
            assert time.process_time() - before < 2  # a quarter of a second; each copying the rest, five
            assert content == text
            assert not calls


def test_white_space_before_an_answer_is_not_looked_at_again() -> None:
    parser = FORMATS["pythonic"].parser(NAMES)
    assert all(parser.feed("  \n").content == "" and not parser._text for _ in range(3))
    assert parser.feed("[time()]").calls[0].name == "time"
    assert parser.feed("", final=True).content == ""


def test_deep_arguments_are_no_calls() -> None:
    deep = '<tool_call>{"arguments": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + ', "name": "time"}'
    content, calls = read(FORMATS["hermes"].parser(NAMES), [deep])
    assert (content, calls) == (deep, [])


def test_arguments_are_what_json_says() -> None:
    arguments = json.dumps({"text": 'a "quoted"\n} ]', "n": [1.5e3, None, {"é": []}]})
    text = f'<tool_call>\n{{"name": "time", "arguments": {arguments}}}\n</tool_call>'
    assert read(FORMATS["hermes"].parser(NAMES), list(text)) == ("", [("time", arguments)])
