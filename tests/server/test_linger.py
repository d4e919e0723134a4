"""Connections that an answer closes while the request's body is still coming."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.server.conftest import Serve, says, wait_until
from tests.server.test_protocol import connection, post, refusal, rest


@pytest.mark.parametrize("refused", [b"", b"Content-Encoding: gzip\r\n"])
def test_who_sends_it_all_before_reading_is_told_too(serve: Serve, refused: bytes, log_lines: Any) -> None:
    """More than sockets hold: closed with a part of it unread, the connection would take the answer away."""
    server = serve(says("hi"), max_body_bytes=10_000)
    head, _, body = post(b"x" * (24 * 2**20)).partition(b"\r\n\r\n")
    with connection(server) as raw:
        raw.sendall(b"%b\r\n%b\r\n%b" % (head, refused, body))
        status, _ = refusal(rest(raw))
    assert status == (415 if refused else 413)
    wait_until(lambda: [line["status"] for line in log_lines() if line["event"] == "request"] == [status])
    server.openai.models.list()  # by when uvicorn has said what it may have to say of the answer's end
    assert not [line for line in log_lines() if line["level"] == "error"]


def test_who_goes_on_for_too_long_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.protocol.LINGER_S", 0.3)
    with connection(serve(says("hi"), max_body_bytes=10_000)) as raw:
        raw.sendall(post(b"x", length=2**40))
        assert refusal(rest(raw)) == (413, "content_too_large")
        began = time.monotonic()
        try:
            while time.monotonic() < began + 5.0:
                raw.send(b"x" * 1000)
                time.sleep(0.01)
        except OSError:
            assert 0.1 < time.monotonic() - began < 3.0
        else:
            raise AssertionError("it may go on for ever")


def test_who_sends_too_much_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.protocol.LINGER_BYTES", 10**6)
    server = serve(says("hi"), max_body_bytes=10_000)
    with connection(server) as raw, pytest.raises(ConnectionError):
        raw.sendall(post(b"x" * (24 * 2**20)))
