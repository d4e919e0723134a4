"""gpt-oss's template and its tokens: what is written of a conversation, what is read, and grammars."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar import GrammarCompiler, GrammarSpec
from engine.harmony import HarmonyThought
from engine.harmony_format import HarmonyFormat, ends_of
from engine.reasoning import thought_format_of
from engine.text import TextProcessor
from server.tool_formats import Function, format_of
from server.tool_use import CallReader
from tests.published.test_templates import (
    ANSWER,
    CALLS,
    FUNCTIONS,
    ONE,
    SYSTEM,
    TOLD,
    TOOLS,
    TWO,
    USER,
    as_json,
    text_of,
)

NAME = "openai-gpt-oss-120b"
NEXT = "<|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Is weather a call? é😀<|end|>"
FINAL = "<|channel|>final<|message|>"


def gpt_oss() -> tuple[TextProcessor, HarmonyFormat]:
    text = text_of(NAME)
    form = thought_format_of(text)
    assert isinstance(form, HarmonyFormat)
    assert sorted(form.shown) == [200002, 200003, 200005, 200006, 200007, 200008, 200012]
    return text, form


def read(answer: str) -> tuple[str, str, list[tuple[str, Any]]]:
    """Thought, content and calls, alike whether tokens come one by one or at once."""
    text, form = gpt_oss()
    tokens = text.encode(answer, add_special_tokens=False)
    found = []
    for pieces in ([[token] for token in tokens], [tokens]):
        thought = HarmonyThought("assistant", calls=True)
        detokenizer = text.detokenizer(tokens, shown=form.shown, thought=thought)
        reader = CallReader(format_of(text), TOOLS)
        said = content = ""
        calls: list[list[str]] = []
        for i, piece in enumerate(pieces):
            final = i == len(pieces) - 1
            new = detokenizer.push(piece, final=final)
            more, deltas = reader.read(0, new.text, final=final)
            said, content = said + new.thought, content + more
            for delta in deltas:
                if delta.function.name is not None:
                    calls.append([delta.function.name, ""])
                calls[delta.index][1] += delta.function.arguments
        found.append((said, content, [(name, as_json(arguments)) for name, arguments in calls]))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one", "two"])
def test_calls_are_read_and_follow_their_grammar_as_the_template_writes_them(messages: Any) -> None:
    text, form = gpt_oss()
    count = len(messages[1]["tool_calls"])
    called = text.render_chat(messages[:2], tools=TOLD, add_generation_prompt=False)
    prompt = text.render_chat(messages[:1], tools=TOLD)
    assert called.startswith(prompt)
    answer = called.removeprefix(prompt)
    assert read(answer) == ("", "", CALLS[:count])
    preamble = "<|channel|>commentary<|message|>I look.<|end|>"
    before = f"{THOUGHT}{NEXT}{preamble}{NEXT}{THOUGHT}{NEXT}"
    thought = "Is weather a call? é😀"
    assert read(before + answer) == (f"{thought}\n{thought}", "I look.", CALLS[:count])
    functions = [Function(each["name"], each["parameters"]) for each in FUNCTIONS]
    compiler = GrammarCompiler(text.tokenizer, ends_of(text, []))
    answer = answer.replace("<|call|>", "<|end|>", count - 1)
    for free in (False, True):
        spec = format_of(text).grammar(functions, text=free, schema=None, several=True)
        spec = spec._replace(lead=form.lead(HarmonyThought("assistant"), thinks=True, calls=True))
        for led in (answer, f"{THOUGHT}{NEXT}{answer}"):
            state = compiler.compile(spec).start()
            assert all(map(state.advance, text.encode(led, add_special_tokens=False)))
            assert state.ended


def test_an_answer_may_think_before_it_follows_a_schema_and_ends_by_either_token() -> None:
    text, form = gpt_oss()
    schema = '{"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}'
    lead = form.lead(HarmonyThought("assistant"), thinks=True, calls=False)
    ends = ends_of(text, [])
    assert text.token_strings(ends) == ["<|return|>", "<|call|>"]
    grammar = GrammarCompiler(text.tokenizer, ends).compile(GrammarSpec("json_schema", schema, lead))
    for header in (FINAL, "<|channel|>final <|constrain|>json<|message|>"):
        for answer, right in (('{"q": 1}', True), ('{"q": "1"}', False)):
            for end in ends:
                state = grammar.start()
                tokens = text.encode(f"{THOUGHT}{NEXT}{header}{answer}", add_special_tokens=False)
                assert all(map(state.advance, tokens)) == right
                assert not right or state.advance(end)


def test_what_is_written_of_a_conversation() -> None:
    text, _ = gpt_oss()
    calls = {**TWO[1], "content": "I look.", "reasoning_content": "Both."}
    prompt = text.render_chat([SYSTEM, USER, calls, *TWO[2:]], tools=TOLD)
    assert "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools" in prompt
    preamble = "<|channel|>commentary<|message|>I look.<|end|>"
    thought = "<|channel|>analysis<|message|>Both.<|end|>"
    assert (
        f"{NEXT}{thought}{NEXT}{preamble}{NEXT} to=functions.weather<|channel|>commentary json<|message|>"
        in prompt
    )
    for i, name in enumerate(("weather", "get_time")):
        result = f'<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>"result {i}"<|end|>'
        assert f"<|call|>{result}{NEXT}" in prompt
    # A turn that is over has no thoughts, and a tool may have no description.
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    prompt = text.render_chat(
        [USER, calls, *TWO[2:], {**ANSWER, "reasoning_content": "So."}, SYSTEM, USER], tools=tools
    )
    assert "Both." not in prompt
    assert "So." not in prompt
    assert "# Instructions\n\nBe brief." in prompt
    assert "// \ntype f = () => any;" in prompt
