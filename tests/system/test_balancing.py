"""Two real replicas behind the real nginx: drain, restart and death under load; what nginx says by itself."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.support import Load, Nginx, Replica, pieces, running, until

AT_ONCE_S = 1.0
CLIENTS = 8

Pair = tuple[Replica, Replica]


def served_by(nginx: Nginx, load: Load) -> set[str]:
    return {nginx.replica_of(outcome.request_id) for outcome in load.outcomes}


def test_a_drained_and_restarted_replica_costs_no_client_anything(
    replicas: Pair, nginx: Nginx, seconds: float
) -> None:
    first, second = replicas

    async def scenario() -> Load:
        async with running(Load(nginx.url, CLIENTS)) as load:
            await asyncio.sleep(seconds / 2)
            first.signal(signal.SIGTERM)
            assert await asyncio.to_thread(first.wait, 90) in (0, -signal.SIGTERM)
            first.start()
            await asyncio.to_thread(first.wait_ready)
            back = len(load.outcomes)
            await asyncio.sleep(seconds / 2)
            await until(lambda: len(load.outcomes) > back + CLIENTS, 60, "requests after the restart")
            later = load.outcomes[back:]
        # Perhaps all of them: the other one still has the streams of before.
        assert first.address in {nginx.replica_of(outcome.request_id) for outcome in later}
        return load

    load = asyncio.run(scenario())
    assert [outcome for outcome in load.outcomes if not outcome.whole] == []
    assert len(load.outcomes) > CLIENTS
    assert served_by(nginx, load) == {first.address, second.address}
    assert {line["status"] for line in nginx.log_lines() if line["method"] == "POST"} == {"200"}


def test_a_killed_replica_fails_its_own_streams_at_once_and_no_new_request(
    replicas: Pair, nginx: Nginx, seconds: float
) -> None:
    first, second = replicas
    killed = 0.0

    async def scenario() -> Load:
        nonlocal killed
        async with running(Load(nginx.url, CLIENTS, max_tokens=64)) as load:

            def streaming() -> bool:
                begun = [o for o in load.outcomes if o.first_token is not None and not o.ended]
                return len(begun) == CLIENTS

            await asyncio.sleep(seconds / 4)
            await until(streaming, 60, "every client streams")
            first.signal(signal.SIGKILL)
            killed = time.monotonic()
            await asyncio.to_thread(first.wait, 5)
            await asyncio.sleep(seconds / 2)
        return load

    load = asyncio.run(scenario())
    try:
        failed = [outcome for outcome in load.outcomes if not outcome.whole]
        assert failed, "nothing ran on the replica that was killed"
        assert len(failed) < CLIENTS, "the other replica's streams failed too"
        for outcome in failed:
            assert outcome.started < killed
            assert outcome.first_token is not None
            assert outcome.ended - killed < AT_ONCE_S
            assert nginx.replica_of(outcome.request_id) == first.address
        new = [outcome for outcome in load.outcomes if outcome.started > killed]
        assert new
        assert all(outcome.whole for outcome in new)
        assert {nginx.replica_of(outcome.request_id) for outcome in new} == {second.address}
    finally:
        first.start()
        first.wait_ready()


def test_a_stream_comes_token_by_token_and_carries_the_clients_id(nginx: Nginx) -> None:
    echoed, count = pieces(nginx.url, "one-of-ours")
    assert echoed == "one-of-ours"
    assert count > 5
    assert nginx.line_of("one-of-ours")["status"] == "200"
    made = httpx.get(f"{nginx.url}/v1/models", trust_env=False).headers["x-request-id"]
    assert len(made) == 32
    assert nginx.line_of(made)["path"] == "/v1/models"


def test_nginx_keeps_metrics_inside_and_refuses_large_bodies_in_openais_form(nginx: Nginx) -> None:
    with httpx.Client(base_url=nginx.url, trust_env=False, timeout=30) as client:
        inside = client.get("/metrics")
        assert inside.status_code == 404
        assert inside.json()["error"]["type"] == "invalid_request_error"
        large = client.post("/v1/chat/completions", content=b"x" * (6 * 2**20))
        assert large.status_code == 413
        assert "too large" in large.json()["error"]["message"]
        between = client.post("/v1/chat/completions", content=b"x" * (4 * 2**20 + 2**19))
        assert between.status_code == 413  # the server's own limit, in its own words
        assert str(4 * 2**20) in between.json()["error"]["message"]


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Nginx]:
    """nginx with replicas that do not run."""
    gone = [Replica(f"gone-{i}", tmp_path) for i in range(2)]
    with Nginx(tmp_path, gone) as balancer:
        yield balancer


def test_with_no_replica_nginx_answers_503_with_retry_after(nowhere: Nginx) -> None:
    answer = httpx.post(f"{nowhere.url}/v1/chat/completions", json={}, trust_env=False)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["type"] == "server_error"
    tried = nowhere.line_of(answer.headers["x-request-id"])["replica"]
    assert len(tried.split(", ")) == 2  # both
