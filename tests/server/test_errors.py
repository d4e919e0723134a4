"""Every error has OpenAI's body, a fitting status, and the field to blame."""

from __future__ import annotations

import gzip
import json
from typing import Any

import openai
import pytest

from engine.fake import FakeEngine
from server.errors import field_path
from tests.server.conftest import MODEL, TEXT, RunningServer, Serve, chat_body, says


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error object, once its form is checked."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert response.headers["x-request-id"]
    return error


def test_field_path() -> None:
    assert field_path(["messages", 0, "content", 1, "type"]) == "messages[0].content[1].type"
    assert field_path(["n"]) == "n"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"functions": [{}]}, "functions"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"stop": ""}, "stop[0]"),
        ({"model": 5}, "model"),
    ],
)
def test_bad_request_names_its_field(
    hello: RunningServer, fields: dict[str, Any], param: str, stream: bool
) -> None:
    error = error_of(hello.chat(stream=stream, **fields), 400)
    assert error["param"] == param
    assert param.split("[")[0] in error["message"] or "Unicode" in error["message"]


def test_missing_field(hello: RunningServer) -> None:
    error = error_of(hello.http.post("/v1/chat/completions", json={"model": MODEL}), 400)
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


def test_unknown_model(hello: RunningServer) -> None:
    error = error_of(hello.chat(model="gpt-9"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-9" in error["message"]
    with pytest.raises(openai.NotFoundError):
        hello.openai.models.retrieve("gpt-9")


def test_context_length(serve: Serve) -> None:
    server = serve(FakeEngine(says("x"), max_model_len=30, vocab_size=TEXT.vocab_size))
    for body in ({"messages": [{"role": "user", "content": "y" * 40}]}, {"max_tokens": 20}):
        for stream in (True, False):
            error = error_of(server.chat(stream=stream, **body), 400)
            assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
            assert "30" in error["message"]
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "y" * 40}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"{", "invalid_json", "at character 1"),
        (b"", "invalid_type", "object"),
        (b'{"model": NaN', "invalid_json", "at character"),
        (b'{"model": "\xff"}', "invalid_json", "UTF-8"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "invalid_json", "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json", "a number is too long"),
    ],
    ids=["cut", "empty", "cut-nan", "latin-1", "deep", "long-number"],
)
def test_invalid_json(hello: RunningServer, body: bytes, code: str, says: str) -> None:
    response = hello.http.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    error = error_of(response, 400)
    assert error["code"] == code
    assert says in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    "body",
    [gzip.compress(b"{}"), b"x", json.dumps(chat_body()).encode()],
    ids=["compressed", "no-gzip", "plain"],
)
def test_a_compressed_body_is_refused_by_its_encoding(hello: RunningServer, path: str, body: bytes) -> None:
    response = hello.http.post(
        path,
        content=body,
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    error = error_of(response, 415)
    assert "gzip" in error["message"]
    assert error["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content: must be text or a list of parts",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content: must be text or a list of parts",
        ),
        (
            {"messages": [{"role": "user", "content": []}]},
            "messages[0].content: must have at least 1 item, not 0",
        ),
        ({"messages": []}, "messages: must have at least 1 item, not 0"),
        ({"stop": 1}, "stop: must be a string or a list of strings"),
        ({"stop": ["a"] * 17}, "stop: must have at most 16 items, not 17"),
        ({"stop": [""]}, "stop[0]: must have at least 1 character"),
        ({"logit_bias": [1]}, "logit_bias: must be an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is not a token id"),
        ({"medusa": "on"}, "medusa: must be an object"),
        ({"store": True}, "store: must be false"),
    ],
)
def test_messages_speak_of_json(hello: RunningServer, fields: dict[str, Any], message: str) -> None:
    assert error_of(hello.chat(**fields), 400)["message"] == message


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("store", True, "invalid_value"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
        ("chat_template_kwargs", {"unread": 1}, "invalid_value"),
        ("tool_choice", "required", "invalid_value"),
        ("functions", [{}], "unsupported_parameter"),
        ("unknown", 1, "unsupported_parameter"),
    ],
)
def test_what_would_be_ignored_has_the_documented_code(
    hello: RunningServer, field: str, value: object, code: str
) -> None:
    assert error_of(hello.chat(**{field: value}), 400)["code"] == code


@pytest.mark.parametrize(
    ("fields", "instead"),
    [
        ({"functions": [{}]}, "functions is not supported: leave it out, or send null or []"),
        (
            {"function_call": {"name": "f"}},
            'function_call is not supported: leave it out, or send null or "none" or "auto"',
        ),
        (
            {"messages": [{"role": "user", "content": "a", "audio": {"id": "b"}}]},
            "messages[0].audio is not supported: leave it out, or send null",
        ),
    ],
)
def test_what_passes_in_an_unsupported_fields_place_is_said(
    hello: RunningServer, fields: dict[str, Any], instead: str
) -> None:
    assert error_of(hello.chat(**fields), 400)["message"] == instead


@pytest.mark.parametrize("body", ["[]", "5", '"x"', "null"])
def test_json_that_is_no_object(hello: RunningServer, body: str) -> None:
    response = hello.http.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert "object" in error_of(response, 400)["message"]


def test_wrong_content_type(hello: RunningServer) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        response = hello.http.post(
            "/v1/chat/completions", content='{"model": "x"}', headers={"Content-Type": content_type}
        )
        assert content_type in error_of(response, 415)["message"]


def test_unknown_path_and_method(hello: RunningServer) -> None:
    assert "/v1/nothing" in error_of(hello.http.get("/v1/nothing"), 404)["message"]
    assert error_of(hello.http.post("/"), 404)["code"] == "unknown_url"
    response = hello.http.get("/v1/chat/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/health", "/docs", "/openapi.json"])
def test_what_is_allowed_works(hello: RunningServer, path: str) -> None:
    """HEAD wherever GET does."""
    response = hello.http.post(path)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    allowed = response.headers["allow"].split(", ")
    assert sorted(allowed) == ["GET", "HEAD"]
    assert {hello.http.request(method, path).status_code for method in allowed} == {200}


def test_a_surrogate_in_a_message_can_be_told(hello: RunningServer) -> None:
    response = hello.http.post(
        "/v1/chat/completions",
        content='{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        headers={"Content-Type": "application/json"},
    )
    assert "\ud800" in error_of(response, 404)["message"]


def test_body_over_the_limit(serve: Serve) -> None:
    server = serve(says("x"), max_body_bytes=2000)
    assert server.chat().status_code == 200
    error = error_of(server.chat(user="u" * 3000), 413)
    assert "2000" in error["message"]
    body = json.dumps(chat_body())
    headers = {"Content-Type": "application/json"}
    for size, status in ((2000, 200), (2001, 413)):
        padded = (body + " " * (size - len(body))).encode()
        for content in (padded, iter([padded[:1000], padded[1000:]])):  # announced, and in chunks
            answer = server.http.post("/v1/chat/completions", content=content, headers=headers)
            assert answer.status_code == status, (size, type(content))


def test_unforeseen_error_tells_nothing_of_itself(serve: Serve, log_lines: Any) -> None:
    def broken(_request: object, _index: int) -> list[list[int]]:
        raise ZeroDivisionError("a secret")

    server = serve(broken)
    for stream in (True, False):
        response = server.http.post(
            "/v1/chat/completions", json=chat_body(stream=stream), headers={"X-Request-Id": "r1"}
        )
        error = error_of(response, 500)
        assert "secret" not in error["message"]
        assert response.headers["x-request-id"] == "r1"
    logged = [line for line in log_lines() if line["event"] == "request_failed"]
    assert len(logged) == 2
    assert all("ZeroDivisionError" in line["exception"] for line in logged)
    assert [line["status"] for line in log_lines() if line["event"] == "request"] == [500, 500]
