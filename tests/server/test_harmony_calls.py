"""Calls in harmony: messages to functions, read as they come, and grammars of them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from engine.errors import RequestError
from engine.harmony import HarmonyReader
from engine.harmony_format import HarmonyFormat
from server.harmony_calls import HarmonyCalls, HarmonyParser
from server.tool_calls import CallDelta
from server.tool_grammars import Function
from tests.engine.test_harmony import ANALYSIS, FINAL, FIRST_TO, NEXT, THOUGHT, WEATHER, form, harmony
from tests.server.test_tool_formats import ANSWER, FUNCTIONS, follows

NAMES = {function.name: function.parameters for function in FUNCTIONS}
TIME = WEATHER.replace("weather", "time").replace('"city": "Paris"', "")
PARIS = '{"city": "Paris"}'
PREAMBLE = "<|channel|>commentary<|message|>I look.<|end|>"

CASES: list[tuple[str, str, list[tuple[str, str]]]] = [
    (WEATHER, "", [("weather", PARIS)]),
    (FIRST_TO, "", [("weather", PARIS)]),
    (f"{PREAMBLE}{NEXT}{WEATHER}", "I look.", [("weather", PARIS)]),
    (f"{WEATHER}{NEXT}{TIME}{NEXT}{FINAL}So.", "So.", [("weather", PARIS), ("time", "{}")]),
    (f"{PREAMBLE}{NEXT}{WEATHER}{NEXT}{FINAL}So.", "I look.\nSo.", [("weather", PARIS)]),
    # Of a name without what stands before it, or in the channel of thoughts.
    (WEATHER.replace("functions.", ""), "", [("weather", PARIS)]),
    (WEATHER.replace("commentary", "analysis"), "", [("weather", PARIS)]),
    # The object is all of the arguments, and may have white space around it or be left out.
    (WEATHER.replace(PARIS, f" \n{PARIS}\n x"), "", [("weather", PARIS)]),
    (TIME.replace("{}", ""), "", [("time", "{}")]),
    (TIME.replace("{}", " \n"), "", [("time", "{}")]),
    # Cut, also by the token that ends it and is no text.
    (WEATHER[:-8], "", [("weather", PARIS)]),
    (WEATHER[:-12], "", [("weather", PARIS[:-4])]),
    (WEATHER[:40], "", []),
    # No calls: of what nobody may call, and of no object.
    (WEATHER.replace("weather", "rain"), PARIS, []),
    (WEATHER.replace("functions.weather", "python"), PARIS, []),
    (WEATHER.replace(PARIS, "Paris"), "Paris", []),
    (f"{PREAMBLE}{NEXT}{WEATHER.replace('weather', 'rain')}{NEXT}{FINAL}So.", f"I look.\n{PARIS}\nSo.", []),
    (f"{FINAL}<b> is {PARIS}", f"<b> is {PARIS}", []),
    ("", "", []),
]


def read(text: str, size: int, *, told_apart: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of an answer that comes in pieces of so many characters."""
    reader, parser = HarmonyReader("assistant", calls=True, told_apart=told_apart), HarmonyParser(NAMES)
    content, calls = "", list[list[str]]()
    for start in range(0, len(text) + size, size):
        piece, final = text[start : start + size], start + size >= len(text) + size
        parsed = parser.feed(reader.feed(piece, final)[1], final)
        assert [part for part in parsed.order if isinstance(part, CallDelta)] == parsed.calls
        assert "".join(part for part in parsed.order if isinstance(part, str)) == parsed.content
        kinds = [isinstance(part, str) for part in parsed.order]
        assert (True, True) not in pairwise(kinds)
        content += parsed.content
        for call in parsed.calls:
            assert (call.name is not None) == (call.index == len(calls))
            if call.name is not None:
                calls.append([call.name, ""])
            calls[call.index][1] += call.arguments
    assert parser.calls == len(calls)
    return content, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_messages_to_functions_are_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for size in (1, 3, 7, 1000):
        assert read(text, size) == (content, calls)
        # Behind a thought, also where that is content.
        thought = f"{THOUGHT}{NEXT}"
        assert read(thought + text, size) == (content, calls)
        told = "\n".join(filter(None, ("Hm. 2 < 3, <|x.", content)))
        assert read(thought + text, size, told_apart=False) == (told, calls)


def test_arguments_come_as_they_are_written() -> None:
    parser = HarmonyParser(NAMES)
    assert parser.feed("<|channel|>commentary to=weather<|message|>").calls == []
    assert parser.feed(' {"ci').calls == [CallDelta(0, "weather", '{"ci')]
    assert parser.feed('ty": "<|').calls == [CallDelta(0, None, 'ty": "')]
    assert parser.feed('x"}').calls == [CallDelta(0, None, '<|x"}')]
    assert parser.feed("<|call|>").calls == []
    assert parser.calls == 1


def test_content_behind_what_the_answer_goes_on_with() -> None:
    parser = HarmonyParser(NAMES)
    parser.begin("Well, ")
    assert not parser.open
    assert parser.feed("all.").content == "all."
    assert parser.feed(WEATHER).calls == [CallDelta(0, "weather", PARIS)]
    assert parser.feed(f"{NEXT}{FINAL}So.").content == "\nSo."


def calls() -> HarmonyCalls:
    return HarmonyCalls(form())


COMPACT = WEATHER.replace('": "', '":"')


@pytest.mark.parametrize("call", [WEATHER, FIRST_TO, COMPACT, WEATHER.replace(" <|constrain|>json", "")])
def test_calls_that_follow_a_grammar_cannot_be_wrong(call: str) -> None:
    text, one, two = harmony(), call.removesuffix("<|call|>"), TIME.removesuffix("<|call|>")
    options: dict[str, Any] = {"text": False, "schema": None, "several": True}
    required = calls().grammar(FUNCTIONS, **options)
    maybe = calls().grammar(FUNCTIONS, **options | {"text": True})
    json_or = calls().grammar(FUNCTIONS, **options | {"text": True, "schema": ANSWER})
    single = calls().grammar(FUNCTIONS, **options | {"several": False})
    several = f"{one}<|end|>{NEXT}{two}"
    for spec in (required, maybe, json_or, single):
        assert follows(spec, one, text)
        assert follows(spec, two, text)
        assert follows(spec, several, text) == (spec is not single)
        for other in (one[:-1], PARIS, "No.", "", f"<|channel|>commentary<|message|>{PARIS}"):
            assert not follows(spec, other, text), other
        wrong = [one.replace("weather", "rain"), one.replace("city", "town")]
        wrong += [one[: one.index("{")] + arguments for arguments in ("{}", '{"city": 3}', "Paris", "")]
        assert not any(follows(spec, other, text) for other in wrong)
        assert follows(spec, f"{FINAL}No, <b>.", text) == (spec is maybe)
        assert follows(spec, f"{FINAL}No.<|end|>{NEXT}{one}", text) is False
        assert follows(spec, f'{FINAL}{{"q": 1}}', text) == (spec in (maybe, json_or))
        assert follows(spec, f"{PREAMBLE}{NEXT}{one}", text) == (spec is maybe)
        assert follows(spec, f"{PREAMBLE}{NEXT}{FINAL}No.", text) == (spec is maybe)
        # A thought may stand before each, and nothing else of what is not said.
        led = spec._replace(
            lead=form().lead(form().thought(text, text.encode(NEXT)), thinks=True, calls=True)
        )
        assert follows(led, f"{THOUGHT.replace('<|x.', '.')}{NEXT}{one}", text)
        assert follows(led, one, text)
        assert not follows(led, f"{ANALYSIS}Hm.{one}", text)
        assert not follows(led, f"{THOUGHT.replace('<|x.', '.')}{NEXT}{one.replace('city', 'town')}", text)


@pytest.mark.parametrize("between", [", ", ",", " ,"])
def test_arguments_have_a_space_between_them_or_none(between: str) -> None:
    properties = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"]}
    spec = calls().grammar([Function("f", schema, True)], text=False, schema=None, several=False)
    said = f'<|channel|>commentary to=functions.f<|message|>{{"a": 1{between}"b": 2}}'
    assert follows(spec, said, harmony()) == (between != " ,")


def test_a_vocabulary_without_the_marks_has_no_grammar() -> None:
    with pytest.raises(RequestError, match="no token"):
        HarmonyCalls(HarmonyFormat()).grammar(FUNCTIONS, text=False, schema=None, several=True)


def test_ids_are_openais() -> None:
    one, other = calls().new_id(), calls().new_id()
    assert one != other
    assert one.startswith("call_")
    assert json.dumps(sorted(calls().shown)) == json.dumps(sorted(form().shown))
