"""A server process: the line it starts with, and how it stops."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from engine.errors import ConfigError
from engine.fake import FakeEngine
from server.app import create_app
from server.lifecycle import Server, bind, check, in_process
from server.settings import Settings, load_settings
from tests.server.conftest import MODEL, TEXT, Defaults, Serve, chat_body, says, wait_until

ROOT = Path(__file__).parents[2]
PROCESS = """
import gc, signal, sys
from engine.fake import FakeEngine
from server.app import create_app
from server.lifecycle import Server, bind
from server.logs import configure_logging
from server.settings import load_settings
from tests.server.conftest import MODEL, TEXT, Defaults, ids
drain_s, log_format, steps = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
settings = load_settings(
    {"served_model_name": MODEL, "port": 0, "drain_timeout": drain_s, "log_format": log_format}
)
configure_logging("info", log_format)
engine = FakeEngine(
    lambda r, i: [ids("x")] * steps, step_s=0.02, draft_tokens=7, lookup=5, quantization="int8",
    vocab_size=TEXT.vocab_size,
)
app = create_app(engine, TEXT, settings, Defaults())
signal.signal(signal.SIGUSR1, lambda *_: engine.die())
server = Server(app, settings)
server.run(sockets=[bind("127.0.0.1", 0)])
print("collected", len(gc.get_objects()), "of", gc.get_freeze_count(), file=sys.stderr)
sys.exit(int(server.engine_died))
"""


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ({}, 0, False),
        ({}, 1, True),
        ({"device": "cpu"}, 1, False),
        ({"device": "cuda:1"}, 0, True),  # whose error is the engine's to tell
        ({"device": "cuda", "engine_process": "off"}, 1, False),
        ({"device": "cpu", "engine_process": "on"}, 0, True),
    ],
)
def test_the_engine_has_a_process_of_its_own_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], gpus: int, expected: bool
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert in_process(load_settings(given)) == expected
    monkeypatch.setattr("server.lifecycle.sys.platform", "win32")
    assert in_process(load_settings(given)) == (given.get("engine_process") == "on")


@contextmanager
def process(
    drain_s: float, log_format: str = "console", steps: int = 60, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server process with a fake engine whose steps take 20 ms; its URL and its lines so far."""
    command = [sys.executable, "-c", PROCESS, str(drain_s), log_format, str(steps)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
    ) as running:
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


def test_start_up_line_a_request_to_try_and_what_the_garbage_collector_sees() -> None:
    """It sees little of what the process began with, once that serves."""
    with process(drain_s=0) as (running, url, lines):
        assert httpx.get(url + "/ready").status_code == 200
        running.send_signal(signal.SIGTERM)
        running.wait(10)
    text = "".join(lines)
    settings = ("dtype=float32", "quantization=int8", "heads=4", "tree=8", "lookup=5", "kv_cache_tokens=4096")
    for part in (f"model={MODEL}", *settings, f"address={url}"):
        assert part in lines[0]
    assert f"curl {url}/v1/chat/completions" in text
    assert "Authorization" not in text
    assert "Traceback" not in text
    _, seen, _, frozen = next(line.split() for line in lines if line.startswith("collected"))
    assert int(seen) < 0.2 * int(frozen)


def test_the_request_to_try_has_a_place_for_the_key_where_one_is_needed() -> None:
    with process(drain_s=0, MEDUSA_API_KEY="sk-secret") as (running, url, lines):
        assert httpx.get(url + "/v1/models").status_code == 401
        running.send_signal(signal.SIGTERM)
        running.wait(10)
    text = "".join(lines)
    assert "  -H 'Authorization: Bearer KEY' \\\n  -d '" in text
    assert "sk-secret" not in text


def test_an_engine_that_dies_ends_the_server_with_its_streams_told() -> None:
    with (
        process(30.0, "json", 3000) as (running, url, lines),
        httpx.stream("POST", url + "/v1/chat/completions", json=chat_body(stream=True)) as response,
    ):
        events = response.iter_lines()
        next(events)
        running.send_signal(signal.SIGUSR1)
        assert "died" in [line for line in events if line][-1]
        assert running.wait(10) == 1
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(line["level"], line["event"]) for line in logged[-2:]] == [
        ("error", "engine_died"),
        ("info", "shutting_down"),
    ]
    assert "running" not in logged[-1]  # what ran has been ended


@pytest.mark.parametrize(("drain_s", "steps"), [(30.0, 120), (2.0, 3000)])
def test_sigterm_drains(drain_s: float, steps: int) -> None:
    with (
        process(drain_s, "json", steps) as (running, url, lines),
        httpx.Client(base_url=url) as kept,
        openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client,
    ):
        client.models.list()
        assert kept.get("/ready").status_code == 200
        with httpx.stream("POST", url + "/v1/chat/completions", json=chat_body(stream=True)) as response:
            events = response.iter_lines()
            next(events)
            running.send_signal(signal.SIGTERM)
            # On a connection from before and on a new one; the process may get the signal a moment later.
            wait_until(lambda: kept.get("/ready").status_code == 503)
            assert httpx.get(url + "/ready").json() == {"status": "draining"}
            assert httpx.get(url + "/health").status_code == 200
            with pytest.raises(openai.InternalServerError) as refused:
                client.chat.completions.create(**chat_body())
            assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
            assert refused.value.response.headers["retry-after"] == "1"
            assert refused.value.response.headers["connection"] == "close"
            rest = [line for line in events if line]
        assert running.wait(10) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/ready")
    if steps < 1000:
        assert rest[-1] == "data: [DONE]"
        text = "".join(line.split('"content":"')[1].split('"')[0] for line in rest if '"content":"' in line)
        assert text == "x" * steps  # steps may share an event
    else:
        assert "shutting down" in rest[-1]
    assert "Traceback" not in "".join(lines)


def test_ready_is_503_at_once() -> None:
    """From the signal's handler on, not from the event loop's next turn."""
    engine = FakeEngine(says("x"))
    settings = Settings(served_model_name=MODEL)
    app = create_app(engine, TEXT, settings, Defaults())
    server = Server(app, settings)

    async def main() -> None:
        await engine.start()
        server._loop = asyncio.get_running_loop()
        assert app.state.context.ready
        server.handle_exit(signal.SIGTERM, None)
        assert not app.state.context.ready
        assert not server.should_exit
        await asyncio.sleep(0.1)
        assert server.should_exit  # nothing ran
        assert not server.force_exit

    asyncio.run(main())


def test_second_signal_does_not_wait() -> None:
    """Whichever the two are."""
    with (
        process(drain_s=30, steps=3000) as (running, url, _),
        httpx.stream("POST", url + "/v1/chat/completions", json=chat_body(stream=True)) as response,
    ):
        events = response.iter_lines()
        next(events)
        running.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(url + "/ready", verify=False).status_code == 503)
        running.send_signal(signal.SIGTERM)
        started = time.monotonic()
        last = [line for line in events if line][-1]
        assert running.wait(10) == 1
        assert time.monotonic() - started < 3  # the answer would have taken a minute
    assert "shutting down" in last


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed one for 127.0.0.1, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https(serve: Serve, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    server = serve(says("hi"), ssl_certfile=cert, ssl_keyfile=key)
    url = server.url.replace("http:", "https:")
    with (
        httpx.Client(verify=ssl.create_default_context(cafile=str(cert)), base_url=url) as client,
        client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response,
    ):
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        server.http.get("/health")


@pytest.mark.parametrize("broken", ["absent", "no certificate"])
def test_tls_files_that_do_not_work_are_told_before_anything_is_loaded(tmp_path: Path, broken: str) -> None:
    cert = tmp_path / "cert.pem"
    if broken != "absent":
        cert.write_text("no certificate")
    with pytest.raises(ConfigError, match="cannot use the TLS files"):
        check(Settings(ssl_certfile=cert))
    with pytest.raises(ConfigError, match="ssl_keyfile goes with ssl_certfile"):
        load_settings({"ssl_keyfile": str(cert)})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_what_is_wrong_with_the_tls_files_is_told_by_file(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    cert, key = certificate(tmp_path)
    other = certificate(tmp_path / "other")[1]
    torn, absent = tmp_path / "torn.pem", tmp_path / "absent.pem"
    torn.write_bytes(cert.read_bytes()[:-60])
    for files, fault in (
        ((absent, key), f"ssl_certfile {absent}: No such file"),
        ((cert, absent), f"ssl_keyfile {absent}: No such file"),
        ((cert, tmp_path), f"ssl_keyfile {tmp_path}: Is a directory"),
        ((key, key), f"ssl_certfile {key} holds no certificate in PEM"),
        ((cert, cert), f"ssl_keyfile {cert} holds no private key in PEM"),
        ((cert, None), f"ssl_certfile {cert} holds no private key in PEM; give the file that does as ssl_k"),
        ((cert, other), f"the key in ssl_keyfile {other} is not that of the certificate in ssl_certfile"),
        ((torn, key), f"ssl_certfile {torn}, ssl_keyfile {key}: "),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"cannot use the TLS files: {fault}")):
            check(Settings(ssl_certfile=files[0], ssl_keyfile=files[1]))
    check(Settings(ssl_certfile=cert, ssl_keyfile=key))
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    check(Settings(ssl_certfile=both))


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
