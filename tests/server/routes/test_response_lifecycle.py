"""How responses end, and where else they are: errors, clients that leave, logs and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import RequestError
from engine.fake import FakeEngine
from tests.server.conftest import MODEL, TEXT, RunningServer, Serve, endless, ids, says, wait_until
from tests.server.routes.test_responses import events, post
from tests.server.test_errors import error_of


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("HEAD", "")],
)
def test_nothing_is_kept(hello: RunningServer, method: str, path: str) -> None:
    answer = hello.http.request(method, f"/v1/responses/resp_1{path}")
    assert answer.status_code == 404
    if method != "HEAD":
        assert error_of(answer, 404)["code"] == "response_not_found"
    assert hello.http.request(method, "/v1/responses").status_code == (405 if method != "POST" else 415)


def test_input_is_counted(hello: RunningServer) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    body: dict[str, Any] = {"input": "hi", "instructions": "Be kind.", "tools": [tool], "tool_choice": "none"}
    counted = hello.openai.responses.input_tokens.count(model=MODEL, **body)
    assert not hello.engine.submitted
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == post(hello, **body).json()["usage"]["input_tokens"]
    assert len(hello.engine.submitted[-1].prompt_token_ids) == counted.input_tokens > len(ids("Be kind.hi"))
    long = hello.openai.responses.input_tokens.count(input="hi " * 3000)  # past the context
    assert long.input_tokens > hello.engine.info.max_model_len


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other", "input": "hi"}, 404, "model"),
        ({"input": "hi", "max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": "hi", "tool_choice": "required"}, 400, "tool_choice"),
        ({"input": "hi", "previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"input": "hi", "temperature": 3}, 400, "temperature"),
    ],
)
def test_what_cannot_be_counted(hello: RunningServer, body: dict[str, Any], status: int, param: str) -> None:
    assert error_of(hello.http.post("/v1/responses/input_tokens", json=body), status)["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_errors_after_the_start(serve: Serve, stream: bool) -> None:
    server = serve(lambda _request, _index: [ids("Hel"), RuntimeError("boom")])
    if not stream:
        answer = post(server)
        assert error_of(answer, 500)["code"] == "step_failed"
        return
    *_, delta, last = events(server)
    assert (delta["delta"], last["type"]) == ("Hel", "response.failed")
    response = last["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Hel"
    assert response["usage"]["output_tokens"] == 3
    kinds = [event.type for event in server.openai.responses.create(model=MODEL, input="hi", stream=True)]
    assert kinds[-1] == "response.failed"


@pytest.mark.parametrize(
    ("error", "code"), [(RequestError("no token is left"), "invalid_prompt"), (None, "server_error")]
)
def test_why_a_stream_failed(serve: Serve, error: Exception | None, code: str) -> None:
    """By the request's own fault, or because it took longer than one may."""
    late = FakeEngine(endless, vocab_size=TEXT.vocab_size, step_s=0.01)
    script: Any = late if error is None else lambda _request, _index: [ids("a"), error]
    last = events(serve(script, request_timeout=0.2))[-1]
    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", code)
    assert ("not done within" if error is None else "no token") in last["response"]["error"]["message"]


def test_an_error_of_the_server_itself_ends_the_stream(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.response_events import ResponseWriter

    server = serve(says("Hello"))

    def end(_self: ResponseWriter, _reason: str) -> bytes:
        raise KeyError("told to nobody")

    monkeypatch.setattr(ResponseWriter, "end", end)
    last = events(server)[-1]
    assert (last["type"], last["code"]) == ("error", "internal_error")
    assert "told" not in last["message"]


def test_a_client_that_leaves_frees_its_slot(serve: Serve) -> None:
    server = serve(FakeEngine(endless, vocab_size=TEXT.vocab_size, step_s=0.002))
    with server.openai.responses.create(model=MODEL, input="hi", stream=True) as stream:
        assert next(iter(stream)).type == "response.created"
        wait_until(lambda: server.engine.stats.running == 1)
    wait_until(lambda: server.engine.stats.running == 0)


def test_the_first_events_come_before_any_token(serve: Serve) -> None:
    """A client sees that its request, which waits for another, has been taken."""
    engine = FakeEngine(endless, vocab_size=TEXT.vocab_size, step_s=0.002, max_num_seqs=1)
    create = serve(engine).openai.responses.create
    with (
        create(model=MODEL, input="hi", stream=True) as running,
        create(model=MODEL, input="hi", stream=True) as waiting,
    ):
        first = iter(running), iter(waiting)
        for events_of in first:
            assert [next(events_of).type for _ in range(2)] == ["response.created", "response.in_progress"]
        assert (engine.stats.running, engine.stats.waiting) == (1, 1)


def test_it_is_counted_as_its_own_endpoint(
    serve: Serve, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    server = serve(says("Hello"))
    answer = server.http.post("/v1/responses", json={"input": "hi"}, headers={"X-Request-Id": 'my "id"'})
    assert answer.headers["X-Request-Id"] == 'my "id"'
    assert answer.json()["id"].startswith('resp_my "id"-')
    server.http.get("/v1/responses/resp_1")
    labels = "[('method', 'POST'), ('path', '/v1/responses'), ('status', '200')]"
    wait_until(lambda: server.metrics().get(f"medusa_http_requests_total{labels}") == 1)
    (line,) = (line for line in log_lines() if line.get("path") == "/v1/responses")
    assert (line["model"], line["completion_tokens"], line["finish_reasons"]) == (MODEL, 6, ["stop"])
