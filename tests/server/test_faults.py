"""Faults on purpose around the engine: a tokenizer that fails, a clock that jumps."""

from __future__ import annotations

import time
from typing import Any

import pytest

from engine import faults
from engine.fake import FakeEngine
from tests.server.conftest import TEXT, Serve, chat_body, says, wait_until


def test_a_tokenizer_that_fails_is_one_requests_500(serve: Serve) -> None:
    engine = FakeEngine(says("x" * 60, size=1), step_s=0.01, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    with (
        faults.injected("encode=raise"),
        server.http.stream("POST", "/v1/chat/completions", json=chat_body()) as failed,
    ):
        failed.read()
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
        assert "fault" not in failed.text  # its text is for the log
        assert server.chat().status_code == 200
    assert len(engine.submitted) == 1
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total


def test_the_text_of_one_stream_that_fails_leaves_the_others(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(says("x" * 60, size=1), step_s=0.01, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    whole = TEXT.detokenizer
    made: list[object] = []

    class Broken:
        def push(self, *_args: object, **_options: object) -> None:
            raise LookupError("no such token")

    def detokenizer(*args: Any, **options: Any) -> object:
        made.append(Broken() if len(made) == 1 else whole(*args, **options))
        return made[-1]

    monkeypatch.setattr(TEXT, "detokenizer", detokenizer)
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as good:
        wait_until(lambda: engine.stats.running == 1)
        assert server.events()[-1]["error"]["code"] == "internal_error"
        lines = [line for line in good.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    wait_until(lambda: engine.stats.running == 0)
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total


@pytest.mark.parametrize("jump_s", [3e8, -3e8])
def test_a_clock_that_jumps_changes_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Deadlines and durations are measured on the monotonic clock; only `created` tells the time of day."""
    engine = FakeEngine(says("x" * 30, size=1), step_s=0.01, vocab_size=TEXT.vocab_size)
    server = serve(engine, request_timeout=10.0, read_timeout=5.0, step_timeout=5.0)
    now = time.time
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        wait_until(lambda: engine.stats.generation_tokens > 5)
        monkeypatch.setattr(time, "time", lambda: now() + jump_s)
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    answer = server.chat()
    assert answer.status_code == 200
    assert abs(answer.json()["created"] - (now() + jump_s)) < 10
    metrics = server.metrics()
    assert 0 < metrics["medusa_e2e_request_latency_seconds_sum"] < 5
    assert 0 <= metrics["medusa_request_queue_time_seconds_sum"] < 5
    assert (metrics["medusa_healthy"], metrics["medusa_ready"]) == (1, 1)
