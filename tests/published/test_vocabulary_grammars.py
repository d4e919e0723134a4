"""Grammars over published vocabularies of 64k to 262k tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jsonschema
import numpy as np
import pytest
import regex

from engine.grammar import Grammar, GrammarCompiler, GrammarSpec, GrammarState
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor
from tests.published.sources import tokenizer_dir

NAMES = ("deepseek-v3", "gemma3", "llama3.1", "mistral-nemo", "qwen3", "yi")

PERSON = {
    "type": "object",
    "properties": {
        "größe": {"enum": ["klein", "日本語", "😀👩‍👩‍👧", 'a"b\\c\n\u2028é', "<b>", "<|eot_id|>", 7, None]},
        "город": {"const": "Москва"},
        "name": {"type": "string", "maxLength": 12},
        "код": {"type": "string", "pattern": "^[а-я]{2,6}-\\d{3}$"},
        "n": {"type": "integer", "minimum": -20, "maximum": 150},
        "x": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.125},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
        "child": {"$ref": "#/$defs/node"},
    },
    "required": ["größe", "город", "name", "код", "n", "x", "tags", "child"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"leaf": {"type": "boolean"}, "at": {"type": "string", "format": "date"}},
            "required": ["leaf", "at"],
            "additionalProperties": False,
        }
    },
}
EXAMPLE = {
    "größe": 'a"b\\c\n\u2028é',
    "город": "Москва",
    "name": "<b>Zoë</b>",
    "код": "привет-123",
    "n": -17,
    "x": 0.375,
    "tags": ["日本", "", "  a "],
    "child": {"leaf": True, "at": "2024-02-29"},
}
PATTERNS = {
    r"(ab|[а-я]{1,5}|日本|\d{2,4} ){1,4}[.!]": ["abжя日本!", "日本1234 12 .", "привет."],
    r"[^a-z]{0,9}x?": ["", "É <B>", "12 日本語\n\t", "😀 x"],
    r"(<b>|</b>|<\|im_end\|>|<table>| {1,9}){0,4}": ["<b>  </b>", " " * 9],
}


@dataclass
class Vocabulary:
    """One tokenizer and its grammars."""

    name: str

    @cached_property
    def text(self) -> TextProcessor:
        return TextProcessor(load_tokenizer(tokenizer_dir(self.name)))

    @cached_property
    def ends(self) -> list[int]:
        """Two tokens that end an answer, as of most chat models."""
        tokenizer = self.text.tokenizer
        other = next(i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id)
        return [tokenizer.eos_token_id, other]

    @cached_property
    def compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.text.tokenizer, self.ends)

    @cached_property
    def data(self) -> list[bytes | None]:
        """Of each token, None where it is no text to a grammar."""
        own = {*self.text.own_text_ids, *self.text._special_ids}
        found = [None if i in own else self.text.token_text(i).data for i in range(self.text.vocab_size)]
        return [
            None if name.startswith("<unused") else data
            for data, name in zip(found, self.text.token_strings(range(len(found))), strict=True)
        ]

    def grammar(self, kind: str, text: str) -> Grammar:
        return self.compiler.compile(GrammarSpec(kind, text))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=NAMES)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(request.param)


def allowed(state: GrammarState) -> list[int]:
    words = np.empty((1, state.words), np.int32)
    state.masks([0], [-1], words)
    found: list[int] = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist()
    return found


def walked(
    vocabulary: Vocabulary, grammar: Grammar, rng: random.Random, look: Callable[[bytes, list[int]], None]
) -> bytes:
    """What a model that has learnt nothing answers; looked at is what it may write, and behind what."""
    state, written = grammar.start(), b""
    for _ in range(400):
        if state.ended:
            return written
        choices = allowed(state)
        look(written, choices)
        token = rng.choice(choices)
        assert state.advance(token)
        if token not in vocabulary.ends:
            data = vocabulary.data[token]
            assert data is not None, token
            written += data
    raise AssertionError(f"no end: {written!r}")


def test_every_token_is_the_same_text_to_a_grammar(vocabulary: Vocabulary) -> None:
    vocabulary.compiler.prepare()
    read = vocabulary.compiler._made
    assert read is not None
    assert read.vocab_size == vocabulary.text.vocab_size
    ids = range(read.vocab_size)
    found = [None if read.is_special_token(i) else read.decode_bytes([i]) for i in ids]
    differ = [i for i, data in enumerate(vocabulary.data) if data != found[i] and data != b"\xff"]
    assert not differ, [(i, vocabulary.data[i], found[i]) for i in differ[:9]]


def test_an_answer_of_a_schema_is_valid_whatever_a_model_writes(vocabulary: Vocabulary) -> None:
    exact = PERSON | {"x-guidance": {"whitespace_flexible": False}}
    for ensure_ascii in (False, True):
        grammar = vocabulary.grammar("json_schema", json.dumps(exact, ensure_ascii=ensure_ascii))
        for seed in range(3):
            answer = walked(vocabulary, grammar, random.Random(seed), lambda *_: None)
            jsonschema.validate(json.loads(answer), PERSON)


def test_what_the_tokenizer_writes_for_a_valid_answer_may_be_written(vocabulary: Vocabulary) -> None:
    encode = vocabulary.text.encode
    for indent in (None, 2):
        written = json.dumps(EXAMPLE, ensure_ascii=False, indent=indent)
        state = vocabulary.grammar("json_schema", json.dumps(PERSON)).start()
        for token in encode(written, add_special_tokens=False):
            assert state.advance(token), (written, vocabulary.text.token_strings([token]))
        assert state.ended or set(vocabulary.ends) <= set(allowed(state))
    for pattern, texts in PATTERNS.items():
        for text in texts:
            state = vocabulary.grammar("regex", pattern).start()
            for token in encode(text, add_special_tokens=False):
                assert state.advance(token), (text, vocabulary.text.token_strings([token]))
            assert state.ended or state.advance(vocabulary.ends[1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_what_the_pattern_says(vocabulary: Vocabulary, pattern: str) -> None:
    """Held against another matcher of regular expressions, that knows what may still become a match."""
    compiled, rng = regex.compile(pattern), random.Random(5)

    def may_begin(data: bytes) -> bool:
        try:
            return compiled.fullmatch(data.decode(), partial=True) is not None
        except UnicodeDecodeError:
            return False

    def look(written: bytes, choices: list[int]) -> None:
        known = set(choices)
        try:
            whole = compiled.fullmatch(written.decode()) is not None
        except UnicodeDecodeError:
            return  # within a character
        assert [token in known for token in vocabulary.ends] == [whole, whole]
        tried = {*rng.sample(choices, min(40, len(choices))), *rng.sample(range(len(vocabulary.data)), 40)}
        for token in tried.difference(vocabulary.ends):
            data = vocabulary.data[token]
            if data is None:
                assert token not in known
            elif "\ufffd" not in data.decode("utf-8", "replace"):
                assert (token in known) == may_begin(written + data), (written, data)

    grammar = vocabulary.grammar("regex", pattern)
    for _ in range(3):
        assert compiled.fullmatch(walked(vocabulary, grammar, rng, look).decode())


@pytest.mark.parametrize(
    ("kind", "text", "answers"),
    [
        ("choice", json.dumps(["yes", "日本語", "<b>", "<|eot_id|>", "<think>", "a  b"]), None),
        ("grammar", 'start: item (", " item)?\nitem: WORD "=" NUM\nWORD: /[a-zé]{1,9}/\nNUM: /[0-9]{1,3}/',
         r"[a-zé]{1,9}=\d{1,3}(, [a-zé]{1,9}=\d{1,3})?"),
        ("grammar", 'root ::= ("да" | "нет") "\\n"', "(да|нет)\n"),
    ],
)  # fmt: skip
def test_other_grammars_are_followed_to_their_end(
    vocabulary: Vocabulary, kind: str, text: str, answers: str | None
) -> None:
    grammar, rng = vocabulary.grammar(kind, text), random.Random(6)
    for _ in range(12):
        answer = walked(vocabulary, grammar, rng, lambda *_: None).decode()
        assert regex.fullmatch(answers, answer) if answers else answer in json.loads(text)
