"""Compilation beside the event loop: once for all who ask, kept within bounds, prepared when nobody waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from engine import grammar
from engine.errors import RequestError
from engine.fake import FakeEngine
from engine.grammar import Grammar, GrammarCompiler, GrammarSpec, KeptGrammars
from server import grammars
from server.grammars import Grammars
from server.schemas.structured import JSON_OBJECT
from tests.server.conftest import EOS_ID, TEXT, Serve, chat_body, endless, says, wait_until


class Counting(GrammarCompiler):
    """Notes what it compiles and where, and takes a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(TEXT.tokenizer, [EOS_ID])
        self.seconds = seconds
        self.compiled: list[GrammarSpec] = []
        self.threads: set[str] = set()

    def compile(self, spec: GrammarSpec, *, param: str | None = None) -> Grammar:
        self.compiled.append(spec)
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        return super().compile(spec, param=param)


def regex(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text)


def test_those_who_ask_at_once_wait_for_one_compilation_and_the_loop_goes_on() -> None:
    compiler = Counting(0.2)
    kept = Grammars(compiler)

    async def ask() -> int:
        ticks = 0
        asked = asyncio.gather(*(kept.compiled(regex("a")) for _ in range(20)))
        while not asked.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert len({id(grammar) for grammar in await asked}) == 1
        assert (await kept.compiled(regex("a"))) is (await asked)[0]
        return ticks

    assert asyncio.run(ask()) > 20
    assert compiler.compiled == [regex("a")]
    assert all(name.startswith("grammar") for name in compiler.threads)
    kept.close()


def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    kept = Grammars(Counting(0.1))

    async def ask() -> Grammar:
        first = asyncio.create_task(kept.compiled(regex("a")))
        second = asyncio.create_task(kept.compiled(regex("a")))
        await asyncio.sleep(0.01)
        first.cancel()
        return await second

    assert asyncio.run(ask()).spec == regex("a")
    kept.close()


def test_a_slow_one_does_not_hold_up_the_next() -> None:
    compiler = Counting()
    kept = Grammars(compiler)
    released = threading.Event()
    compile_ = compiler.compile

    def compile(spec: GrammarSpec, **options: Any) -> Grammar:
        if spec == regex("slow"):
            assert released.wait(5)
        return compile_(spec, **options)

    compiler.compile = compile  # type: ignore[method-assign]

    async def ask() -> None:
        slow = asyncio.create_task(kept.compiled(regex("slow")))
        await asyncio.wait_for(kept.compiled(regex("a")), 2)
        assert not slow.done()
        released.set()
        await slow

    asyncio.run(ask())
    kept.close()


def compiled_by(kept: Grammars, compiler: Counting, *specs: GrammarSpec) -> list[GrammarSpec]:
    """What had to be compiled to answer these, in turn."""

    async def ask() -> None:
        for spec in specs:
            await kept.compiled(spec)

    before = len(compiler.compiled)
    asyncio.run(ask())
    return compiler.compiled[before:]


@pytest.mark.parametrize(("bound", "value"), [("MAX_KEPT", 2), ("MAX_KEPT_TEXT", 7)])
def test_the_least_recently_used_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(grammar, bound, value)
    compiler = Counting()
    kept = Grammars(compiler)
    a, b, c = regex("aaa"), regex("bbb"), regex("ccc")
    assert compiled_by(kept, compiler, a, b, a) == [a, b]
    assert compiled_by(kept, compiler, c, a) == [c]  # b was the one to go
    assert compiled_by(kept, compiler, b, b) == [b]
    kept.close()


def test_what_leads_to_an_answer_counts_as_its_grammar_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names every token that is text and not to a grammar, of which some vocabularies have thousands."""
    monkeypatch.setattr(grammar, "MAX_KEPT_TEXT", 8)
    kept: KeptGrammars[str] = KeptGrammars()
    a, b, c = (GrammarSpec("regex", name, "led") for name in "abc")
    for spec in (a, b):
        kept.put(spec, spec.text)
    assert [kept.get(spec) for spec in (a, b)] == ["a", "b"]
    kept.put(c, "c")
    assert [kept.get(spec) for spec in (a, b, c)] == [None, "b", "c"]
    kept.drop(b, "b")
    kept.put(a, "a")
    assert [kept.get(spec) for spec in (a, b, c)] == ["a", None, "c"]


def test_one_that_is_larger_than_all_that_is_kept_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_TEXT", 5)
    compiler = Counting()
    kept = Grammars(compiler)
    large = regex("a" * 9)
    assert compiled_by(kept, compiler, regex("b"), large, large, regex("b")) == [
        regex("b"),
        large,
        regex("b"),
    ]
    kept.close()


def test_what_failed_is_not_kept() -> None:
    compiler = Counting()
    kept = Grammars(compiler)
    for _ in range(2):
        with pytest.raises(RequestError):
            compiled_by(kept, compiler, regex("(a"))
    assert compiler.compiled == [regex("(a")] * 2
    assert kept._kept._characters == 0
    kept.close()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[GrammarSpec]:
    """What any server compiles from now on, which look for idleness often."""
    monkeypatch.setattr(grammars, "IDLE_POLL_S", 0.05)
    seen: list[GrammarSpec] = []
    compile_: Callable[..., Grammar] = GrammarCompiler.compile

    def noted(self: GrammarCompiler, spec: GrammarSpec, **options: Any) -> Grammar:
        seen.append(spec)
        return compile_(self, spec, **options)

    monkeypatch.setattr(GrammarCompiler, "compile", noted)
    return seen


def test_an_idle_server_prepares_itself(serve: Serve, compiled: list[GrammarSpec]) -> None:
    server = serve(says("x"))
    wait_until(lambda: compiled == [JSON_OBJECT])
    assert server.chat(response_format={"type": "json_object"}).status_code == 200
    assert compiled == [JSON_OBJECT]


def test_a_busy_server_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "IDLE_POLL_S", 0.01)
    compiler, looks = Counting(), iter([False, False, True])
    kept = Grammars(compiler)

    def idle() -> bool:
        assert compiler.compiled == []
        return next(looks)

    asyncio.run(kept.prepare(idle, JSON_OBJECT))
    assert compiler.compiled == [JSON_OBJECT]
    assert next(looks, None) is None
    kept.close()


def test_a_server_is_idle_where_nothing_runs_or_waits(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.01, vocab_size=TEXT.vocab_size, max_model_len=10**6)
    server = serve(engine)
    assert server.context.idle
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
        lines = answer.iter_lines()  # which ends the request when nobody holds it
        next(lines)
        wait_until(lambda: not server.context.idle)
    wait_until(lambda: server.context.idle)


def test_a_model_without_grammars_serves_and_says_so(
    serve: Serve, compiled: list[GrammarSpec], monkeypatch: pytest.MonkeyPatch, log_lines: Any
) -> None:
    def unreadable(_self: GrammarCompiler, param: str | None) -> Any:
        raise RequestError("this model's tokenizer cannot be used with a grammar", param=param)

    monkeypatch.setattr(GrammarCompiler, "_tokenizer", unreadable)
    server = serve(says("x"))
    wait_until(lambda: any(line["event"] == "no_grammars" for line in log_lines()))
    assert compiled == [JSON_OBJECT]
    assert server.chat().status_code == 200
    error = server.chat(response_format={"type": "json_object"}).json()["error"]
    assert error["message"].startswith("response_format: this model's tokenizer")
