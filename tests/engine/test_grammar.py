"""Grammars against a matcher that is walked anew for every path, and what is no grammar."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from engine.errors import RequestError
from engine.grammar import (
    COMPILER_STACK,
    COMPILER_THREADS,
    LEAST_STACK,
    MAX_GRAMMAR_BYTES,
    STACK_PER_BYTE,
    CompilerThreads,
    Grammar,
    GrammarCompiler,
    GrammarSpec,
    GrammarState,
)
from tests.letters import letter_tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = letter_tokenizer("abcdefghij", "ab", "bc", "abc")
EOS = TOKENIZER.eos_token_id
COMPILER = GrammarCompiler(TOKENIZER, [EOS])
ID = TOKENIZER.get_vocab()


def regex(text: str) -> Grammar:
    return COMPILER.compile(GrammarSpec("regex", text))


def allowed(state: GrammarState, tokens: list[int], parents: list[int]) -> list[set[int] | None]:
    """Of each node what may follow; None: anything."""
    out = np.zeros((len(tokens), state.words), np.int32)
    state.masks(tokens, parents, out)
    if (out == -1).all():
        return [None] * len(tokens)
    bits = np.unpackbits(out.view(np.uint8), axis=1, bitorder="little")
    return [
        None if (row == -1).all() else set(np.nonzero(b)[0].tolist())
        for row, b in zip(out, bits, strict=True)
    ]


def walked(grammar: Grammar, path: list[int]) -> set[int] | None:
    """What may follow a path, by a matcher that has gone nowhere else; None: off the grammar, or ended."""
    state = grammar.start()
    for token in path:
        if state.ended or not state.advance(token):
            return None
    return None if state.ended else allowed(state, [0], [-1])[0]


def test_a_state_follows_its_grammar_to_the_end() -> None:
    state = regex("a(bc)+").start()
    for text, whole in (("ab", False), ("c", False), ("b", False)):
        assert state.advance(ID[text])
        assert state.ended == whole
    assert not state.advance(EOS)  # in the middle
    state = regex("a(bc)+").start()
    assert all(state.advance(ID[text]) for text in ("abc", "bc"))
    assert not state.ended
    assert state.advance(EOS)
    assert state.ended
    assert not regex("abc").start().advance(ID["b"])


def test_what_an_answer_may_begin_with() -> None:
    grammar = regex("a(bc)+|d")
    begins = {ID["a"], ID["ab"], ID["abc"], ID["d"]}
    assert grammar.may_begin(without=())
    assert not grammar.may_begin(without=begins)
    assert not grammar.may_begin(without={*begins, EOS, 10**6})
    for token in begins:
        assert grammar.may_begin(without=begins - {token})
    assert regex("a?").may_begin(without={ID["a"]})  # it may be empty
    assert not regex("a?").may_begin(without={ID["a"], EOS})


def test_where_nothing_can_follow_the_answer_has_ended() -> None:
    state = regex("ab|c").start()
    assert state.advance(ID["a"])
    assert not state.ended
    assert state.advance(ID["b"])
    assert state.ended


def test_what_ends_an_answer_is_allowed_where_it_is_whole() -> None:
    grammar = regex("(ab)+c?")
    assert walked(grammar, []) == {ID["a"], ID["ab"], ID["abc"]}
    assert walked(grammar, [ID["ab"]]) == {ID["a"], ID["ab"], ID["abc"], ID["c"], EOS}
    assert walked(grammar, [ID["abc"]]) is None


@pytest.mark.parametrize("seed", range(20))
def test_every_node_of_a_tree_has_the_mask_of_its_path(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grammar = regex("(a(bc|b)*d?|[b-e]{2,4})+")
    state, prefix = grammar.start(), []
    for _ in range(rng.integers(0, 4)):
        token = int(rng.choice(sorted(walked(grammar, prefix) - {EOS})))  # type: ignore[operator]
        prefix.append(token)
        assert state.advance(token)
    size = int(rng.integers(1, 30))
    tokens = [0, *rng.integers(0, len(ID), size - 1).tolist()]
    parents = [-1, *(int(rng.integers(0, node)) for node in range(1, size))]

    def path(node: int) -> list[int]:
        return [] if node == 0 else [*path(parents[node]), tokens[node]]

    for _ in range(2):  # and the walk has left the state where it was
        found = allowed(state, tokens, parents)
        for node in range(size):
            if found[node] is None:
                assert walked(grammar, prefix + path(node)) is None
            else:
                assert found[node] == walked(grammar, prefix + path(node))


def test_states_of_one_grammar_do_not_share_where_they_stand() -> None:
    grammar = regex("ab+")
    first, second = grammar.start(), grammar.start()
    assert first.advance(ID["a"])
    assert second.advance(ID["ab"])
    assert first.advance(ID["b"])


def test_grammars_are_equal_where_their_texts_are() -> None:
    assert regex("a") == regex("a")
    assert hash(regex("a")) == hash(regex("a"))
    assert regex("a") != regex("b")
    assert regex("a") != "a"


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        (GrammarSpec("choice", json.dumps(["abc", "b"])), ["abc", "b"]),
        (GrammarSpec("regex", "a(b|c)"), ["ab", "ac"]),
        (GrammarSpec("grammar", 'start: "a" x\nx: "b" | "c"'), ["ab", "ac"]),
        (GrammarSpec("grammar", 'root ::= "a" x\nx ::= "b" | "c"'), ["ab", "ac"]),
    ],
    ids=str,
)
def test_kinds_of_grammars(spec: GrammarSpec, texts: list[str]) -> None:
    grammar, found = COMPILER.compile(spec), set()
    words = [""]
    while words:
        word = words.pop()
        state = grammar.start()
        if not all(state.advance(ID[letter]) for letter in word):
            continue
        if state.ended or state.advance(EOS):
            found.add(word)
        elif len(word) < 3:
            words += [word + letter for letter in "abc"]
    assert sorted(found) == texts


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GrammarSpec("regex", "(a"), "regular expression.*unclosed group"),
        (GrammarSpec("regex", "a(?=b)"), "regular expression.*look-around"),
        (GrammarSpec("json_schema", '{"type": "nonsense"}'), "JSON schema.*nonsense"),
        (GrammarSpec("json_schema", "{"), "JSON schema"),
        (GrammarSpec("json_schema", '{"type": "array", "uniqueItems": true}'), "JSON schema.*uniqueItems"),
        (GrammarSpec("json_schema", '{"enum": [1, 2]}'), "no answer of this model's tokens"),  # no digits
        (GrammarSpec("json_schema", '{"$ref": "#"}'), "no answer of this model's tokens.*JSON schema"),
        (GrammarSpec("choice", "[]"), "list of strings.*at least"),
        (GrammarSpec("choice", '["a", ""]'), "list of strings.*empty"),
        (GrammarSpec("choice", "a"), "list of strings"),
        (GrammarSpec("grammar", "start: nothing"), "grammar.*nothing"),
        (GrammarSpec("grammar", "x ::= "), "grammar.*GBNF"),
        *(
            (GrammarSpec(kind, "a" * (most + 1)), f"may have {most} bytes")
            for kind, most in MAX_GRAMMAR_BYTES.items()
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_grammar_is_refused_with_a_reason(spec: GrammarSpec, reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        COMPILER.compile(spec, param="structured_outputs")
    assert re.search(reason, str(refused.value), re.DOTALL)
    assert refused.value.param == "structured_outputs"


DEEP = {
    "rules": "start: r0\n" + "".join(f"r{i}: ((((r{i + 1}))))\n" for i in range(2_500)) + 'r2500: "a"',
    "schemas": '{"$ref": "#/$defs/0", "$defs": {'
    + "".join(f'"{i}": {{"anyOf": [{{"$ref": "#/$defs/{i + 1}"}}]}}, ' for i in range(5_000))
    + '"5000": {"type": "boolean"}}}',
}


@pytest.mark.parametrize("kind", DEEP)
def test_what_refers_to_what_refers_on_does_not_end_the_process(kind: str) -> None:
    """In a process of its own, since the end of a stack is the end of one."""
    spec = GrammarSpec("grammar" if kind == "rules" else "json_schema", DEEP[kind])
    assert len(spec.text) < MAX_GRAMMAR_BYTES[spec.kind]
    code = (
        "import sys; from tests.engine.test_grammar import COMPILER, CompilerThreads, GrammarSpec;"
        "spec = GrammarSpec(sys.argv[1], sys.stdin.read());"
        "grammar = CompilerThreads().submit(COMPILER.compile, spec).result();"
        "print('ended' if grammar.start().ended else 'begun')"
    )
    command = [sys.executable, "-c", code, spec.kind]
    done = subprocess.run(command, input=spec.text, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr


def test_threads_that_stay_make_all_but_large_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[int] = []
    start, usual = threading.Thread.start, threading.stack_size()

    def noted(thread: threading.Thread) -> None:
        stacks.append(threading.stack_size())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    fits = COMPILER_STACK // STACK_PER_BYTE
    with CompilerThreads() as threads:
        for length in (1, 2, 3, 4, fits):
            threads.submit(regex, "a" * length).result()
        assert 1 <= len(stacks) <= COMPILER_THREADS
        assert set(stacks) == {COMPILER_STACK}
        threads.submit(regex, "a" * (fits + 1)).result()
        assert stacks[-1] == STACK_PER_BYTE * (fits + 1)
    stacks.clear()
    regex("a")  # in this thread, of whose stack nothing is known
    assert stacks == [LEAST_STACK]
    assert threading.stack_size() == usual


def test_a_tokenizer_that_cannot_be_read_is_told() -> None:
    with pytest.raises(RequestError, match="tokenizer cannot be used with a grammar"):
        GrammarCompiler(object(), [0]).compile(GrammarSpec("regex", "a"))  # type: ignore[arg-type]


def test_ends_that_the_tokenizer_does_not_have_are_left_out() -> None:
    compiler = GrammarCompiler(TOKENIZER, [EOS, 500])
    state = compiler.compile(GrammarSpec("regex", "a(bc)+")).start()
    assert all(state.advance(ID[text]) for text in ("abc", "bc"))
    assert allowed(state, [0], [-1]) == [{EOS, ID["b"], ID["bc"]}]
    assert state.advance(500)
    assert state.ended


def test_unknown_kinds_are_told() -> None:
    with pytest.raises(RequestError, match=r"^'lark' is no kind of grammar; kinds: .*grammar"):
        COMPILER.compile(GrammarSpec("lark", "start: /a/"))  # type: ignore[arg-type]


def test_a_tree_that_was_looked_at_changes_nothing_of_what_may_follow() -> None:
    """Behind `]` stood what may follow a comma, where both had been nodes, each before a line break."""
    tokenizer = letter_tokenizer('{}[]":,Ċab0123456789')  # Ċ: a line break's byte
    ids = tokenizer.get_vocab()
    integers = {"type": "array", "items": {"type": "integer"}, "maxItems": 3}
    schema = {"type": "object", "properties": {"b": integers}, "required": ["b"]}
    compiler = GrammarCompiler(tokenizer, [tokenizer.eos_token_id])
    state = compiler.compile(GrammarSpec("json_schema", json.dumps(schema))).start()
    line_break, *rest = (ids[char] for char in "Ċ],")
    for char in '{"b":[4':
        assert state.advance(ids[char]), char
    allowed(state, [0, *rest, line_break], [-1, 0, 0, 2])
    assert state.advance(rest[0])
    assert state.advance(line_break)
    [found] = allowed(state, [0], [-1])
    assert found is not None
    assert ids["}"] in found
    assert ids["3"] not in found
