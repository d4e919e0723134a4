"""What of a text is thought: whatever the cuts, in proportion to its length, and by the token."""

from __future__ import annotations

import functools
import time
from typing import Literal

import pytest
from hypothesis import example, given, settings, strategies as st

from engine.model.embedded import ensure_converted
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor
from engine.thought import Thought, ThoughtReader

BEGIN, END = "<think>", "</think>"
TEXTS: list[tuple[str, bool, str, str]] = [
    # Opened by the model, and by its prompt.
    ("<think>\nHm. 2 > 1.\n</think>\n\nYes.\n", False, "Hm. 2 > 1.", "Yes.\n"),
    ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
    (" \n<think>a</think>b", False, "a", "b"),
    ("\n<think>\na</think>b", True, "a", "b"),
    # Nothing in it.
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("</think>Yes.", True, "", "Yes."),
    ("<think></think>", False, "", ""),
    ("", True, "", ""),
    # Cut.
    ("<think>\n Hm, a b \n", False, "Hm, a b", ""),
    ("Hm </thin", True, "Hm </thin", ""),
    ("<thin", True, "<thin", ""),
    ("<think>a</think> \n ", False, "a", ""),
    # None, and every character of it.
    ("  Yes </think> <think>no</think>\n", False, "", "  Yes </think> <think>no</think>\n"),
    ("<thin", False, "", "<thin"),
    (" \n ", False, "", " \n "),
    ("", False, "", ""),
    # The first end, and one beginning.
    ("<think>a<think>b</think>c</think>d", False, "a<think>b", "c</think>d"),
    ("<think>a</think><think>b</think>", False, "a", "<think>b</think>"),
    ("<think>a <</think>b", False, "a <", "b"),
]


def fed(text: str, within: bool, places: list[int]) -> tuple[str, str]:
    """Thought and answer where the text comes in pieces, and what must hold meanwhile."""
    reader = ThoughtReader(BEGIN, END, within)
    thought = answer = ""
    ends = [*sorted(place for place in places if place <= len(text)), len(text)]
    for start, end in zip([0, *ends], ends, strict=False):
        was_over = reader.over
        more_thought, more = reader.feed(text[start:end], final=False)
        assert not (more_thought and was_over)
        assert not (was_over and reader.held)
        thought, answer = thought + more_thought, answer + more
    more_thought, more = reader.feed("", final=True)
    assert reader.held == 0
    return thought + more_thought, answer + more


@pytest.mark.parametrize(("text", "within", "thought", "answer"), TEXTS)
def test_what_is_thought_is_so_however_it_is_cut(text: str, within: bool, thought: str, answer: str) -> None:
    for size in (1, 2, 5, 1000):
        assert fed(text, within, list(range(0, len(text), size))) == (thought, answer)


PIECES = st.sampled_from([BEGIN, END, "<", "<think", "</think", ">", " ", "\n", "a", "bc", "\u2003"])


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=14).map("".join), st.booleans(), st.lists(st.integers(0, 60), max_size=20))
@example("<think>a \n</think> \n b", False, [9, 10, 12, 20, 21])
def test_pieces_are_the_text_as_a_whole(text: str, within: bool, places: list[int]) -> None:
    opened = text.lstrip().startswith(BEGIN)
    expected = "", text
    if opened or within:
        thought, _, answer = (text.lstrip().removeprefix(BEGIN) if opened else text).partition(END)
        expected = thought.strip(), answer.lstrip()
    assert fed(text, within, places) == expected


def test_it_is_told_as_soon_as_it_is_certain() -> None:
    reader = ThoughtReader(BEGIN, END, within=False)
    assert reader.feed("<think>") == ("", "")
    assert (reader.within, reader.closed, reader.held) == (True, False, 0)
    assert reader.feed("\na b ") == ("a b", "")
    assert reader.feed("c</thin") == (" c", "")
    assert reader.held == len("</thin")
    assert reader.feed("k>") == ("", "")
    assert (reader.within, reader.closed, reader.over) == (False, True, False)
    assert reader.feed("\n\nYes ") == ("", "Yes ")
    assert reader.over
    assert ThoughtReader(BEGIN, END, within=False).feed("Y") == ("", "Y")


def test_white_space_that_may_yet_be_told_is_held() -> None:
    reader = ThoughtReader(BEGIN, END, within=False)
    assert reader.feed(" \n<thi") == ("", "")
    assert reader.held == len(" \n<thi")
    assert reader.feed("s") == ("", " \n<this")
    assert reader.held == 0
    reader = ThoughtReader(BEGIN, END, within=True)
    assert reader.feed("a \n") == ("a", "")
    assert reader.held == len(" \n")
    assert reader.feed("b </think>") == (" \nb", "")
    assert reader.held == 0


@pytest.mark.parametrize("text", ["<", "a", "x\n", "\n", "x</think>"])
def test_long_thoughts_take_time_in_proportion(text: str) -> None:
    text *= 100_000
    for size in (7, len(text)):
        started = time.perf_counter()
        reader = ThoughtReader(BEGIN, END, within=True)
        for start in range(0, len(text), size):
            reader.feed(text[start : start + size])
        assert time.perf_counter() - started < 2.0


@functools.cache
def smol() -> TextProcessor:
    return TextProcessor(load_tokenizer(ensure_converted()))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("place", ["within", "before", "behind"])
def test_tokens_of_a_thought_are_counted_up_to_the_one_that_closes_it(
    place: Literal["within", "before", "behind"], size: int, aligned: bool
) -> None:
    """And stop strings in it are text, while the ones behind it end the output."""
    text = smol()
    thought = text.encode(("" if place == "within" else BEGIN) + "\nStop? No é.\n" + END)
    tokens = [*thought, *text.encode("\n\nYes. Stop now")]
    detokenizer = text.detokenizer([], stop=("Stop",), aligned=aligned, thought=Thought(BEGIN, END, place))
    told, answer, starts, used, stop = "", "", [], 0, None
    for start in range(0, len(tokens), size):
        delta = detokenizer.push(tokens[start : start + size], final=start + size >= len(tokens))
        told, answer, stop = told + delta.thought, answer + delta.text, delta.stop
        starts += delta.starts
        used += delta.num_tokens
    if place == "behind":
        assert (told, answer, stop, detokenizer.thought_tokens) == ("", "<think>\n", "Stop", 0)
        return
    assert (told, answer, stop) == ("Stop? No é.", "Yes. ", "Stop")
    assert detokenizer.thought_tokens == len(thought)
    raw = text.decode(tokens)
    assert used == len(tokens) - len(text.encode(" now"))
    if aligned:
        ends = raw.rindex("Stop")
        ids = [len(text.decode(tokens[:count])) for count in range(len(tokens))]
        assert starts == [place for place in ids if place < ends]


def test_a_thought_that_is_cut_is_counted_and_one_that_never_opens_is_not() -> None:
    text = smol()
    for said, count in (("<think>\nHm", None), ("<thin", 0), ("\n", 0), ("Yes. <think>", 0)):
        tokens = text.encode(said)
        detokenizer = text.detokenizer([], thought=Thought(BEGIN, END, "before"))
        detokenizer.push(tokens, final=True)
        assert detokenizer.thought_tokens == (len(tokens) if count is None else count)


@pytest.mark.parametrize("place", ["within", "before"])
def test_min_tokens_are_counted_through_a_thought(place: Literal["within", "before"]) -> None:
    text = smol()
    tokens = [text.encode(char)[0] for char in ("" if place == "within" else BEGIN) + "a" + END + "a.b.c"]
    least = len(tokens) - 3
    detokenizer = text.detokenizer([], stop=(".",), min_tokens=least, thought=Thought(BEGIN, END, place))
    assert detokenizer.push(tokens, final=True).text == "a.b"


@pytest.mark.parametrize("said", [" \n<thin STOP", "<think> a </thin \n</think> \n Yes.STOP"])
def test_tokens_are_told_with_their_text_and_those_of_a_stop_string_never(said: str) -> None:
    """Log-probabilities wait for what a mark, white space or a stop string may hold back."""
    text = smol()
    letters = [text.encode(char)[0] for char in said]
    detokenizer = text.detokenizer([], stop=("STOP",), aligned=True, thought=Thought(BEGIN, END, "before"))
    starts = [detokenizer.push([letter]).starts for letter in letters]
    assert [start for some in starts for start in some] == list(range(len(said) - len("STOP")))
    early = [count for count, some in enumerate(starts[:7], 1) if some]
    assert early == ([] if said.startswith(" ") else [7])  # no mark before it is whole, and no space yet
