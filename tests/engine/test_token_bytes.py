"""The text of vocabularies that spell bytes, however it is cut; words to keep out of it."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, decoders

from engine.sampling_params import MAX_BAD_WORD_TOKENS
from engine.text import TextProcessor
from engine.token_bytes import EACH_BYTE, spelling_of
from tests.letters import letter_tokenizer, sentencepiece_tokenizer

BYTE = 3
"""The token of the byte 0 of a sentencepiece-like vocabulary."""

WORDS = ["▁", "▁▁", *"Parisxy", "▁x", "xy", "ar", "is", "▁P", "▁Par", "▁Paris", "é", "日本"]


@functools.cache
def processor(*, drops_space: bool) -> TextProcessor:
    return TextProcessor(sentencepiece_tokenizer(*WORDS, drops_space=drops_space))


def streamed(of: TextProcessor, prompt: list[int], ids: list[int], places: list[int], *, skip: bool) -> str:
    detokenizer = of.detokenizer(prompt, skip_special_tokens=skip)
    cuts = itertools.pairwise([0, *sorted(place % (len(ids) + 1) for place in places), len(ids)])
    return "".join(detokenizer.push(ids[a:b]).text for a, b in cuts) + detokenizer.push([], final=True).text


IDS = st.lists(st.integers(0, BYTE + 256 + len(WORDS) + 3), max_size=30)  # some of no token


@settings(deadline=None, max_examples=300)
@given(IDS, IDS, st.lists(st.integers(0, 99), max_size=9), st.booleans(), st.booleans())
def test_text_is_the_bytes_of_its_tokens_however_it_is_cut(
    prompt: list[int], ids: list[int], places: list[int], skip: bool, drops: bool
) -> None:
    of = processor(drops_space=drops)

    def data(tokens: list[int]) -> bytes:
        kept = [token for token in tokens if not (skip and token < BYTE)]
        return b"".join(of._token_bytes[token] for token in kept)

    expected = data(ids)
    if drops and not data(prompt):
        expected = expected.removeprefix(b" ")
    text = streamed(of, prompt, ids, places, skip=skip)
    assert text == expected.decode("utf-8", EACH_BYTE)
    # The tokenizer says the same but of a run of bytes that has characters and others.
    runs = [bytes(group) for is_byte, group in _runs(prompt + ids, skip) if is_byte]
    if all(_is_text(run) or not any(_is_text(run[a:b]) for a, b in _spans(len(run))) for run in runs):
        before = of.decode(prompt, skip_special_tokens=skip)
        if "\ufffd" not in before:
            assert text == of.decode(prompt + ids, skip_special_tokens=skip)[len(before) :]


def _runs(ids: list[int], skip: bool) -> list[tuple[bool, list[int]]]:
    of_none = BYTE + 256 + len(WORDS)
    kept = [token - BYTE for token in ids if token < of_none and not (skip and token < BYTE)]
    return [(is_byte, list(group)) for is_byte, group in itertools.groupby(kept, lambda b: 0 <= b < 256)]


def _spans(length: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(length + 1), 2))


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_byte_that_is_no_character_is_one_replacement_each() -> None:
    of = processor(drops_space=False)
    ids = [BYTE + byte for byte in "日".encode()[:2]]
    assert streamed(of, [], ids, [], skip=True) == of.decode(ids) == "\ufffd\ufffd"
    broken = [BYTE + byte for byte in "é".encode() + b"\xff"]
    assert {streamed(of, [], broken, places, skip=True) for places in ([], [1], [2], [1, 2])} == {"é\ufffd"}


def test_the_first_space_goes_where_nothing_was_before_it() -> None:
    of = processor(drops_space=True)
    word, special = of.tokenizer.convert_tokens_to_ids("▁P"), 1
    for prompt, ids, shown, hidden in (
        ([], [word, word], "P P", "P P"),
        ([special], [word], " P", "P"),
        ([word], [word], " P", " P"),
        ([], [special, word], "<s> P", "P"),
    ):
        for places in ([], [1]):
            assert streamed(of, prompt, ids, places, skip=False) == shown
            assert streamed(of, prompt, ids, places, skip=True) == hidden


def test_which_decoders_join_bytes() -> None:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = decoders.Strip(" ", 1, 0)
    byte_level, gemma, llama2 = (
        spelling_of(decoder)
        for decoder in (decoders.ByteLevel(), decoders.Sequence(steps), decoders.Sequence([*steps, strip]))
    )
    assert byte_level is not None
    assert byte_level.bytes_of("ĠHé") == b" H\xe9"
    assert byte_level.bytes_of("<｜end｜>") == "<｜end｜>".encode()
    assert gemma is not None
    assert [gemma.bytes_of(name) for name in ("▁▁é", "<0xE9>", "<0xe9>", "<0xE>")] == [
        "  é".encode(),
        b"\xe9",
        b"\xe9",
        b"<0xE>",
    ]
    assert not gemma.drops_space
    assert llama2 is not None
    assert llama2.drops_space
    others = [
        None,
        decoders.Metaspace(),
        decoders.WordPiece(),
        decoders.Sequence(steps[:2]),  # without Fuse each token's first space would go
        decoders.Sequence([*steps, decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([*steps, strip, strip]),
        decoders.Sequence([decoders.Replace("_", " "), *steps[1:]]),
    ]
    assert [spelling_of(decoder) for decoder in others] == [None] * len(others)


def test_a_tokenizer_that_decodes_otherwise_is_asked() -> None:
    tokenizer = letter_tokenizer("x")  # of the sample that is tried
    assert TextProcessor(tokenizer)._spelling is not None

    class Loud(type(tokenizer)):  # type: ignore[misc]
        def _decode(self, *args: object, **options: object) -> str:
            return str(super()._decode(*args, **options)).upper()

    assert TextProcessor(Loud(tokenizer_object=tokenizer.backend_tokenizer))._spelling is None


def test_a_token_that_is_no_character_may_be_in_the_sample_that_is_tried() -> None:
    """DeepSeek Coder has letters of the byte alphabet that are no bytes of any text as tokens of its."""
    tokenizer = letter_tokenizer("x")
    tokenizer.add_tokens([AddedToken("ö", normalized=False, special=False)])
    of = TextProcessor(tokenizer)
    assert of._spelling is not None
    assert streamed(of, [], of.encode("xöx"), [1], skip=True) == of.decode(of.encode("xöx")) == "x\ufffdx"


@pytest.mark.parametrize("word", ["Paris", " Paris"])
def test_a_word_of_two_tokens_is_kept_out_where_with_its_space_it_is_one(word: str) -> None:
    of = processor(drops_space=False)
    sequences = of.encode_bad_words([word])
    assert [of.token_strings(sequence) for sequence in sequences] == [["P", "ar", "is"], ["▁Paris"]]


def test_a_space_that_is_a_token_before_the_word_adds_nothing() -> None:
    of = processor(drops_space=False)
    assert [of.token_strings(sequence) for sequence in of.encode_bad_words(["é"])] == [["é"]]
    long = "é" * MAX_BAD_WORD_TOKENS
    assert [len(sequence) for sequence in of.encode_bad_words([long])] == [MAX_BAD_WORD_TOKENS]
    longer = processor(drops_space=False).encode_bad_words(["P" + long[1:]])
    assert [re.sub("é+", "é", "".join(of.token_strings(s))) for s in longer] == ["Pé", "▁Pé"]
    [only] = of.encode_bad_words(["xy" + long[1:]])  # with a space it has a token more, too many
    assert of.token_strings(only)[:2] == ["xy", "é"]
