"""A server process: the line it starts with, and how it stops."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.lifecycle import bind
from tests.server.conftest import MODEL, chat_body

ROOT = Path(__file__).parents[2]
PROCESS = """
import sys, uvicorn
from engine.fake import FakeEngine
from server.app import create_app
from server.lifecycle import Server, bind
from server.logs import configure_logging
from server.settings import load_settings
from tests.server.conftest import MODEL, TEXT, Defaults, ids
drain_s, log_format = float(sys.argv[1]), sys.argv[2]
settings = load_settings(
    {"served_model_name": MODEL, "port": 0, "drain_s": drain_s, "log_format": log_format}
)
configure_logging("info", log_format)
engine = FakeEngine(
    lambda r, i: [ids("x")] * 60, step_s=0.02, draft_tokens=7, lookup=5, quantization="int8",
    vocab_size=TEXT.vocab_size,
)
app = create_app(engine, TEXT, settings, Defaults())
config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
Server(config, engine, settings).run(sockets=[bind("127.0.0.1", 0)])
"""


@contextmanager
def process(
    drain_s: float, log_format: str = "console"
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server process with a fake engine whose answers take 1.2 s; its URL and its lines so far."""
    command = [sys.executable, "-c", PROCESS, str(drain_s), log_format]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        lines: list[str] = []
        try:
            assert running.stderr is not None
            for line in running.stderr:
                lines.append(line)
                if "serving" in line:
                    break
            port = "".join(lines).split("http://127.0.0.1:")[1].split('"')[0].split("/")[0].split()[0]
            rest = threading.Thread(target=lambda: lines.extend(running.stderr or ()))
            rest.start()
            yield running, f"http://127.0.0.1:{port}", lines
            rest.join(10)
        finally:
            running.kill()


def test_start_up_line_and_a_request_to_try() -> None:
    with process(drain_s=0) as (running, url, lines):
        assert httpx.get(url + "/ready").status_code == 200
        running.send_signal(signal.SIGTERM)
        running.wait(10)
    text = "".join(lines)
    settings = ("dtype=float32", "quantization=int8", "heads=4", "tree=8", "lookup=5", "kv_cache_tokens=4096")
    for part in (f"model={MODEL}", *settings, f"address={url}"):
        assert part in lines[0]
    assert f"curl {url}/v1/chat/completions" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("drain_s", "complete"), [(10.0, True), (0.2, False)])
def test_sigterm_drains(drain_s: float, complete: bool) -> None:
    with process(drain_s, "json") as (running, url, lines):
        with httpx.stream("POST", url + "/v1/chat/completions", json=chat_body(stream=True)) as response:
            events = response.iter_lines()
            next(events)
            running.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/ready")
            rest = [line for line in events if line]
        running.wait(10)
    if complete:
        assert rest[-1] == "data: [DONE]"
        assert sum('"content":"x"' in line for line in rest) == 60
    else:
        assert "shutting down" in rest[-1]
    assert "Traceback" not in "".join(lines)


def test_second_signal_does_not_wait() -> None:
    with (
        process(drain_s=30) as (running, url, _),
        httpx.stream("POST", url + "/v1/chat/completions", json=chat_body(stream=True)) as response,
    ):
        next(response.iter_lines())
        running.send_signal(signal.SIGINT)
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        started = time.monotonic()
        running.wait(10)
        assert time.monotonic() - started < 0.8  # the answer alone would have taken longer


def test_bind_takes_names_and_ipv6_and_refuses_a_taken_port() -> None:
    with bind("localhost", 0) as first:
        port = first.getsockname()[1]
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bind("localhost", port)
    if socket.has_ipv6:
        try:
            with bind("::1", 0) as six:
                assert six.family is socket.AF_INET6
        except OSError:
            pytest.skip("no IPv6 here")
    with pytest.raises(OSError, match=r".+"):
        bind("no.such.host.invalid", 0)
