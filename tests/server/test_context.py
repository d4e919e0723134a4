"""What the routes share."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from engine.text import TextProcessor
from tests.server.conftest import MODEL, RunningServer


@pytest.mark.parametrize(
    ("path", "method"), [("chat/completions", "render_chat"), ("completions", "encode_checked")]
)
def test_only_prompts_of_large_bodies_are_encoded_in_a_thread(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, method: str
) -> None:
    encode, threads = getattr(TextProcessor, method), []

    def noted(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return encode(*args, **options)

    monkeypatch.setattr(TextProcessor, method, noted)
    prompt: Any = "hi" if path == "completions" else [{"role": "user", "content": "hi"}]
    body = {"model": MODEL, "max_tokens": 1, "prompt" if path == "completions" else "messages": prompt}
    for spaces in (0, 5000):
        content = json.dumps(body) + " " * spaces
        answer = hello.http.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        first = threads[0]  # the fake engine encodes its reply afterwards
        assert first.startswith("text_") is bool(spaces)
        threads.clear()
