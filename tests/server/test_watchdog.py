"""A step that does not end turns /health and /ready to 503, for as long as it lasts."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from engine.fake import FakeEngine
from tests.server.conftest import MODEL, TEXT, RunningServer, Serve, says, wait_until


def states(server: RunningServer) -> tuple[int, int]:
    return server.http.get("/health").status_code, server.http.get("/ready").status_code


def test_a_stuck_step_is_told_to_probes_clients_metrics_and_the_log(serve: Serve, log_lines: Any) -> None:
    engine = FakeEngine(says("hi"), vocab_size=TEXT.vocab_size)
    server = serve(engine, step_timeout=0.2)
    assert states(server) == (200, 200)
    engine.stats.step_started = time.monotonic()  # as the engine's loop does before a step
    assert states(server) == (200, 200)
    wait_until(lambda: states(server) == (503, 503))
    assert server.http.get("/health").json() == {"status": "stuck"}
    with pytest.raises(openai.InternalServerError) as refused:
        server.openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert refused.value.status_code == 503
    assert "in one step" in refused.value.message
    assert refused.value.response.headers["retry-after"] == "1"
    metrics = server.metrics()
    assert (metrics["medusa_healthy"], metrics["medusa_ready"]) == (0, 0)
    assert metrics["medusa_step_age_seconds"] > 0.2
    wait_until(lambda: any(line["event"] == "step_stuck" for line in log_lines()))

    engine.stats.step_started = 0.0
    assert states(server) == (200, 200)
    assert server.chat().status_code == 200
    wait_until(lambda: any(line["event"] == "step_ended_after_all" for line in log_lines()))
    assert sum(line["event"] == "step_stuck" for line in log_lines()) == 1


@pytest.mark.parametrize("limit", [0.0, 60.0])
def test_a_long_step_within_the_limit_is_none(serve: Serve, limit: float) -> None:
    engine = FakeEngine(says("hi"), vocab_size=TEXT.vocab_size)
    server = serve(engine, step_timeout=limit)
    engine.stats.step_started = time.monotonic() - 50
    assert states(server) == (200, 200)
    assert server.chat().status_code == 200
