"""How each kind of model writes calls: what its template shows, and what its grammar lets through."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
from llguidance.hf import from_tokenizer
from tokenizers import AddedToken, decoders

from engine.grammar import Grammar, GrammarCompiler, GrammarSpec
from engine.text import TextProcessor
from engine.tool_prompt import GLM_MARKS
from server.json_calls import DEEPSEEK_MARKS, DeepSeekCall
from server.python_calls import PythonCall
from server.settings import Settings
from server.tool_formats import FORMATS, Function, ToolFormat, format_of
from server.xml_calls import GlmCall, TaggedCall, XmlCall
from tests.server.conftest import EOS_ID, TEXT

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer"}},
}
FORMS = {
    **FORMATS,
    "mistral_newer": replace(FORMATS["mistral"], marks=(("[ARGS]", None),)),
    "mistral_with_ids": replace(FORMATS["mistral"], marks=(("[CALL_ID]", None), ("[ARGS]", None))),
}
FUNCTIONS = [Function("weather", PARAMETERS), Function("time", None)]
ANSWER = {"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}
FIRST, SECOND = '{"name": "weather", "%s": {"city": "Paris", "days": 3}}', '{"name": "time", "%s": {}}'
WRONG = [
    ("weather", "rain"),
    ("city", "town"),
    (": 3", ': "3"'),
    (': "Paris"', ':"Paris"'),
    (', "days": 3', ', "x": 3'),
]
WRONG_XML = [
    ("weather", "rain"),
    ("city", "town"),
    ("3", "three"),
    ("</function>\n", ""),
    ("=days", "=x"),
]
WRONG_GLM = [
    ("weather", "rain"),
    ("city", "town"),
    ("3", "three"),
    ("</tool_call>", ""),
    ("<arg_value>3</arg_value>", ""),
    (">days", ">x"),
    ("3</", "3\n</"),
]

WRONG_PYTHON = [("weather", "rain"), ("city", "town"), ("=3", "='3'"), ("=3", "=x"), (", days=3", ", x=3")]


def wrong(form: ToolFormat, call: str) -> list[str]:
    """What a grammar does not let through, like the call that it does."""
    kinds = {GlmCall: WRONG_GLM, TaggedCall: WRONG_XML, PythonCall: WRONG_PYTHON}
    others = next((found for kind, found in kinds.items() if issubclass(form.form, kind)), WRONG)
    found = [call.replace(*pair) for pair in others]
    assert call not in found
    return found


def with_tokens(*names: str, special: bool = True) -> TextProcessor:
    """The tests' tokenizer with tokens more, which as special ones are no text."""
    tokenizer = copy.deepcopy(TEXT.tokenizer)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=special) for name in names])
    return TextProcessor(tokenizer)


def written(form: ToolFormat, *calls: str) -> str:
    """The calls as such a model writes them."""
    calls = tuple(call % form.parameters for call in calls)
    if issubclass(form.form, PythonCall):
        all_ = (form.between or ", ").join(in_python(json.loads(call)) for call in calls)
        return f"[{all_}]" if form.listed else f"{form.begin}{all_}{form.end}"
    if issubclass(form.form, DeepSeekCall):
        all_ = (form.between or "").join(in_deepseeks(form, json.loads(call)) for call in calls)
        return form.begin + all_ + form.end
    if issubclass(form.form, GlmCall):
        return form.form.line.join(in_glms(form.form.line, json.loads(call)) for call in calls)
    if form.marks:
        id_ = "[CALL_ID]abc123XYZ" if len(form.marks) == 2 else ""
        loaded = [json.loads(call) for call in calls]
        return "".join(f"[TOOL_CALLS]{c['name']}{id_}[ARGS]{json.dumps(c['arguments'])}" for c in loaded)
    if issubclass(form.form, XmlCall):
        return "\n".join(in_xml(form, json.loads(call)) for call in calls)
    match form.name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
        case "llama3_json":
            return "; ".join(calls)
        case _:
            return f"{form.begin.removesuffix('[')}[{', '.join(calls)}]{form.end}"


def in_xml(form: ToolFormat, call: dict[str, Any]) -> str:
    pad = "\n" if form.name == "qwen3_coder" else ""
    lines = [f"{form.begin}\n<function={call['name']}>"]
    lines += [
        f"<parameter={key}>{pad}{value}{pad}</parameter>" for key, value in call[form.parameters].items()
    ]
    return "\n".join([*lines, f"</function>\n{form.end}"])


def in_glms(line: str, call: dict[str, Any]) -> str:
    parts = [f"<tool_call>{call['name']}"]
    for key, value in call["arguments"].items():
        parts += f"<arg_key>{key}</arg_key>", f"<arg_value>{value}</arg_value>"
    return line.join([*parts, "</tool_call>"])


def in_python(call: dict[str, Any]) -> str:
    values = [f"{key}={json.dumps(value)}" for key, value in call["arguments"].items()]
    return f"{call['name']}({', '.join(values)})"


def in_deepseeks(form: ToolFormat, call: dict[str, Any]) -> str:
    (opens, _), (parts, _), (closes, _) = form.marks
    name, arguments = call["name"], json.dumps(call["arguments"])
    if form.name == "deepseek_v31":
        return f"{opens}{name}{parts}{arguments}{closes}"
    return f"{opens}function{parts}{name}\n```json\n{arguments}\n```{closes}"


@cache
def compiler(text: TextProcessor) -> GrammarCompiler:
    return GrammarCompiler(text.tokenizer, [EOS_ID])


@cache
def compiled(text: TextProcessor, spec: GrammarSpec) -> Grammar:
    """Once for all the answers that are held against it, as a server keeps it for its requests."""
    return compiler(text).compile(spec)


def follows(spec: GrammarSpec, answer: str, text: TextProcessor = TEXT, *, by_letters: bool = False) -> bool:
    """Whether this may be a whole answer, in the text's tokens or in those of `TEXT`, which it has too."""
    state = compiled(text, spec).start()
    tokens = (TEXT if by_letters else text).encode(answer, add_special_tokens=False)
    return all(map(state.advance, tokens)) and (state.ended or state.advance(EOS_ID))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_answer_that_must_call_is_nothing_else(form: ToolFormat) -> None:
    one = written(form, FIRST)
    for several in (False, True):
        spec = form.grammar(FUNCTIONS, text=False, schema=None, several=several)
        assert follows(spec, one)
        assert follows(spec, written(form, SECOND))
        # Llama's calls come one at a time.
        assert follows(spec, written(form, FIRST, SECOND)) == (several and form.name != "llama3_json")
        for other in ("", "No.", "No. " + one, one + " Done.", '{"q": 1}', one[:-1]):
            assert not follows(spec, other)
        assert not any(follows(spec, other) for other in wrong(form, one))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_answer_that_may_call_is_text_or_a_right_call(form: ToolFormat) -> None:
    one = written(form, FIRST)
    spec = form.grammar(FUNCTIONS, text=True, schema=None, several=True)
    for answer in (one, "No.\n\nAnd <tool", "2 > 1"):
        assert follows(spec, answer)
    assert follows(spec, written(form, FIRST, SECOND)) == (form.name != "llama3_json")
    for other in wrong(form, one):
        assert not follows(spec, other)
        # Behind text calls without anything around them are text, and read as text.
        assert follows(spec, "So: " + other) == bool(form.bare)
    assert follows(spec, "So: " + one)
    single = form.grammar(FUNCTIONS, text=True, schema=None, several=False)
    assert follows(single, "So: " + one)
    assert not follows(single, written(form, FIRST, SECOND))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_text_beside_calls_may_have_to_begin_with_something_else(form: ToolFormat) -> None:
    spec = form.grammar(FUNCTIONS, text=True, schema=None, several=True, unlike="<think>")
    assert all(follows(spec, answer) for answer in ("No.", "<thin", "So <think>", written(form, FIRST)))
    assert not any(follows(spec, answer) for answer in ("<think>", "<think>Hm.</think>No."))


@pytest.mark.parametrize("name", [name for name in FORMS if name != "llama3_json"])
def test_an_answer_is_a_call_or_follows_its_own_schema(name: str) -> None:
    form = FORMS[name]
    spec = form.grammar(FUNCTIONS, text=True, schema=ANSWER, several=True)
    for answer in (written(form, FIRST), written(form, FIRST, SECOND), '{"q": 1}'):
        assert follows(spec, answer)
    for answer in ("No.", '{"x": 1}', "So: " + written(form, FIRST)):
        assert not follows(spec, answer)


@pytest.mark.parametrize(
    ("name", "tokens", "special"),
    [
        ("hermes", ["<tool_call>"], True),
        ("hermes", ["<tool_call>", "</tool_call>"], True),
        ("hermes", ["<tool_call>", "</tool_call>"], False),  # as Qwen's
        ("qwen3_coder", ["<tool_call>", "</tool_call>"], False),
        ("seed_oss", ["<seed:tool_call>", "</seed:tool_call>"], True),
        ("glm45", ["<tool_call>", "</tool_call>", *GLM_MARKS], False),
        ("glm47", ["<tool_call>", "</tool_call>", *GLM_MARKS], True),
        ("glm47", [*GLM_MARKS[:2]], False),
        ("olmo3", ["<function_calls>", "</function_calls>"], False),
        ("deepseek_v3", ["<｜tool▁calls▁begin｜>", *DEEPSEEK_MARKS], False),
        ("deepseek_v31", ["<｜tool▁calls▁begin｜>", *DEEPSEEK_MARKS, "<｜tool▁calls▁end｜>"], True),
        ("mistral", ["[TOOL_CALLS]"], True),
        ("mistral", ["[TOOL_CALLS]"], False),
        ("mistral", ["[TOOL_CALLS]", "[ARGS]"], True),
        ("mistral", ["[TOOL_CALLS]", "[ARGS]"], False),
    ],
)
def test_what_opens_and_closes_calls_may_be_tokens_of_their_own(
    name: str, tokens: list[str], special: bool
) -> None:
    text = with_tokens(*tokens, special=special)
    form = format_of(text, name)
    one = written(form, FIRST)
    own = [token for token in tokens for _ in range(one.count(token))]
    letters = len(one.encode()) - sum(len(token.encode()) for token in own)
    assert len(text.encode(one)) == letters + len(own)
    assert text.detokenizer([], shown=form.shown).push(text.encode(one), final=True).text == one
    required, maybe, json_or = (
        form.grammar(FUNCTIONS, text=may, schema=schema, several=True)
        for may, schema in ((False, None), (True, None), (True, ANSWER))
    )
    for spec in (required, maybe, json_or):
        assert follows(spec, one, text)
        assert not follows(spec, one.replace("city", "town"), text)
    assert follows(maybe, "So: " + one, text)
    assert follows(maybe, "So.", text)
    # Letter by letter it opens a call as well, which is read as one.
    assert not follows(maybe, one.replace("city", "town"), text, by_letters=True)
    assert follows(json_or, '{"q": 1}', text)


@pytest.mark.parametrize("tokens", [["<think>", "</think>"], ["<think>", "</think>", "<tool_call>"]])
def test_tokens_that_are_text_may_be_in_the_text(tokens: list[str]) -> None:
    """Such as Qwen3's <think>, which llguidance takes for special."""
    text = with_tokens(*tokens, special=False)
    form = format_of(text, "hermes")
    one = written(form, FIRST)
    thought = "<think>\nA <tool, perhaps.\n</think>\n\n"
    assert len(text.encode(thought)) == len(thought) - 7 - 8 + 2
    spec = form.grammar(FUNCTIONS, text=True, schema=None, several=True)
    for answer in (thought, f"{thought}No.", thought + one, f"{thought}So: {one}", "No.", one, "So: " + one):
        assert follows(spec, answer, text), answer
        for by_letters in (False, True):
            if one in answer:
                wrong = answer.replace("city", "town")
                assert not follows(spec, wrong, text, by_letters=by_letters), wrong
    required = form.grammar(FUNCTIONS, text=False, schema=None, several=True)
    assert follows(required, one, text)
    assert not follows(required, thought + one, text)


def test_special_tokens_that_are_shown_are_text() -> None:
    text = with_tokens("[TOOL_CALLS]", "<|other|>")
    tokens = text.encode("a<|other|>[TOOL_CALLS] b")
    shown = frozenset(text.encode("[TOOL_CALLS]"))
    windowed = copy.deepcopy(text.tokenizer)  # what any other kind of vocabulary goes through
    windowed.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    for each in (text, TextProcessor(windowed)):
        assert each.detokenizer([], shown=shown).push(tokens, final=True).text == "a[TOOL_CALLS] b"
        assert each.detokenizer([]).push(tokens, final=True).text == "a b"


def test_tokens_of_their_own_are_those_that_llguidance_takes_for_such() -> None:
    names = ["<a>", "</a>", "<|a|>", "<a", "[a]", "<a b>"]
    special, plain = with_tokens(*names), with_tokens(*names, special=False)
    for text in (special, plain):
        tokenizer = from_tokenizer(text.tokenizer, eos_token=EOS_ID)
        for name in names:
            (first, *_) = text.encode(name)
            own = text.own_token_id(name)
            assert own == (first if tokenizer.is_special_token(first) else None)
    assert plain.own_token_id("<a>") is not None


def test_arguments_are_an_object_whatever_the_schema_says() -> None:
    form = FORMATS["hermes"]

    def takes(parameters: Any, arguments: str) -> bool:
        spec = form.grammar([Function("f", parameters)], text=False, schema=None, several=False)
        return follows(spec, f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>')

    for parameters in ({}, {"properties": {}}, {"type": "object"}, {"type": ["object", "null"]}):
        assert takes(parameters, '{"a": 1}')
        assert not takes(parameters, "1")
        assert not takes(parameters, "null")
    assert takes(None, "{}")
    assert not takes(None, '{"a": 1}')
    assert takes({"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}, "{}")


HERMES_LIKE = "{% if tools %}<tools>{{ tools }}</tools> <tool_call>{% endif %}"
LLAMA_LIKE = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools %}Environment: ipython\n"
    '{"name": function name, "parameters": dictionary of argument name and its value}{% endif %}'
)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (HERMES_LIKE, "hermes"),
        (LLAMA_LIKE, "llama3_json"),
        (LLAMA_LIKE + HERMES_LIKE, "hermes"),
        (LLAMA_LIKE + "<|python_tag|>", "llama3_json"),
        ("{% for tool in tools %}[AVAILABLE_TOOLS]{% endfor %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}respond only with <|tool_call|> followed by a JSON list{% endif %}", "granite"),
        ("{{ tools }}<tool_call>\n<function=f>\n<parameter=x>\nvalue\n</parameter>", "qwen3_coder"),
        ("{{ tools }}<tool_call>\n<function=f>{}", "hermes"),
        ("{{ tools }}<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>", "glm45"),
        ("{{ tools }}{{ '<tool_call>' + name + '\\n<arg_key>k</arg_key>\\n<arg_value>v' }}", "glm45"),
        ("{{ tools }}<tool_call>{name}<arg_key>{k}</arg_key><arg_value>{v}</arg_value>", "glm47"),
        ("{{ tools }}<tool_calls><tool_call:x>{name}<arg_key:x>{k}</arg_key:x>", "apriel"),
        ("{{ tools }}{% set toolcall_begin_token = '<seed:tool_call>' %}", "seed_oss"),
        ("{{ tools }} within <function_calls></function_calls> XML tags", "olmo3"),
        ("{{ tools }}[func_name1(params_name1=params_value1, ...), func_name2(params)]", "pythonic"),
        ("{{ tools }}[func_name1(param1=value1), ...]<|header_start|>", "llama4_pythonic"),
        ("{{ tools }}<｜tool▁calls▁begin｜>\n```json\n", "deepseek_v3"),
        ("{{ tools }}<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<｜tool▁calls▁begin｜>{{ messages }}", "hermes"),
        ("{{ tools }} within <tool_call> tags as follows: <tool_calls>[{...}]</tool_calls>", "apriel"),
        ("{{ tools }}<TOOLCALL>[{...}]</TOOLCALL>", "nemotron"),
        ('{{ tools }} formatted as functools[{"name": [function name], ...}, ...]', "phi4_mini_json"),
        ('{{ tools }} in a single JSON array: \n\n[{"name": "tool_call_name", ...}]', "xlam"),
        # These say nothing of tools, or nothing that is known.
        ("[TOOL_CALLS] {{ messages }}", "hermes"),
        ("{{ messages }} {# tools [TOOL_CALLS] #}", "hermes"),
        ("{{ tools }}", "hermes"),
        (None, "hermes"),
        ({"default": "{{ messages }}", "tool_use": "[TOOL_CALLS]{{ tools }}"}, "mistral"),
    ],
)
def test_the_template_shows_the_format(template: Any, name: str) -> None:
    tokenizer = copy.deepcopy(TEXT.tokenizer)
    tokenizer.chat_template = template
    assert format_of(TextProcessor(tokenizer)).name == name
    assert format_of(TextProcessor(tokenizer), "llama3_json").name == "llama3_json"


MISTRAL_LIKE = "{% for tool in tools %}[AVAILABLE_TOOLS]{% endfor %}[TOOL_CALLS]"


@pytest.mark.parametrize(
    ("template", "tokens", "marks"),
    [
        (MISTRAL_LIKE, [], []),
        (MISTRAL_LIKE, ["[ARGS]"], []),  # what the template shows the model has seen
        (MISTRAL_LIKE + "[ARGS]", [], ["[ARGS]"]),
        (MISTRAL_LIKE + "[ARGS]", ["[ARGS]", "[CALL_ID]"], ["[ARGS]"]),
        (MISTRAL_LIKE + "[CALL_ID][ARGS]", ["[ARGS]", "[CALL_ID]"], ["[CALL_ID]", "[ARGS]"]),
        (MISTRAL_LIKE + "[CALL_ID]", ["[ARGS]"], []),
        (None, [], []),
        (None, ["[ARGS]", "[CALL_ID]"], ["[ARGS]"]),
        ("{{ messages }}", ["[ARGS]"], ["[ARGS]"]),
    ],
)
def test_template_or_vocabulary_show_the_newer_of_mistrals_forms(
    template: Any, tokens: list[str], marks: list[str]
) -> None:
    text = with_tokens("[TOOL_CALLS]", *tokens)
    text.tokenizer.chat_template = template
    form = format_of(text, "mistral")
    assert form.marks == tuple((mark, text.own_token_id(mark)) for mark in marks)
    assert len(form.shown) == 1 + len(set(marks) & set(tokens))
    assert not format_of(text, "granite").marks


def test_an_id_is_one_that_templates_take() -> None:
    form = FORMS["mistral_with_ids"]
    spec = form.grammar(FUNCTIONS, text=False, schema=None, several=False)
    one = written(form, FIRST)
    assert follows(spec, one)
    for wrong in ("abc123XY", "abc123XYZ0", "abc-23XYZ", ""):
        assert not follows(spec, one.replace("abc123XYZ", wrong))


def test_a_call_in_mistrals_list_may_have_its_id() -> None:
    spec = FORMATS["mistral"].grammar(FUNCTIONS, text=False, schema=None, several=True)
    calls = [call % "arguments" for call in (FIRST, SECOND)]
    first, second = (
        call[:-1] + f', "id": "{id_}"}}' for call, id_ in zip(calls, ("abc123XYZ", "d" * 9), strict=True)
    )
    for answer in (f"[{first}]", f"[{first}, {second}]", f"[{calls[0]}, {second}]"):
        assert follows(spec, f"[TOOL_CALLS]{answer}")
    assert not follows(spec, f"[TOOL_CALLS][{first}]".replace("abc", "ab"))
    assert not follows(spec, f"[TOOL_CALLS][{first}]".replace('"id"', '"no"'))


def test_ids_are_those_that_templates_take() -> None:
    assert FORMATS["mistral"].new_id().isalnum()
    assert len(FORMATS["mistral"].new_id()) == 9
    assert FORMATS["hermes"].new_id().startswith("call_")
    assert FORMATS["hermes"].new_id() != FORMATS["hermes"].new_id()


def test_a_grammar_of_many_tools_is_compiled() -> None:
    functions = [Function(f"tool_{i}", PARAMETERS) for i in range(128)]
    spec = FORMATS["hermes"].grammar(functions, text=True, schema=None, several=True)
    call = json.dumps({"name": "tool_127", "arguments": {"city": "x"}})
    assert follows(spec, f"<tool_call>\n{call}\n</tool_call>")


def test_the_setting_takes_every_format() -> None:
    choices = get_args(Settings.model_fields["tool_call_parser"].annotation)
    assert sorted(choices) == sorted(["auto", "harmony", *FORMATS])
