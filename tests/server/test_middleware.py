"""Request ids in and out, and the one log line per request."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.fake import FakeEngine
from tests.server.conftest import MODEL, TEXT, RunningServer, Serve, chat_body, endless, says, wait_until


def test_request_id_is_echoed_and_reaches_the_engine(hello: RunningServer) -> None:
    for stream in (True, False):
        response = hello.http.post(
            "/v1/chat/completions", json=chat_body(stream=stream), headers={"X-Request-Id": "my id/1"}
        )
        assert response.headers["x-request-id"] == "my id/1"
        assert hello.engine.submitted[-1].request_id.startswith("my id/1")


def test_request_id_is_made_where_none_is_given(hello: RunningServer) -> None:
    made = {hello.http.get("/version").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert all(made)


@pytest.mark.parametrize("bad", ["x" * 129, "", "caf\xe9".encode("latin-1"), "tab\there"])
def test_unsafe_request_id_is_replaced(hello: RunningServer, bad: Any) -> None:
    response = hello.http.get("/version", headers=[(b"X-Request-Id", bad)])
    got = response.headers["x-request-id"]
    assert got
    assert len(got) == 32
    assert set(got) <= set("0123456789abcdef")


def test_longest_request_id_is_kept(hello: RunningServer) -> None:
    assert (
        hello.http.get("/version", headers={"X-Request-Id": "x" * 128}).headers["x-request-id"] == "x" * 128
    )


def test_one_id_used_twice_at_once_is_two_requests(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.005, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    headers = {"X-Request-Id": "same"}
    url = server.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=chat_body(stream=True), headers=headers):
        with httpx.stream("POST", url, json=chat_body(stream=True), headers=headers) as second:
            assert second.status_code == 200
            wait_until(lambda: engine.stats.running == 2)
        wait_until(lambda: engine.stats.running == 1)  # its own end does not end the other
    assert len({request.request_id for request in engine.submitted}) == 2


def request_lines(log_lines: Any, count: int) -> list[dict[str, Any]]:
    wait_until(lambda: sum(line["event"] == "request" for line in log_lines()) >= count)
    return [line for line in log_lines() if line["event"] == "request"]


def test_log_line_of_a_completion(serve: Serve, log_lines: Any) -> None:
    script = says("the secret answer", size=4)
    server = serve(FakeEngine(script, step_s=0.002, vocab_size=TEXT.vocab_size))  # times are rounded to 10 µs
    for stream in (True, False):
        server.http.post(
            "/v1/chat/completions",
            json=chat_body(stream=stream, messages=[{"role": "user", "content": "the secret question"}]),
            headers={"X-Request-Id": "r1"},
        )
    for line in request_lines(log_lines, 2):
        assert (line["request_id"], line["model"], line["status"]) == ("r1", MODEL, 200)
        assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions")
        assert line["completion_tokens"] == len("the secret answer") + 1
        assert line["prompt_tokens"] == len(server.engine.submitted[0].prompt_token_ids)
        assert line["finish_reasons"] == ["stop"]
        assert line["acceptance_length"] == pytest.approx(17 / 5, abs=0.001)  # 4 + 4 + 4 + 4 + EOS
        assert 0 < line["ttft_s"] <= line["e2e_s"] < 5
        assert 0 < line["tpot_s"] < 1
    assert "secret" not in str(log_lines())


def test_log_line_of_a_client_that_left(serve: Serve, log_lines: Any) -> None:
    server = serve(FakeEngine(endless, step_s=0.01, vocab_size=TEXT.vocab_size))
    url = server.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=chat_body(stream=True)) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=chat_body(), timeout=0.2)
    lines = request_lines(log_lines, 2)
    assert [line["status"] for line in lines] == [200, 499]
    assert all(line["finish_reasons"] == ["abort"] for line in lines)


def test_refusals_and_plain_requests_are_logged_but_polls_are_not(serve: Serve, log_lines: Any) -> None:
    server = serve(says("x"))
    server.chat(n=0)
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        server.http.get(path)
    lines = request_lines(log_lines, 2)
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/chat/completions", 400),
        ("/v1/models", 200),
    ]


def test_head_is_get_without_its_body(hello: RunningServer) -> None:
    for path, status in (("/health", 200), ("/v1/models", 200), ("/nothing", 404)):
        found, full = hello.http.head(path), hello.http.get(path)
        assert (found.status_code, found.content) == (status, b"")
        assert found.headers["content-length"] == full.headers["content-length"]
    assert hello.http.head("/v1/completions").headers["allow"] == "POST"
    counted = 'medusa_http_requests_total{method="HEAD",path="/health",status="200"} 1.0'
    assert counted in hello.http.get("/metrics").text
