"""Grammars that an answer has to follow: which tokens may come next, at every node of a tree.

llguidance does the parsing: it needs no preparation per grammar and finds a mask over a vocabulary in tens of
microseconds, which a tree needs at each of its nodes. Its matchers know nothing of trees: a walk over one, on
copies of a matcher, is what is here.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.limits import give_back_memory
from engine.own_tokens import tokenizer_json

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MAX_KEPT",
    "CompilerThreads",
    "Grammar",
    "GrammarCompiler",
    "GrammarSpec",
    "GrammarState",
    "KeptGrammars",
]

_Made = TypeVar("_Made")
_Arguments = ParamSpec("_Arguments")

MAX_KEPT = 256
"""Compiled grammars that are kept for requests that ask for the same."""

MAX_KEPT_TEXT = 1 << 20
"""Characters of all grammars that are kept; compiled, a large one takes some fifty times its text."""

COMPILER_THREADS = 2
"""So that one grammar that takes long does not hold up all others, and no flood of them takes every core."""

MAX_GRAMMAR_BYTES = {
    "json_schema": 1 << 18,
    "choice": 1 << 18,
    "tools": 1 << 18,
    "regex": 1 << 16,
    "grammar": 1 << 16,
}
"""Of the text of each kind: more is a mistake or an attack. Nothing else bounds what llguidance takes for it:
of terminals that name terminals, the worst so far, the square of their number, two seconds for 64 KiB."""

STACK_PER_BYTE = 2048
"""Bytes of stack that a byte of text may take. llguidance goes down rules that name rules, and schemas that
name schemas, by recursion, and where the stack ends so does the process; the most that was found was 1024."""

LEAST_STACK = 1 << 23

COMPILER_STACK = 1 << 24
"""Of threads that stay: texts of up to 8 KiB are compiled there."""


class GrammarSpec(NamedTuple):
    """A grammar as a request gives it.

    Args:
        kind: what the text is: a JSON schema, a regular expression (of Rust's regex crate), a JSON list of
            the strings to choose from, a grammar in Lark's or in llama.cpp's GBNF notation, or the server's
            own, in Lark's, for calls of tools.
        text: of it.
        lead: a grammar in Lark's notation, not a user's, of all that is written, in which this one is
            `@answer`; empty where nothing stands before it.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "tools"]
    text: str
    lead: str = ""


class Grammar:
    """A compiled grammar. Two are equal where their specs are.

    Args:
        spec: what it was made from.
        matcher: at its beginning.
        vocab_size: of the tokenizer.
        eos_token_ids: which end an answer.
        answer: of what comes behind the spec's lead, where it has one.
    """

    def __init__(
        self,
        spec: GrammarSpec,
        matcher: LLMatcher,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        answer: Grammar | None = None,
    ) -> None:
        self.spec, self._answer = spec, answer
        self._matcher, self._vocab_size, self._eos = matcher, vocab_size, eos_token_ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grammar) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def start(self) -> GrammarState:
        """A state of its own at the grammar's beginning."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size, self._eos)

    def may_begin(self, *, without: Iterable[int]) -> bool:
        """Whether what stands behind a lead may begin with another token than these, or be empty."""
        if self._answer is not None:
            return self._answer.may_begin(without=without)
        state = self.start()
        words = np.empty((1, state.words), np.int32)
        state.masks([0], [0], words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        bits[[token for token in without if token < len(bits)]] = 0
        return bool(bits.any())


class GrammarState:
    """Where one answer stands in its grammar; one thread at a time may use it.

    Args:
        matcher: at that place.
        vocab_size: of the tokenizer; a model's logits may be padded beyond.
        eos_token_ids: which end an answer.

    Attributes:
        ended: the answer is whole: nothing can follow, or what ends it has come.
        error: why nothing can be said of what may follow any more, such as a limit of the parser; or "".
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._matcher, self._eos = matcher, eos_token_ids
        self.words = -(-vocab_size // 32)
        self.ended, self.error = False, ""

    def advance(self, token: int) -> bool:
        """Take one more token of the answer; False where the grammar does not allow it, or after an error."""
        if self._matcher.is_error():  # and stays so
            self.error = self._matcher.get_error()
            return False
        if token in self._eos:
            self.ended = self._matcher.is_accepting()
            return self.ended
        taken = bool(self._matcher.consume_token(token))
        self.ended = taken and self._matcher.is_stopped()
        return taken

    def forced(self) -> list[int]:
        """Tokens that spell what alone can come next; others may spell the same."""
        return list(self._matcher.compute_ff_tokens())

    def masks(self, tokens: Sequence[int], parents: Sequence[int], out: NDArray[np.int32]) -> None:
        """What may follow each node of a tree whose root is the last token that was taken.

        Nodes that the grammar does not allow, and those behind its end, are not looked at: nothing is ever
        drawn there, so they may be followed by anything.

        Args:
            tokens: of the nodes, the root first; a node comes behind its parent.
            parents: of the nodes; the root's is not read.
            out: [nodes, words] int32, filled: bit t % 32 of word t // 32 says whether token t may follow.
        """
        out[:] = -1
        children: list[list[int]] = [[] for _ in tokens]
        for node in range(1, len(tokens)):
            children[parents[node]].append(node)
        self._visit(self._matcher, 0, tokens, children, out)

    def _visit(
        self,
        matcher: LLMatcher,
        node: int,
        tokens: Sequence[int],
        children: list[list[int]],
        out: NDArray[np.int32],
    ) -> None:
        row = out[node]
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        for child in children[node]:
            token = tokens[child]
            allowed = token // 32 < self.words and (int(row[token // 32]) >> (token % 32)) & 1
            if not allowed or token in self._eos:
                continue
            # Not forth and back: where other tokens follow after a rollback, llguidance 1.9 may give the mask
            # that it found behind the ones taken back. Behind the last child nobody comes back to a copy.
            last = child == children[node][-1] and matcher is not self._matcher
            behind = matcher if last else matcher.deep_copy()
            if behind.consume_token(token) and not behind.is_stopped():
                self._visit(behind, child, tokens, children, out)


class KeptGrammars(Generic[_Made]):
    """What was made of grammars, for who asks for the same; the least recently used are forgotten.

    Not safe for several threads.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[GrammarSpec, _Made] = OrderedDict()
        self._characters = 0

    def get(self, spec: GrammarSpec) -> _Made | None:
        """What was made of it, now the most recently used."""
        if spec in self._made:
            self._made.move_to_end(spec)
        return self._made.get(spec)

    def put(self, spec: GrammarSpec, made: _Made) -> None:
        """Keep what was made of a grammar that is not kept, and forget what is then too much."""
        self._made[spec] = made
        self._characters += len(spec.text) + len(spec.lead)
        while len(self._made) > 1 and (len(self._made) > MAX_KEPT or self._characters > MAX_KEPT_TEXT):
            self._forget(next(iter(self._made)))

    def drop(self, spec: GrammarSpec, made: _Made) -> None:
        """Forget this, unless it has been forgotten."""
        if self._made.get(spec) is made:
            self._forget(spec)

    def _forget(self, spec: GrammarSpec) -> None:
        del self._made[spec]
        self._characters -= len(spec.text) + len(spec.lead)


class CompilerThreads(ThreadPoolExecutor):
    """Threads that compile grammars, with stacks for most of them.

    glibc gives each thread one of its heaps, and a heap never gets back to the system what lies below
    something that is in use. Were every grammar made by a thread of its own, those that are kept would
    wander through all heaps there are, and each would grow to hold all of them.
    """

    def __init__(self) -> None:
        super().__init__(COMPILER_THREADS, "grammar", initializer=_note_stack)

    def submit(
        self, fn: Callable[_Arguments, _Made], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Made]:
        """As `ThreadPoolExecutor.submit`, which starts a thread where too few are idle."""
        with _stack_of(COMPILER_STACK):
            return super().submit(fn, *args, **kwargs)


class GrammarCompiler:
    """Makes grammars for one model; any thread may call it.

    Args:
        tokenizer: the model's, a fast one.
        eos_token_ids: which end an answer, where the grammar allows that.
        vocab_size: of the model's logits, where these may be fewer than the tokenizer's tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Iterable[int], vocab_size: int | None = None
    ) -> None:
        self._hf, self._eos, self._vocab_size = tokenizer, frozenset(eos_token_ids), vocab_size
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def prepare(self) -> None:
        """Read the tokenizer, for the most part with Python's lock held. Raises RequestError if it cannot."""
        self._tokenizer(None)

    def compile(self, spec: GrammarSpec, *, param: str | None = None) -> Grammar:
        """A grammar from its text. The first call takes one to three seconds more: it reads the tokenizer.

        Args:
            param: the request's field, for errors.

        Raises:
            RequestError: the text is not what `spec.kind` says, is too large, asks for what llguidance
                does not know, or lets no answer begin; or the model's tokenizer is none that it can read.
        """
        if spec.kind not in _NAMES:
            raise RequestError(
                f"{spec.kind!r} is no kind of grammar; kinds: {', '.join(_NAMES)}", param=param
            )
        if len(spec.text.encode(errors="surrogatepass")) > (most := MAX_GRAMMAR_BYTES[spec.kind]):
            raise RequestError(f"a {_NAMES[spec.kind]} may have {most} bytes of text", param=param)
        tokenizer = self._tokenizer(param)
        # What is wrong with it by itself would be found behind the lead only, in the middle of an answer.
        answer = self.compile(spec._replace(lead=""), param=param) if spec.lead else None
        try:
            matcher = self._matcher(tokenizer, spec)
        except ValueError as error:
            raise RequestError(f"not a valid {_NAMES[spec.kind]}: {error}", param=param) from error
        if matcher.is_error():
            reason = matcher.get_error().split("\n\n")[0].strip()
            raise RequestError(f"not a valid {_NAMES[spec.kind]}: {reason}", param=param)
        start = matcher.deep_copy()
        start.compute_bitmask()
        if start.is_error():  # such as of a schema that refers to itself alone
            text = f"no answer of this model's tokens can follow this {_NAMES[spec.kind]}"
            raise RequestError(text, param=param)
        return Grammar(spec, matcher, tokenizer.vocab_size, self._eos, answer)

    def _matcher(self, tokenizer: LLTokenizer, spec: GrammarSpec) -> LLMatcher:
        """Made in a thread whose stack fits the text; of memory only what is needed is taken."""
        from llguidance import LLMatcher

        stack = max(LEAST_STACK, STACK_PER_BYTE * len(spec.text.encode(errors="surrogatepass")))
        if stack <= getattr(_THREAD, "stack", 0):
            return LLMatcher(tokenizer, _text(spec), log_level=0)
        made: Future[LLMatcher] = Future()

        def make() -> None:
            try:
                made.set_result(LLMatcher(tokenizer, _text(spec), log_level=0))
            except BaseException as error:
                made.set_exception(error)

        with _stack_of(stack):
            threading.Thread(target=make, name="grammar", daemon=True).start()
        return made.result()

    def _tokenizer(self, param: str | None) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                from llguidance import LLTokenizer

                try:
                    text = tokenizer_json(self._hf, self._vocab_size)
                    # A model may end with tokens that no text has; of these llguidance knows nothing.
                    ends = [token for token in sorted(self._eos) if self._is_known(token)]
                    read = LLTokenizer(text, eos_token=ends or self._hf.eos_token_id, slices=[])
                except ValueError as error:
                    text = f"this model's tokenizer cannot be used with a grammar: {error}"
                    raise RequestError(text, param=param) from error
                # In a call of its own: all threads wait for each of the two, for a second with 262k tokens.
                self._made = read.with_slices(LLTokenizer.general_slices())
                give_back_memory()  # 260 MB with 262k tokens
            return self._made

    def _is_known(self, token: int) -> bool:
        in_model = self._vocab_size is None or token < self._vocab_size
        return in_model and self._hf.convert_ids_to_tokens(token) is not None


_STACKS = threading.Lock()
"""Held while the size of new threads' stacks, which is the process's, is another."""

_THREAD = threading.local()
"""`stack`: the bytes of this thread's, where it is one of `CompilerThreads`."""


@contextmanager
def _stack_of(size: int) -> Iterator[None]:
    """Threads that are started meanwhile have stacks of so many bytes."""
    with _STACKS:
        before = threading.stack_size(size)
        try:
            yield
        finally:
            threading.stack_size(before)


def _note_stack() -> None:
    _THREAD.stack = COMPILER_STACK


_NAMES = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "list of strings",
    "grammar": "grammar",
    "tools": "grammar of calls",
}


def _text(spec: GrammarSpec) -> str:
    """llguidance's own form of it."""
    if not spec.lead:
        return _alone(spec)
    if spec.kind == "json_schema":  # as it came: the text may be nested too deeply for Python's reader
        answer = f'"json_schema": {spec.text}'
    else:
        text = _alone(spec)
        lark = json.loads(text)["grammars"][0]["lark_grammar"] if spec.kind == "regex" else text
        answer = f'"lark_grammar": {json.dumps(lark)}'
    return f'{{"grammars": [{{"lark_grammar": {json.dumps(spec.lead)}}}, {{"name": "answer", {answer}}}]}}'


def _alone(spec: GrammarSpec) -> str:
    """The same of what it is without a lead."""
    from llguidance import LLMatcher, grammar_from

    if spec.kind == "choice":
        strings: Any = json.loads(spec.text)
        if not isinstance(strings, list) or not strings or not all(isinstance(x, str) and x for x in strings):
            raise ValueError("one string is needed at least, and none may be empty")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(x) for x in strings))
    if spec.kind == "tools":
        return LLMatcher.grammar_from_lark(spec.text)
    return grammar_from(spec.kind, spec.text)
