"""Templates as real models have them: which marks they show, where their prompts leave a thought, and what
they are told of earlier ones; and grammars behind free thoughts."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal, get_args

import pytest

from engine.errors import RequestError
from engine.grammar import GrammarCompiler, GrammarSpec
from engine.reasoning import THOUGHT_FORMATS, thought_format_of
from engine.text import TextProcessor
from engine.thought import Thought
from server.tool_formats import FORMATS, format_of
from tests.chat_templates import DEEPSEEK_R1, GPT_OSS, MAGISTRAL, MINISTRAL, PLAIN, QWEN3
from tests.server.conftest import EOS_ID, TEXT
from tests.server.test_tool_formats import FIRST, FUNCTIONS, follows, with_tokens, written

USER = {"role": "user", "content": "Is <think> a word?"}


def of(template: Any) -> TextProcessor:
    tokenizer = copy.deepcopy(TEXT.tokenizer)
    tokenizer.chat_template = template
    return TextProcessor(tokenizer)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN3, "think"),
        (DEEPSEEK_R1, "think"),
        (MAGISTRAL, "mistral"),
        ("{{ messages }}{% set think_begin_token = '<seed:think>' %}", "seed_oss"),
        (PLAIN, None),
        ("{{ messages }}</think>", "think"),
        ({"default": PLAIN, "tool_use": QWEN3}, "think"),
        (None, None),
    ],
)
def test_the_template_shows_the_marks(template: Any, name: str | None) -> None:
    found = thought_format_of(of(template))
    assert (found and found.name) == name
    assert thought_format_of(of(template), "none") is None
    named = thought_format_of(of(template), "mistral")
    assert named is not None
    assert (named.begin, named.end) == ("[THINK]", "[/THINK]")


def test_or_else_the_vocabulary_has_them() -> None:
    for special in (False, True):
        for names, name in ((["[THINK]", "[/THINK]"], "mistral"), (["<think>", "</think>"], "think")):
            text = with_tokens(*names, special=special)
            found = thought_format_of(text)
            assert found is not None
            assert found.name == name
            own = special or name == "think"  # which a grammar takes for no text
            ids = [text.encode(mark)[0] for mark in names]
            assert [found.begin_id, found.end_id] == (ids if own else [None, None])
            assert found.shown == (set(ids) if own else set())
    assert thought_format_of(with_tokens("<think>")) is None
    both = with_tokens("[THINK]", "[/THINK]")
    both.tokenizer.chat_template = QWEN3
    shown = thought_format_of(both)
    assert shown is not None
    assert shown.name == "think"


@pytest.mark.parametrize(
    ("template", "options", "place"),
    [
        (QWEN3, {}, "before"),
        (QWEN3, {"template_kwargs": {"enable_thinking": True}}, "before"),
        (QWEN3, {"template_kwargs": {"enable_thinking": False}}, "behind"),
        (DEEPSEEK_R1, {}, "within"),
        (DEEPSEEK_R1, {"add_generation_prompt": False}, "before"),
        (MAGISTRAL, {}, "before"),
    ],
)
@pytest.mark.parametrize("tokens", [(), ("<think>", "</think>", "[THINK]", "[/THINK]")])
@pytest.mark.parametrize("special", [False, True])
def test_the_prompts_end_says_where_the_answer_begins(
    template: str, options: dict[str, Any], place: str, tokens: tuple[str, ...], special: bool
) -> None:
    text = with_tokens(*tokens, special=special)
    text.tokenizer.chat_template = template
    form = thought_format_of(text)
    assert form is not None
    prompt = text.encode_chat([USER], **options)
    assert form.thought(text, prompt) == Thought(form.begin, form.end, place)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("begun", "place"),
    [
        ("Well, ", "behind"),
        ("<think>\nOkay, so", "within"),
        (" <think>", "within"),
        ("<think>\nOkay.</think>\n\nWell, ", "behind"),
        ("So <think>", "behind"),
    ],
)
def test_an_answer_that_has_begun_is_behind_its_thought_unless_it_is_in_it(begun: str, place: str) -> None:
    text = of(PLAIN)
    form = THOUGHT_FORMATS["think"]
    messages = [USER, {"role": "assistant", "content": begun}]
    prompt = text.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert form.thought(text, prompt, begun).place == place


def test_an_answer_that_goes_on_with_nothing_begins_where_its_prompt_ends() -> None:
    text = of(DEEPSEEK_R1)
    form = THOUGHT_FORMATS["think"]
    assert form.thought(text, text.encode_chat([USER]), " ").place == "within"


def test_thoughts_go_to_the_template_under_the_name_that_it_reads() -> None:
    thought = {"role": "assistant", "content": "A.", "reasoning_content": "Hm."}
    assert "<think>\nHm.\n</think>\n\nA.<|im_end|>" in of(QWEN3).render_chat([USER, thought])
    assert of(GPT_OSS).render_chat([thought]).endswith("Hm.|A.")
    assert of("{{ messages[0]['reasoning'] }}").render_chat([thought]) == "Hm."
    either = "{{ messages[0].reasoning or messages[0].get('reasoning_content') }}"
    assert of(either).render_chat([thought]) == "Hm."
    assert json.loads(of("{{ messages[0] | tojson }}").render_chat([thought]))["reasoning_content"] == "Hm."
    assert of(DEEPSEEK_R1).render_chat([thought]) == of(DEEPSEEK_R1).render_chat(
        [{"role": "assistant", "content": "A."}]
    )


def test_thoughts_are_blocks_where_the_template_reads_such() -> None:
    text = of(MINISTRAL)
    thought = {"role": "assistant", "content": "A.", "reasoning_content": "Hm."}
    assert text.render_chat([USER, thought]).endswith("[/INST][THINK]Hm.[/THINK]A.</s>")
    assert text.render_chat([USER, {**thought, "content": ""}]).endswith("[THINK]Hm.[/THINK]</s>")
    assert text.render_chat([{"role": "assistant", "content": "A."}]) == "A.</s>"
    left_open = {"add_generation_prompt": False, "continue_final_message": True}
    assert text.render_chat([USER, thought], **left_open).endswith("[THINK]Hm.[/THINK]A.")
    # One that reads names too has them.
    both = MINISTRAL + "{{ messages[0].reasoning_content }}"
    assert of(both).render_chat([thought]) == "A.</s>Hm."


def test_a_template_that_knows_no_tools_gets_thoughts_beside_calls() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    message = {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]}
    prompt = of(QWEN3).render_chat([USER, message])
    assert '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "f"' in prompt


Place = Literal["within", "before", "behind"]
TOOLS = FORMATS["hermes"]
ANSWERS: list[tuple[GrammarSpec, str, str]] = [
    (GrammarSpec("json_schema", '{"type": "object"}'), '{"a": 3}', "[3]"),
    (GrammarSpec("regex", "[ab]+/"), "abba/", "abba"),
    (GrammarSpec("choice", '["yes", "no"]'), "yes", "maybe"),
    (GrammarSpec("grammar", 'root ::= "a" | "b" root'), "bba", "bb"),
    (GrammarSpec("grammar", 'start: "é" WORD\nWORD: /[a-z]{3,5}/'), "éabc", "é"),
]
THINK = [
    with_tokens(),
    with_tokens("<think>", "</think>", "<tool_call>", special=False),  # as Qwen3's
    with_tokens("<think>", "</think>"),
]
THOUGHT = 'A <tool_call>, perhaps:\n{"x" or </thin'


def led(text: TextProcessor, spec: GrammarSpec, place: Any) -> GrammarSpec:
    form = thought_format_of(text, "think")
    assert form is not None
    return spec._replace(lead=form.lead(Thought(form.begin, form.end, place)))


@pytest.mark.parametrize(("spec", "right", "wrong"), ANSWERS)
@pytest.mark.parametrize("text", THINK, ids=["text", "tokens", "special"])
def test_a_grammar_begins_behind_the_thought(
    text: TextProcessor, spec: GrammarSpec, right: str, wrong: str
) -> None:
    assert led(text, spec, "behind") == spec
    for place, opening in (("within", ""), ("before", "<think>")):
        grammar = led(text, spec, place)
        for by_letters in (False, True):
            for thought in (f"\n{THOUGHT}\n", "", "\n\n"):
                for space in ("", "\n\n"):
                    answer = f"{opening}{thought}</think>{space}"
                    assert follows(grammar, answer + right, text, by_letters=by_letters), answer
                    assert not follows(grammar, answer + wrong, text, by_letters=by_letters), answer
                # Nor does a model go on with white space instead of its answer.
                late = f"{opening}{thought}</think>{' ' * 5}{right}"
                assert not follows(grammar, late, text, by_letters=by_letters)
            assert not follows(grammar, opening + THOUGHT, text, by_letters=by_letters)
        assert follows(grammar, right, text) == (place == "before")
        assert not follows(grammar, wrong, text)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", THINK, ids=["text", "tokens", "special"])
def test_calls_come_behind_the_thought(text: TextProcessor, name: str) -> None:
    form = format_of(text, name)
    one = written(form, FIRST)
    for place, opening in (("within", ""), ("before", "<think>")):
        grammars = [
            form.grammar(FUNCTIONS, text=may, schema=None, several=True, unlike=opening)
            for may in (False, True)
        ]
        required, maybe = (led(text, grammar, place) for grammar in grammars)
        mentions = THOUGHT if text is not THINK[2] else "A [tool], perhaps:\n{"
        thought = f"{opening}\n{mentions}\n</think>\n\n"
        for by_letters in (False, True):
            tokens = {"text": text, "by_letters": by_letters}
            assert follows(maybe, f"{thought}No.", **tokens)
            assert not follows(required, f"{thought}No.", **tokens)
            if not by_letters or form.begin_id is None:  # as which alone it may open
                assert follows(required, thought + one, **tokens)
            for spec in (required, maybe):
                assert not follows(spec, thought + one.replace("city", "town"), **tokens)
                assert not follows(spec, opening + mentions, **tokens)
        assert follows(maybe, thought + one, text)
        for spec, answer in ((required, one), (maybe, one), (maybe, "No."), (maybe, " \nNo <thinking>.")):
            # Within a thought these are parts of one that does not end.
            fits = place == "before" and not (form.bare and answer.startswith(" "))
            assert follows(spec, answer, text) == fits, answer
        assert not follows(maybe, f" \n{opening}No.", text)
        is_text = text is THINK[0] or (text is THINK[1] and not form.bare)
        assert follows(maybe, f"No {opening}.", text) == (place == "before" and is_text)


def test_a_schema_that_is_refused_is_refused_behind_a_thought() -> None:
    form = THOUGHT_FORMATS["think"]
    lead = form.lead(Thought(form.begin, form.end, "within"))
    for spec in (
        GrammarSpec("json_schema", '{"type": "nothing"}', lead),
        GrammarSpec("json_schema", "{", lead),
        GrammarSpec("regex", "(", lead),
        GrammarSpec("grammar", '{"grammars": []}', lead),
        GrammarSpec("choice", "[]", lead),
        # Which nothing can follow, and which names what it is called behind the lead.
        GrammarSpec("json_schema", '{"$ref": "#"}', lead),
        GrammarSpec("grammar", "start: start", lead),
        GrammarSpec("grammar", 'start: "a" @answer?', lead),
    ):
        for each in (spec, spec._replace(lead="")):
            with pytest.raises(RequestError, match=r"not a valid|no answer of") as found:
                GrammarCompiler(TEXT.tokenizer, [EOS_ID]).compile(each, param="x")
            assert found.value.param == "x"


def test_bad_words_that_leave_an_answer_nothing_are_found_before_its_thought() -> None:
    form = THOUGHT_FORMATS["think"]
    compiler = GrammarCompiler(TEXT.tokenizer, [EOS_ID])
    a, b = (TEXT.encode(letter)[0] for letter in "ab")
    for place in get_args(Place):
        lead = form.lead(Thought(form.begin, form.end, place))
        grammar = compiler.compile(GrammarSpec("choice", '["a", "b"]', lead))
        assert grammar.may_begin(without=[a])
        assert not grammar.may_begin(without=[a, b])
