"""Grammars compiled beside an engine's steps: once for all who ask, few kept, none waited for in vain."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import grammar
from engine.grammar import Grammar, GrammarCompiler, GrammarSpec
from engine.grammar_queue import GrammarQueue
from engine.types import FinishReason, Request, SamplingParams, TokenDelta
from engine.worker import EngineWorker
from tests.engine.conftest import TinyModel
from tests.letters import letter_tokenizer
from tests.support import make_engine


class Panic(BaseException):
    """As what a library in Rust raises."""


class Slow(GrammarCompiler):
    """Compiles when it may, and counts."""

    def __init__(self) -> None:
        super().__init__(letter_tokenizer("abcd"), ())
        self.may, self.compiled = threading.Event(), 0

    def compile(self, spec: GrammarSpec, *, param: str | None = None) -> Grammar:
        self.compiled += 1
        assert self.may.wait(10)
        if spec.text == "panic":
            raise Panic
        return super().compile(spec, param=param)


class Served:
    """A queue before an engine that runs."""

    def __init__(self, folder: Path) -> None:
        self.ended: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        self.worker = EngineWorker(make_engine(folder, tree="off"), self._report)
        self.compiler = Slow()
        self.queue = GrammarQueue(self.compiler, self.worker)
        self.thread = threading.Thread(target=self.worker.serve, daemon=True)
        self.thread.start()

    def add(self, request_id: str, pattern: str) -> None:
        request = Request(request_id, (1,), SamplingParams(temperature=0, max_tokens=9))
        self.queue.add(request, GrammarSpec("regex", pattern))

    def end(self) -> TokenDelta:
        """The next last delta."""
        return self.ended.get(timeout=10)

    def _report(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            if delta.finish_reason is not None:
                self.ended.put(delta)


@pytest.fixture
def served(tiny: TinyModel) -> Iterator[Served]:
    made = Served(tiny.folder)
    yield made
    made.worker.put(None)
    made.thread.join(10)
    assert not made.thread.is_alive()


def test_a_grammar_that_many_ask_for_at_once_is_compiled_once(served: Served) -> None:
    for i in range(8):
        served.add(f"r{i}", "d")
    served.queue.abort("r5", None)
    served.compiler.may.set()
    ends = {(delta := served.end()).request_id: delta.finish_reason for _ in range(8)}
    assert ends.pop("r5") is FinishReason.ABORT
    assert set(ends.values()) == {FinishReason.STOP}
    assert len(ends) == 7
    served.add("late", "d")
    assert served.end().finish_reason is FinishReason.STOP
    assert served.compiler.compiled == 1


def test_a_grammar_that_cannot_be_compiled_ends_its_requests(served: Served) -> None:
    served.add("a", "panic")
    served.add("b", "panic")
    served.compiler.may.set()
    for request_id in ("a", "b"):
        ended = served.end()
        assert (ended.request_id, ended.finish_reason) == (request_id, FinishReason.ERROR)
        assert ended.error == "internal error: Panic"


def test_of_short_grammars_few_are_kept(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT", 2)
    served.compiler.may.set()
    for pattern in ("a", "b", "c"):
        served.add(pattern, pattern)
        served.end()
    assert [spec.text for spec in served.queue._kept._made] == ["b", "c"]
