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


def test_special_tokens_and_the_conversations_end(hello: RunningServer) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I"}]

    def text(**fields: object) -> str:
        tokens = hello.http.post("/tokenize", json={"messages": turns, **fields}).json()["tokens"]
        return str(hello.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])

    opened = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nI"
    assert text(continue_final_message=True) == opened
    assert text(add_generation_prompt=False) == opened + "<|im_end|>\n"
    assert text() == opened + "<|im_end|>\n<|im_start|>assistant\n"
    assert text(add_special_tokens=True) == text()  # this tokenizer adds none


def test_detokenize_is_the_inverse(hello: RunningServer) -> None:
    for prompt in ("", "a é\n", "x<|im_end|>"):
        tokens = hello.http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        body = hello.http.post("/detokenize", json={"tokens": tokens, "model": MODEL}).json()
        assert body == {"prompt": prompt}
    for fields in ({}, {"tokens": [TEXT.vocab_size]}, {"tokens": [-1]}, {"tokens": ["a"]}):
        error = hello.http.post("/detokenize", json=fields).json()["error"]
        assert error["param"].startswith("tokens")
    assert hello.http.post("/detokenize", json={"tokens": [], "model": "x"}).status_code == 404


def test_refusals(hello: RunningServer) -> None:
    assert hello.http.post("/tokenize", json={"prompt": "x", "model": "other"}).status_code == 404
    for body in (
        {},
        {"prompt": "x", "nonsense": 1},
        {"prompt": 5},
        {"messages": []},
        {"prompt": "x", "continue_final_message": False},
        {"prompt": "x", "reasoning_effort": "none"},
        {"prompt": "x", "messages": [{}]},
    ):
        assert hello.http.post("/tokenize", json=body).status_code == 400
