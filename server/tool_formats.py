"""Ways in which models write calls of tools: what to read, and grammars that let nothing else be written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from engine.chat_template import reads_tools
from engine.grammar import GrammarSpec
from engine.harmony_format import writes_harmony
from engine.tool_prompt import CALL_BEGIN, CALL_END, GLM_MARKS, LISTED_BEGIN
from server.calls import Call, Functions
from server.harmony_calls import HarmonyCalls
from server.json_calls import DEEPSEEK_MARKS, DeepSeekCall, JsonCall, NamedCall
from server.python_calls import PythonCall
from server.tool_calls import ToolCallParser
from server.tool_grammars import Function, arguments_schema, python_call, xml_call
from server.xml_calls import GlmCall, GlmLinesCall, PaddedXmlCall, TaggedCall, XmlCall

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["FORMATS", "AnyToolFormat", "Function", "ToolFormat", "format_of"]

_CALL_ID, _ARGS = "[CALL_ID]", "[ARGS]"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls.

    Args:
        name: as the setting has it.
        begin: what opens calls, text or a token of its own; empty where only `bare` does.
        end: what closes them; may be empty.
        form: of each call.
        bare: an answer that begins with this is calls; empty where none is without `begin`.
        listed: calls are a JSON list.
        marks: what stands around or between a call's name and its arguments, each with its id where it is a
            token of its own; empty where a call is an object of both.
        between: what stands between calls, where `begin` and `end` stand around all of them and no list.
        parameters: the arguments' key.
        begin_id, end_id: of `begin` and `end`, where they are tokens of their own, which are no text to
            a grammar and, where they are special, are left out of texts otherwise.
        text_ids: other tokens that are no text to a grammar, and are text.
    """

    name: str
    begin: str
    end: str = ""
    form: type[Call] = JsonCall
    bare: Literal["", "{", "["] = ""
    listed: bool = False
    marks: tuple[tuple[str, int | None], ...] = ()
    between: str | None = None
    parameters: str = "arguments"
    begin_id: int | None = None
    end_id: int | None = None
    text_ids: tuple[int, ...] = ()

    @property
    def shown(self) -> frozenset[int]:
        """Tokens that have to be in the text for calls to be found there, also where they are special."""
        own = (self.begin_id, self.end_id, *(token for _, token in self.marks))
        return frozenset(token for token in own if token is not None)

    @property
    def _own(self) -> Mapping[str, int]:
        """Marks that are tokens of their own."""
        return {mark: token for mark, token in self.marks if token is not None}

    @property
    def like_json(self) -> bool:
        """Whether an answer in JSON may look like calls."""
        return bool(self.bare) and issubclass(self.form, JsonCall)

    def new_id(self) -> str:
        """Of a call, as OpenAI's look; Mistral's templates take nine letters and digits only."""
        return uuid4().hex[:9] if self.name == "mistral" else f"call_{uuid4().hex[:24]}"

    def parser(self, functions: Functions) -> ToolCallParser:
        """For one answer that may call these."""
        return ToolCallParser(self.begin, self.end, self.bare, self.form, functions)

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        text: bool,
        schema: Mapping[str, Any] | None,
        several: bool,
        unlike: str = "",
    ) -> GrammarSpec:
        """What an answer may be, in llguidance's form of Lark.

        Args:
            functions: that may be called.
            text: it may also be, or begin with, text that is no call.
            schema: or JSON of this schema, instead of text.
            several: there may be several calls.
            unlike: text does not begin with this, even behind white space; empty where it may begin with
                anything.

        Raises:
            RecursionError: a schema is nested too deeply to be written.
            FormError: the form has no room for a function's schema.
        """
        rules = ["%llguidance {}", *self._answers(text, schema is not None, several, unlike)]
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
        for i, function in enumerate(functions):
            rules.append(f"call_{i}: {self._around(f'arguments_{i}', function.name)}")
            if issubclass(self.form, TaggedCall):
                rules += xml_call(i, function, self.form, self._own)
            elif issubclass(self.form, PythonCall):
                rules += python_call(i, function, words=self.name != "olmo3")
            else:
                rules.append(f"arguments_{i}: %json {arguments_schema(function)}")
        if schema is not None:
            rules.append(f"body: %json {json.dumps(schema)}")
        return GrammarSpec("tools", "\n".join(rules))

    def _around(self, arguments: str, name: str) -> str:
        """A call, with the rule of its arguments."""
        if issubclass(self.form, XmlCall):
            return f'{json.dumps(f"<function={name}>" + chr(10))} {arguments} "</function>"'
        if issubclass(self.form, GlmCall):
            return f"{json.dumps(name + self.form.line)} {arguments}"
        if issubclass(self.form, PythonCall):
            return f'{json.dumps(f"{name}(")} {arguments} ")"'
        if issubclass(self.form, DeepSeekCall):
            opens, parts, closes = [_written(*mark) for mark in self.marks]
            if self.name == "deepseek_v31":
                return f"{opens} {json.dumps(name)} {parts} {arguments} {closes}"
            name = json.dumps(f"{name}\n```json\n")
            return f'{opens} "function" {parts} {name} {arguments} "\\n```" {closes}'
        if not self.marks:
            opening = f'{{"name": {json.dumps(name)}, "{self.parameters}": '
            # Mistral's templates show the ids of calls, and its models write some.
            id_ = r'(", \"id\": \"" ID "\"")? ' if self.name == "mistral" else ""
            return f'{json.dumps(opening)} {arguments} {id_}"}}"'
        head = (_written(mark, token) + (" ID" if mark == _CALL_ID else "") for mark, token in self.marks)
        return " ".join((json.dumps(name), *head, arguments))

    def _answers(self, text: bool, body: bool, several: bool, unlike: str) -> list[str]:
        """The rules for all but `call`, a call's object, and `body`."""
        other = " | body" if body else " | FIRST" if text else ""
        unless = rf" & ~(/\s*/ {json.dumps(unlike)} /(.|\n)*/)" if unlike else ""
        openings = [self.form.opening, self.begin if self.bare and self.begin_id is None else ""]
        not_opened = "".join(rf" & ~(/(.|\n)*/ {json.dumps(each)} /(.|\n)*/)" for each in openings if each)
        unless += not_opened
        if self.listed:
            more = '(", " call)*' if several else '""'
        if self.bare:
            # Text that begins so would be read as a call.
            calls = '"[" call more "]"' if self.listed else "call"
            first = [f"start: {calls}{other}", rf"FIRST: /[^\{self.bare}\s](.|\n)*/{unless}"]
            return [*first, f"more: {more}"] if self.listed else first
        begin, end = _written(self.begin, self.begin_id), _written(self.end, self.end_id)
        if issubclass(self.form, NamedCall) and self.marks:
            behind, more = "call more", "one?" if several else '""'
        elif issubclass(self.form, GlmCall):
            behind, more = f"call {end} more", f"({json.dumps(self.form.line)} one)*" if several else '""'
        elif self.between is not None:
            behind, more = f"call more {end}", f"({json.dumps(self.between)} call)*" if several else '""'
        elif self.listed:
            opening = "" if self.begin.endswith("[") else '" "? "[" '
            behind = f'{opening}call more "]" {end if self.end else ""}'
        else:
            behind, more = f'"\\n" call "\\n" {end} more', r'("\n" one)*' if several else '""'
        calls = "one"
        if text and not body:
            # Lazy: as soon as the text spells what opens calls, they begin. A token can be no part of text.
            calls, other = "opened behind", " | FIRST"
            if self.begin_id is not None:
                calls += " | FIRST one"
            if self.text_ids:
                # What text may not begin with may be one of them.
                other += (
                    f" | {'SOME' if unlike else 'FIRST'} {_any_of(self.text_ids)} said (opening behind | TEXT"
                )
                other += ")" if self.begin_id is None else " | TEXT one)"
        return [
            f"start: {calls}{other}",
            f"one: {begin} behind",
            f"behind: {behind}",
            f"more: {more}",
            f"said: (TEXT {_any_of(self.text_ids)})*" if self.text_ids else 'said: ""',
            rf"opened[lazy]: (/(.|\n)*/ {json.dumps(self.begin)}){unless}",
            rf"opening[lazy]: (/(.|\n)*/ {json.dumps(self.begin)}){not_opened}",
            rf"FIRST: /(.|\n)*/{unless}",
            rf"SOME: /\s*\S(.|\n)*/{unless}",
            rf"TEXT: /(.|\n)*/{not_opened}",
            *(["ID: /[a-zA-Z0-9]{9}/"] if self.name == "mistral" else []),
        ]


_DEEPSEEK = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK_TEXT = tuple((mark, None) for mark in DEEPSEEK_MARKS)
_GLM = tuple((mark, None) for mark in GLM_MARKS)

FORMATS: dict[str, ToolFormat] = {
    each.name: each
    for each in (
        ToolFormat("apriel", "<tool_calls>", "</tool_calls>", listed=True),
        ToolFormat("qwen3_coder", CALL_BEGIN, CALL_END, PaddedXmlCall),
        ToolFormat("seed_oss", "<seed:tool_call>", "</seed:tool_call>", XmlCall),
        ToolFormat("glm45", CALL_BEGIN, CALL_END, GlmLinesCall, marks=_GLM),
        ToolFormat("glm47", CALL_BEGIN, CALL_END, GlmCall, marks=_GLM),
        ToolFormat("hermes", CALL_BEGIN, CALL_END),
        ToolFormat("llama3_json", "<|python_tag|>", bare="{", parameters="parameters"),
        ToolFormat("mistral", "[TOOL_CALLS]", form=NamedCall, listed=True),
        ToolFormat("granite", LISTED_BEGIN, listed=True),
        ToolFormat("nemotron", "<TOOLCALL>", "</TOOLCALL>", listed=True),
        ToolFormat("phi4_mini_json", "functools[", listed=True),
        ToolFormat("xlam", "", bare="[", listed=True),
        ToolFormat("olmo3", "<function_calls>", "</function_calls>", PythonCall, between="\n"),
        ToolFormat(
            "llama4_pythonic", "<|python_start|>", "<|python_end|>", PythonCall, bare="[", listed=True
        ),
        ToolFormat("pythonic", "", form=PythonCall, bare="[", listed=True),
        ToolFormat("deepseek_v3", *_DEEPSEEK, DeepSeekCall, marks=_DEEPSEEK_TEXT, between="\n"),
        ToolFormat("deepseek_v31", *_DEEPSEEK, DeepSeekCall, marks=_DEEPSEEK_TEXT, between=""),
    )
}
"""By name: of ServiceNow's Apriel, whose template shows Hermes's too; of Qwen3-Coder and later ones of Qwen;
of Seed-OSS; of GLM-4.5 and 4.6, and of 4.7, which writes no lines; of NousResearch's Hermes, which Qwen and
SmolLM share; of Llama 3.1 and later; of Mistral, whose newer models have `marks`; of Granite 3, whose
successor writes as Hermes; of NVIDIA's Nemotron; of Phi-4-mini as vLLM's template asks for it; of
Salesforce's xLAM 2; of OLMo 3; of Llama 4 and of others that write Python, such as ToolACE; of DeepSeek-V3
and R1, and of V3.1."""

_IN_PYTHON = "[func_name1("
_SHOWN = {
    "qwen3_coder": (CALL_BEGIN, "<function=", "<parameter="),
    "glm45": (CALL_BEGIN, GlmLinesCall.behind_name),
    "glm47": (CALL_BEGIN, GlmCall.before_name),
    "deepseek_v3": (_DEEPSEEK[0], "```json"),
    "llama4_pythonic": (_IN_PYTHON, "<|header_start|>"),
    "pythonic": (_IN_PYTHON,),
    "xlam": ('[{"name": "tool_call_name"',),
}
"""What a template has in it that shows a format, where that is not what opens its calls."""


AnyToolFormat = ToolFormat | HarmonyCalls


def format_of(text: TextProcessor, name: str = "auto") -> AnyToolFormat:
    """The way a model writes calls.

    Args:
        text: has the model's template and tokens.
        name: of a format, or "auto" for the one that the template shows. Where it shows none, it is Hermes's,
            in which a template that knows no tools is helped out.
    """
    if name == HarmonyCalls.name or (name == "auto" and writes_harmony(text)):
        return HarmonyCalls.of(text)
    template = text.chat_template_for(tools=True) or ""
    chosen = FORMATS[_shown_in(template) if name == "auto" else name]
    if chosen.name == "mistral":
        chosen = replace(chosen, marks=_marks(template, text))
    marks = tuple((mark, text.own_token_id(mark)) for mark, _ in chosen.marks)
    begin, end = text.own_token_id(chosen.begin), text.own_token_id(chosen.end)
    chosen = replace(chosen, marks=marks, begin_id=begin, end_id=end)
    return replace(chosen, text_ids=tuple(id_ for id_ in text.own_text_ids if id_ not in chosen.shown))


def _marks(template: str, text: TextProcessor) -> tuple[tuple[str, int | None], ...]:
    """Of Mistral's calls: what the template shows, or, where it shows no calls, the vocabulary."""
    if FORMATS["mistral"].begin in template:
        shown = [mark for mark in (_CALL_ID, _ARGS) if mark in template] if _ARGS in template else []
    else:
        shown = [_ARGS] if _ARGS in text.tokenizer.get_added_vocab() else []
    return tuple((mark, text.own_token_id(mark)) for mark in shown)


def _shown_in(template: str) -> str:
    if template and reads_tools(template):
        template = template.replace("\\n", "\n")  # which is a line's end in what it writes
        for form in FORMATS.values():
            if all(text in template for text in _SHOWN.get(form.name, (form.begin,))):
                return form.name
        if '"parameters"' in template and "ipython" in template:
            return "llama3_json"
    return "hermes"


def _written(text: str, token_id: int | None) -> str:
    """In a grammar."""
    return json.dumps(text) if token_id is None else _any_of([token_id])


def _any_of(token_ids: Sequence[int]) -> str:
    return f"<[{','.join(map(str, token_ids))}]>"
