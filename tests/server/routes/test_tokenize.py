"""POST /tokenize."""

from __future__ import annotations

from tests.server.conftest import MODEL, TEXT, RunningServer, ids


def test_prompt(hello: RunningServer) -> None:
    body = hello.http.post("/tokenize", json={"prompt": "a é"}).json()
    assert body == {"tokens": ids("a é"), "count": 4, "max_model_len": 4096, "token_strs": None}
    assert hello.http.post("/tokenize", json={"prompt": ""}).json()["count"] == 0


def test_messages_as_a_completion_sees_them(hello: RunningServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = hello.http.post("/tokenize", json={"model": MODEL, "messages": messages}).json()
    assert body["tokens"] == TEXT.encode_chat(messages)
    hello.chat(messages=messages)
    assert tuple(body["tokens"]) == hello.engine.submitted[-1].prompt_token_ids
    bare = hello.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert bare["tokens"] == TEXT.encode_chat(messages, add_generation_prompt=False)
    assert bare["count"] < body["count"]


def test_token_strings(hello: RunningServer) -> None:
    body = hello.http.post("/tokenize", json={"prompt": "a b", "return_token_strs": True}).json()
    assert body["token_strs"] == ["a", "Ġ", "b"]


def test_refusals(hello: RunningServer) -> None:
    assert hello.http.post("/tokenize", json={"prompt": "x", "model": "other"}).status_code == 404
    for body in ({}, {"prompt": "x", "nonsense": 1}, {"prompt": 5}, {"messages": []}):
        assert hello.http.post("/tokenize", json=body).status_code == 400
