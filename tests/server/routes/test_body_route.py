"""The short way to an endpoint: taken for bodies that are right, and never seen in an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from server.routes import chat, completions
from server.routes.body_route import BodyRoute
from tests.server.conftest import MODEL, RunningServer, chat_body

JSON = "application/json"
GOOD = json.dumps(chat_body())


def route_of(path: str) -> BodyRoute:
    for route in (*chat.router.routes, *completions.router.routes):
        if isinstance(route, BodyRoute) and route.path == path:
            return route
    raise AssertionError(path)


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8", "Application/JSON ;a=b"])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", GOOD), ("/v1/completions", json.dumps({"model": MODEL, "prompt": "hi"}))],
)
def test_a_body_that_is_right_never_meets_fastapi(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, body: str, content_type: str
) -> None:
    async def refuse(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(route_of(path), "app", refuse)
    response = hello.http.post(path, content=body, headers={"Content-Type": content_type})
    assert response.status_code == 200, response.text
    assert "Hello, world!" in response.text


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (JSON, GOOD.encode()),
        (JSON, GOOD.encode("utf-16")),
        ("application/vnd.api+json", GOOD.encode()),
        ("text/plain", GOOD.encode()),
        ("", GOOD.encode()),
        (JSON, b""),
        (JSON, b"null"),
        (JSON, b"[]"),
        (JSON, b'{"model": '),
        (JSON, b'{"model": "\xff"}'),
        (JSON, b"[" * 100_000),
        (JSON, b'{"n": ' + b"1" * 5000 + b"}"),
        (JSON, b"{}"),
        (JSON, json.dumps(chat_body(n="1")).encode()),
        (JSON, json.dumps(chat_body(surprise=1)).encode()),
        (JSON, json.dumps(chat_body(temperature=3)).encode()),
        (JSON, json.dumps(chat_body(messages=[{"role": "user"}])).encode()),
        (JSON, json.dumps(chat_body(model="another")).encode()),
    ],
)
def test_both_ways_answer_alike(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, content_type: str, body: bytes
) -> None:
    def answer() -> tuple[int, Any, Any]:
        response = hello.http.post(
            "/v1/chat/completions", content=body, headers={"Content-Type": content_type, "X-Request-Id": "x"}
        )
        told = response.json()
        for changing in ("id", "created"):
            told.pop(changing, None)
        headers = dict(response.headers)
        del headers["date"]
        return response.status_code, headers, told

    short = answer()
    route = route_of("/v1/chat/completions")
    monkeypatch.setattr(route, "body", lambda _scope, _messages: None)
    assert short == answer()


def test_a_body_in_parts_is_joined(hello: RunningServer) -> None:
    half = len(GOOD) // 2
    for body in (GOOD, GOOD[:-1]):  # the second is left to FastAPI, which reads it anew
        response = hello.http.post(
            "/v1/chat/completions",
            content=iter([body[:half].encode(), body[half:].encode()]),
            headers={"Content-Type": JSON},
        )
        assert response.status_code == (200 if body == GOOD else 400)
    assert "at character" in response.json()["error"]["message"]
