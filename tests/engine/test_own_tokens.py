"""Which added tokens are text to a grammar, and which stand for themselves."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from engine.errors import RequestError
from engine.grammar import GrammarCompiler, GrammarSpec, GrammarState
from engine.own_tokens import tokenizer_json
from engine.text import TextProcessor
from tests.letters import letter_tokenizer, sentencepiece_tokenizer

EOS = 2


def gemma() -> PreTrainedTokenizerFast:
    """HTML and others are added tokens, all but the last in the vocabulary by themselves."""
    words = ["<b>", "</b>", "<unused7>", "<think>", "▁▁", *"ab<>/"]
    tokenizer = sentencepiece_tokenizer(*words, drops_space=False)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in [*words[:5], "<i>"]])
    return tokenizer


def allowed(state: GrammarState) -> set[int]:
    words = np.empty((1, state.words), np.int32)
    state.masks([0], [-1], words)
    return set(np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist())


def test_tokens_of_html_are_text_where_the_vocabulary_has_them() -> None:
    tokenizer = gemma()
    ids = tokenizer.convert_tokens_to_ids
    compiler = GrammarCompiler(tokenizer, [EOS])
    state = compiler.compile(GrammarSpec("regex", "<b>a</b>| +|<think>|<i>")).start()
    spaces = {ids("▁▁"), ids("<0x20>")}
    assert allowed(state) == {ids("<b>"), ids("<"), ids("<0x3C>"), *spaces}
    for token in TextProcessor(tokenizer).encode("<b>a</b>"):
        assert state.advance(token)
    assert state.ended

    text = TextProcessor(tokenizer)
    assert text.own_text_ids == [ids("<think>"), ids("<i>")]
    names = ("<b>", "<i>", "<think>", "<unused7>", "▁▁", "<s>", "a", "<none>")
    assert {name: text.own_token_id(name) for name in names} == {
        "<b>": None,
        "<i>": ids("<i>"),
        "<think>": ids("<think>"),
        "<unused7>": ids("<unused7>"),
        "▁▁": None,
        "<s>": 1,
        "a": None,
        "<none>": None,
    }


def test_own_tokens_can_be_named() -> None:
    tokenizer = gemma()
    ids = tokenizer.convert_tokens_to_ids
    lark = f'start: <[{ids("<think>")}]> <[{ids("<i>")}]> "a"'
    state = GrammarCompiler(tokenizer, [EOS]).compile(GrammarSpec("grammar", lark)).start()
    for name in ("<think>", "<i>", "a"):
        assert allowed(state) & {ids("<think>"), ids("<i>"), ids("a")} == {ids(name)}
        assert state.advance(ids(name))
    assert state.ended


def test_tokens_that_the_model_does_not_have_are_left_out() -> None:
    tokenizer = gemma()
    thought, last = (tokenizer.convert_tokens_to_ids(name) for name in ("<think>", "<i>"))
    assert last == len(tokenizer) - 1
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<i> $A", special_tokens=[("<i>", last)]
    )
    for vocab_size, named in ((None, last), (last + 1, last), (last, thought), (last + 9, last)):
        compiler = GrammarCompiler(tokenizer, [EOS], vocab_size)
        state = compiler.compile(GrammarSpec("grammar", f"start: <[{named}]>")).start()
        assert allowed(state) == {named}
    for vocab_size, named in ((last, last), (thought, thought)):
        with pytest.raises(RequestError, match="not a valid grammar"):
            GrammarCompiler(tokenizer, [EOS], vocab_size).compile(
                GrammarSpec("grammar", f"start: <[{named}]>")
            )


def test_every_token_has_its_place_and_its_bytes() -> None:
    tokenizer = gemma()
    compiler = GrammarCompiler(tokenizer, [EOS])
    compiler.prepare()
    read, text = compiler._made, TextProcessor(tokenizer)
    assert read is not None
    assert read.vocab_size == len(tokenizer)
    for token in range(read.vocab_size):
        name = tokenizer.convert_ids_to_tokens(token)
        own = text.own_token_id(name) == token
        if token == 3 + 0xFF:  # of no text in UTF-8: llguidance's own mark for what is none
            continue
        assert own == read.is_special_token(token)
        if not own:
            assert read.decode_bytes([token]) == text.token_text(token).data


def test_padding_and_truncation_that_a_file_asks_for_are_left_out() -> None:
    tokenizer = letter_tokenizer("abc", "ab")
    plain = tokenizer_json(tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.enable_truncation(1)
    assert tokenizer_json(tokenizer) == plain
    assert tokenizer.backend_tokenizer.padding is not None  # is the tokenizer's own matter
    with pytest.raises(ValueError, match="fast"):
        tokenizer_json(object())  # type: ignore[arg-type]
