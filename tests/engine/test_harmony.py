"""Harmony: what of an answer is thought, whatever the cuts; where prompts leave it; grammars of messages."""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from engine.errors import RequestError
from engine.grammar import GrammarSpec
from engine.harmony import HarmonyReader, HarmonyThought, Marks
from engine.harmony_format import HarmonyFormat, ends_of
from engine.reasoning import thought_format_of
from engine.text import TextProcessor
from server.tool_formats import format_of
from tests.chat_templates import HARMONY, PLAIN
from tests.server.test_tool_formats import follows, with_tokens

USER = {"role": "user", "content": "Hi"}
THOUGHT = "<|channel|>analysis<|message|>Hm. 2 < 3, <|x.<|end|>"
NEXT = "<|start|>assistant"
FINAL = "<|channel|>final<|message|>"
WEATHER = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
FIRST_TO = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
READ = '<|channel|>commentary to=weather<|message|>{"city": "Paris"}<|call|>'

TEXTS: list[tuple[str, str, str]] = [
    # As the model writes it.
    (f"{THOUGHT}{NEXT}{FINAL}Yes.\n", "Hm. 2 < 3, <|x.", "Yes.\n"),
    (f"{FINAL}Yes.", "", "Yes."),
    (f"{THOUGHT}{NEXT}{WEATHER}", "Hm. 2 < 3, <|x.", READ),
    (f"{THOUGHT}{NEXT}{FIRST_TO}", "Hm. 2 < 3, <|x.", READ),
    (FIRST_TO, "", READ),
    (f"<|channel|>commentary<|message|>I look.<|end|>{NEXT}{WEATHER}", "", f"I look.{READ}"),
    (f"{FINAL}A<|end|>{NEXT}{FINAL}B", "", "A\nB"),
    (f"{THOUGHT}{NEXT}<|channel|>analysis<|message|>No.<|end|>", "Hm. 2 < 3, <|x.\nNo.", ""),
    (f"{WEATHER}{NEXT}{FIRST_TO}{NEXT}{FINAL}So.", "", f"{READ}{READ}So."),
    (f"{FINAL[:-11]} <|constrain|>JSON<|message|>{{}}", "", "{}"),
    (
        "<|channel|>analysis to=functions.weather code<|message|>{}<|call|>",
        "",
        READ.replace('"city": "Paris"', ""),
    ),
    # Tools of OpenAI's own, in a thought and outside of one.
    ("<|channel|>analysis to=python code<|message|>x = 1<|call|>", "x = 1", ""),
    (
        "<|channel|>commentary to=python code<|message|>x<|call|>",
        "",
        "<|channel|>commentary to=python<|message|>x<|call|>",
    ),
    # Cut.
    ("<|channel|>analysis<|message|>Hm, ", "Hm, ", ""),
    (f"{FINAL}Yes <|mess", "", "Yes <|mess"),
    ("<|channel|>comm", "", ""),
    ("<|channel|>commentary to=functions.wea", "", ""),
    (" to=functions.weather", "", ""),
    (f"{THOUGHT}{NEXT}", "Hm. 2 < 3, <|x.", ""),
    (f"{THOUGHT}<|start|>assi", "Hm. 2 < 3, <|x.", ""),
    ("", "", ""),
    # Empty.
    (f"<|channel|>analysis<|message|><|end|>{NEXT}{FINAL}", "", ""),
    (f"{FINAL}<|return|>", "", ""),
    # No header, or none that is whole; nothing of a mark is told.
    ("Hello there", "", "Hello there"),
    (" to me", "", " to me"),
    ("tomorrow", "", "tomorrow"),
    ("to", "", "to"),
    (" t", "", " t"),
    ("\n<b>", "", "\n<b>"),
    ("<|channel|>finalHello there", "", "Hello there"),
    ("<|channel|>finalHello<|end|>", "", "Hello"),
    ("<|channel|>finalHello", "", "Hello"),
    ("<|channel|>analysisHello", "Hello", ""),
    ("<|channel|>commentaryto", "", ""),
    ("<|channel|>commentaryto=functions.weather", "", ""),
    ("<|channel|>final a b<|message|>c", "", " a bc"),
    ("<|constrain|>json<|message|>{}", "", "{}"),
    (f"{FINAL}A<|channel|>analysis<|message|>B", "B", "A"),
    (f"{FINAL}A<|end|><|channel|>analysis<|message|>B", "B", "A"),
    ("<|channel|>analysisHello there", "Hello there", ""),
    ("<|channel|>final<|end|>Hello", "", "Hello"),
    (f"{THOUGHT}Hello", "Hm. 2 < 3, <|x.", "Hello"),
    (f"{THOUGHT} \n<|message|>Hello", "Hm. 2 < 3, <|x.", "Hello"),
    (f"{THOUGHT}{FINAL}Hello", "Hm. 2 < 3, <|x.", "Hello"),
    (f"<|channel|>analysis<|message|>Hm.{FINAL}Hello", "Hm.", "Hello"),
    (f"<|channel|>analysis<|message|>Hm.{NEXT}{FINAL}Hello<|message|>!", "Hm.", "Hello!"),
    ("<|start|>user<|message|>And?<|end|>", "", "And?"),
    (f"<|channel|>final {'x ' * 400}<|message|>", "", f" {'x ' * 400}"),
    (f"<|channel|>{'a' * 600}<|message|>", "", "a" * (600 - 512 + len("assistant<|channel|>"))),
    (f"<|channel|>final{' ' * 600}<|message|>x", "", f"{' ' * 600}x"),
    (f"<|start|>{'a' * 600}<|message|>x", "", f"{'a' * 600}x"),
]


def fed(
    text: str, places: list[int], begun: str | None = "assistant", *, calls: bool = True
) -> tuple[str, str]:
    """Thought and answer where the text comes in pieces."""
    reader = HarmonyReader(begun, calls=calls)
    thought = answer = ""
    ends = [*sorted(place for place in places if place <= len(text)), len(text)]
    for start, end in zip([0, *ends], ends, strict=False):
        more_thought, more = reader.feed(text[start:end])
        assert 0 <= reader.held <= end
        thought, answer = thought + more_thought, answer + more
    more_thought, more = reader.feed("", final=True)
    assert reader.held == 0
    return thought + more_thought, answer + more


@pytest.mark.parametrize(("text", "thought", "answer"), TEXTS)
def test_messages_are_read_however_they_are_cut(text: str, thought: str, answer: str) -> None:
    for size in (1, 2, 5, 1000):
        assert fed(text, list(range(0, len(text), size))) == (thought, answer)
    assert HarmonyReader("assistant", calls=True).feed(text, final=True) == (thought, answer)


def test_where_no_calls_are_read_their_text_is_content() -> None:
    preamble = "<|channel|>commentary<|message|>I look.<|end|>"
    for call in (WEATHER, FIRST_TO):
        assert fed(f"{preamble}{NEXT}{call}", [], calls=False) == ("", 'I look.\n{"city": "Paris"}')


PIECES = st.sampled_from(
    [
        *Marks.ALL,
        "<",
        "<|",
        "<|chan",
        "assistant",
        "analysis",
        "final",
        "commentary",
        " to=functions.f",
        " ",
        "\n",
        "a",
    ]
)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(PIECES, max_size=14).map("".join),
    st.sampled_from([None, "assistant", f"assistant{FINAL}", "assistant<|channel|>analysis<|message|>"]),
    st.lists(st.integers(0, 99), max_size=20),
    st.booleans(),
)
def test_pieces_are_the_text_as_a_whole(text: str, begun: str | None, places: list[int], calls: bool) -> None:
    whole = HarmonyReader(begun, calls=calls).feed(text, final=True)
    assert fed(text, places, begun, calls=calls) == whole
    thought, answer = whole
    told = answer.replace("<|channel|>commentary to=f<|message|>", "").replace("<|call|>", "") + thought
    assert not any(mark in told for mark in Marks.ALL) or text.count("<|") > sum(map(text.count, Marks.ALL))


def test_what_is_certain_is_told_at_once() -> None:
    reader = HarmonyReader("assistant", calls=False)
    for said in ("<|channel|>", "analysis", "<|message|>"):
        assert reader.feed(said) == ("", "")
    assert reader.held == 0
    assert reader.feed("Hm < ") == ("Hm < ", "")
    assert reader.feed("x <|en") == ("x ", "")
    assert reader.held == len("<|en")
    assert reader.feed("d|>") == ("", "")
    assert reader.feed(f"{NEXT}{FINAL}Yes") == ("", "Yes")
    assert HarmonyReader("assistant", calls=False).feed("Yes") == ("", "Yes")


@pytest.mark.parametrize(
    "said",
    [
        f"{FINAL}x\n<",
        "<|channel|>analysis<|message|>" + "a " * 9,
        "<|end|>\n",
        NEXT,
        "<|channel|>aa",
        "<|channel|>  ",
    ],
)
def test_long_answers_take_time_in_proportion(said: str) -> None:
    text = said + said[-2:] * 100_000
    for size in (7, len(text)):
        started = time.perf_counter()
        reader = HarmonyReader("assistant", calls=True)
        for start in range(0, len(text), size):
            reader.feed(text[start : start + size])
        assert time.perf_counter() - started < 2.0


def test_many_messages_take_time_in_proportion() -> None:
    started = time.process_time()
    HarmonyReader("assistant", calls=True).feed(WEATHER * 20_000, final=True)
    assert time.process_time() - started < 1.5


@functools.cache
def harmony() -> TextProcessor:
    """The tests' tokenizer with the marks as special tokens, and a template of them."""
    tokenizer = copy.deepcopy(with_tokens(*Marks.ALL).tokenizer)
    tokenizer.chat_template = HARMONY
    return TextProcessor(tokenizer)


def form() -> HarmonyFormat:
    found = thought_format_of(harmony())
    assert isinstance(found, HarmonyFormat)
    return found


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("aligned", [False, True])
def test_tokens_of_thoughts_are_counted_and_stop_strings_end_the_answer_only(
    size: int, aligned: bool
) -> None:
    """By turns, where a thought comes behind some of the answer; a header counts as what it opens."""
    text = harmony()
    preamble = "<|channel|>commentary<|message|>Stay.<|end|>"
    parts = [f"{THOUGHT}{NEXT}", f"{preamble}{NEXT}", f"{THOUGHT}{NEXT}", f"{FINAL}So. 2 <|x. Stop"]
    tokens = text.encode("".join(parts))
    detokenizer = text.detokenizer(
        [], stop=("2 <|x. S", "Hm"), aligned=aligned, shown=form().shown, thought=HarmonyThought("assistant")
    )
    turns: list[tuple[str, str]] = []
    starts, answers, stop = [], [], None
    for start in range(0, len(tokens), size):
        delta = detokenizer.push(tokens[start : start + size], final=start + size >= len(tokens))
        assert "".join(thought for thought, _ in delta.turns) in ("", delta.thought)
        turns += delta.turns or ((delta.thought, delta.text),)
        starts += delta.starts
        answers += delta.answers
        stop = delta.stop or stop
    joined: list[list[str]] = [["", ""]]
    for thought, said in turns:
        if thought and joined[-1][1]:
            joined.append(["", ""])
        joined[-1][0] += thought
        joined[-1][1] += said
    told = "Hm. 2 < 3, <|x."
    assert joined == [[told, "Stay."], [f"\n{told}", "\nSo. "]]
    assert stop == "2 <|x. S"
    assert detokenizer.thought_tokens == 2 * len(text.encode(THOUGHT)) + len(text.encode(NEXT))
    if aligned:
        raw = "".join(parts)
        places = [len(text.decode(tokens[:n], skip_special_tokens=False)) for n in range(len(tokens))]
        assert starts == [place for place in places if place < raw.rindex("2 <|x. S")]
        is_text = [place for place, answer in zip(starts, answers, strict=True) if answer]
        first, second = raw.index("Stay."), raw.index("So. ")
        assert is_text == [*range(first, first + 5), *range(second, second + 4)]


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("<|channel|>analysis<|message|>Hm", None),
        (f"{FINAL}Hm", 0),
        ("Hm", 0),
        ("<|channel|>ana", 0),
        ("", 0),
    ],
)
def test_a_thought_that_is_cut_is_counted_and_one_that_never_opens_is_not(
    said: str, count: int | None
) -> None:
    tokens = harmony().encode(said)
    detokenizer = harmony().detokenizer([], shown=form().shown, thought=HarmonyThought("assistant"))
    detokenizer.push(tokens, final=True)
    assert detokenizer.thought_tokens == (len(tokens) if count is None else count)


def test_the_template_shows_the_format() -> None:
    text = harmony()
    assert (form().name, format_of(text).name) == ("harmony", "harmony")
    assert form().shown == {text.encode(mark)[0] for mark in Marks.ALL}
    assert thought_format_of(text, "none") is None
    assert format_of(text, "hermes").name == "hermes"
    named = with_tokens(*Marks.ALL)
    named.tokenizer.chat_template = PLAIN
    assert (thought_format_of(named), format_of(named).name) == (None, "hermes")
    named.tokenizer.chat_template = f"{PLAIN}<|start|>assistant<|message|>"
    assert (thought_format_of(named), format_of(named).name) == (None, "hermes")
    found = thought_format_of(named, "harmony")
    assert (found, format_of(named, "harmony").name) == (form(), "harmony")


@pytest.mark.parametrize(
    ("template", "options", "begun", "place"),
    [
        (HARMONY, {}, "assistant", "before"),
        (HARMONY, {"add_generation_prompt": False}, None, "before"),
        (HARMONY + "<|channel|>analysis<|message|>", {}, "assistant<|channel|>analysis<|message|>", "within"),
        (HARMONY + FINAL, {}, f"assistant{FINAL}", "behind"),
        (PLAIN, {}, "assistant", "before"),
    ],
)
def test_the_prompts_end_says_where_the_answer_begins(
    template: str, options: dict[str, Any], begun: str | None, place: str
) -> None:
    text = with_tokens(*Marks.ALL)
    text.tokenizer.chat_template = template
    for each in (HarmonyFormat.of(text), HarmonyFormat()):  # the second knows no tokens
        found = each.thought(text, text.encode_chat([USER], **options))
        assert (found, found.place) == (HarmonyThought(begun), place)


def test_an_answer_that_goes_on_is_behind_its_thought() -> None:
    text, begun = harmony(), "Well, " * 40
    messages = [USER, {"role": "assistant", "content": begun, "reasoning_content": "Hm."}]
    prompt = text.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.decode(prompt, skip_special_tokens=False).endswith(f"Hm.<|end|>{NEXT}{FINAL}{begun}")
    thought = form().thought(text, prompt, begun)
    assert thought.place == "behind"
    assert thought.reader().feed("all.") == ("", "all.")
    assert thought.reader().feed(f"all.<|end|>{NEXT}{FINAL}And", final=True) == ("", "all.\nAnd")
    assert form().behind_thought(begun) == begun
    # What the prompt ends with is nothing of the answer.
    for said in ("a <", "a <|end", "a"):
        assert HarmonyThought(f"assistant{FINAL}{said}").reader().feed("|b") == ("", "|b")


JSON = GrammarSpec(
    "json_schema", '{"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}'
)
RIGHT, WRONG = '{"q": 1}', '{"q": "1"}'
ANALYSIS = "<|channel|>analysis<|message|>"


def led(begun: str | None, *, thinks: bool = True) -> GrammarSpec:
    return JSON._replace(lead=form().lead(HarmonyThought(begun), thinks=thinks, calls=False))


@pytest.mark.parametrize(
    ("begun", "opening"),
    [
        ("assistant", ""),
        (None, NEXT),
        (f"assistant{ANALYSIS}Hm", f", so.<|end|>{NEXT}"),
    ],
)
def test_a_grammar_begins_in_the_last_message_and_thoughts_are_free(begun: str | None, opening: str) -> None:
    text, spec = harmony(), led(begun)
    for thoughts in ("", f'{ANALYSIS}{{"q": <|x\n<|end|>{NEXT}', f"{ANALYSIS}<|end|>{NEXT}" * 2):
        for header in (FINAL, "<|channel|>final <|constrain|>json<|message|>"):
            assert follows(spec, f"{opening}{thoughts}{header}{RIGHT}", text)
            assert not follows(spec, f"{opening}{thoughts}{header}{WRONG}", text)
        for other in (f"<|channel|>commentary<|message|>{RIGHT}", RIGHT, ""):
            assert not follows(spec, f"{opening}{thoughts}{other}", text)
        # No mark is spelled with letters, as which it would be read.
        spelled = text.encode(f"{opening}{ANALYSIS}") + [text.encode(letter)[0] for letter in "<|end|>"]
        assert not _takes(spec, spelled)
    without = led(begun, thinks=False)
    assert follows(without, f"{opening}{FINAL}{RIGHT}", text)
    assert not follows(without, f"{opening}{THOUGHT}{NEXT}{FINAL}{RIGHT}", text)


def _takes(spec: GrammarSpec, tokens: list[int]) -> bool:
    from tests.server.test_tool_formats import compiled

    return all(map(compiled(harmony(), spec).start().advance, tokens))


def test_a_grammar_that_begins_within_the_last_message_has_nothing_before_it() -> None:
    assert led(f"assistant{FINAL}").lead == ""
    with pytest.raises(RequestError, match="own") as found:
        form().lead(HarmonyThought(f"assistant{FINAL}"), thinks=True, calls=True)
    assert found.value.param == "continue_final_message"
    with pytest.raises(RequestError, match="middle of a header"):
        led("assistant<|channel|>")
    with pytest.raises(RequestError, match="no token"):
        HarmonyFormat().lead(HarmonyThought("assistant"), thinks=True, calls=False)


def test_a_call_ends_an_answer_and_a_messages_end_does_not() -> None:
    text = harmony()
    call, last, end = (text.encode(mark)[0] for mark in (Marks.CALL, Marks.RETURN, Marks.END))
    assert ends_of(text, [last]) == (last, call)
    assert ends_of(text, [7, end]) == (7, last, call)
    assert ends_of(text, [call, 7, last]) == (call, 7, last)
    other = with_tokens(*Marks.ALL)
    assert ends_of(other, [7, end]) == (7, end)
