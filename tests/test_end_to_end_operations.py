"""The real engine, on a tiny model, in a real server process: drain, second signal, stuck step.

`tests/server` shows the same, and the rest of the operations, on `FakeEngine`. Here a step is torch in the
engine's own thread; faults on purpose make it as slow as a large model's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.common import Server
from engine.faults import ENVIRONMENT
from tests.server.conftest import wait_until as wait_for
from tests.support import save_model, save_random_heads, tiny_llama

MODEL = "tiny"
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
SLOW = ",".join(f"decode=hang:0.02@{step}" for step in range(31, 3000))
"""Decode steps take 20 ms more, but for the first thirty."""

SOON_S = 30.0
"""Enough for what takes a second or two, on a crowded machine; less than the drains and hangs here."""

AT_ONCE_S = 6.0
"""From a second signal to the end; two seconds on an idle machine, one for the step, one for connections."""

LONG = 3000
"""Tokens that take the better part of a minute then."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(tiny_llama(max_position_embeddings=4096), folder)
    save_random_heads(folder / "heads.safetensors", hidden=32, vocab=61)
    return folder


@contextmanager
def serving(model: Path, faults: str, *options: str) -> Iterator[tuple[Server, openai.OpenAI]]:
    """A server whose trees have eight nodes, under these faults, and a client that does not try again."""
    names = [str(model), "--served-model-name", MODEL, "--chat-template", TEMPLATE]
    tree = ["--heads", str(model / "heads.safetensors"), "--tree", "8", "--lookup", "off"]
    sizes = ["--kv-cache-tokens", "20000", "--max-num-seqs", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, faults)
        made = Server([*names, *tree, *sizes, *options], threads=1)
    with (
        made as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=60) as client,
    ):
        yield server, client


def ask(client: openai.OpenAI, count: int, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": "t5 t9 t2 t44"}]
    return client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=count, **options
    )


def streamed(client: openai.OpenAI, count: int) -> Iterator[str]:
    """The pieces of an answer's text, the first of them taken already, so that it is under way."""
    pieces = (chunk.choices[0].delta.content or "" for chunk in ask(client, count, stream=True))
    first = next(piece for piece in pieces if piece)

    def rest() -> Iterator[str]:
        yield first
        yield from pieces

    return rest()


def wait_until(condition: Callable[[], object]) -> None:
    wait_for(condition, SOON_S)


def page(server: Server, path: str) -> httpx.Response:
    # Without certificates, which take 30 ms to read at each of many polls.
    return httpx.get(f"{server.url}/{path}", verify=False)


def status(server: Server, path: str) -> int:
    return page(server, path).status_code


def refused(client: openai.OpenAI) -> openai.InternalServerError:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, 4)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    return caught.value


def test_what_outlasts_the_drain_is_told_streamed_or_not(model: Path) -> None:
    with (
        serving(model, SLOW, "--drain-timeout", "1") as (server, client),
        ThreadPoolExecutor(1) as pool,
    ):
        pieces = streamed(client, LONG)
        other = pool.submit(ask, client, LONG)
        wait_until(
            lambda: "medusa_num_requests_running 2.0" in httpx.get(f"{server.url}/metrics", verify=False).text
        )
        server.send_signal(signal.SIGTERM)
        started = time.monotonic()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(pieces)
        with pytest.raises(openai.InternalServerError) as caught:
            other.result(SOON_S)
        assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
        assert server.wait(SOON_S) == 0
        assert 1.0 <= time.monotonic() - started < SOON_S
        assert "Traceback" not in server.log_tail(1000)


def test_a_stuck_step_is_told_and_goes_on_and_sigterm_lets_what_runs_finish_whole(model: Path) -> None:
    faults = f"decode=hang:4@30,{SLOW}"
    with serving(model, faults, "--step-timeout", "1", "--drain-timeout", "60") as (server, client):
        pieces = streamed(client, 60)
        wait_until(lambda: status(server, "health") == status(server, "ready") == 503)
        assert "in one step" in refused(client).message
        text = "".join(pieces)
        assert len(text.split()) == 60
        wait_until(lambda: status(server, "health") == status(server, "ready") == 200)
        assert ask(client, 60).choices[0].message.content == text
        log = server.log_tail(1000)
        assert "step_stuck" in log
        assert "faults.py" in log  # the stack shows where
        # The watchdog looks every now and then, so it may come after the health of the next request.
        wait_until(lambda: "step_ended_after_all" in server.log_tail(1000))

        pieces = streamed(client, 60)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: status(server, "ready") == 503)
        assert status(server, "health") == 200
        assert refused(client).code == "shutting_down"
        assert "".join(pieces) == text
        assert server.wait(SOON_S) == 0
        assert "Traceback" not in server.log_tail(1000)


def test_signals_end_a_server_whose_step_is_stuck(model: Path) -> None:
    with serving(model, "decode=hang:600@30", "--step-timeout", "1", "--drain-timeout", "60") as (
        server,
        client,
    ):
        pieces = streamed(client, 100)
        wait_until(lambda: status(server, "health") == 503)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: page(server, "ready").json() == {"status": "draining"})
        server.send_signal(signal.SIGTERM)
        started = time.monotonic()
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(pieces)
        assert server.wait(SOON_S) == 1
        assert time.monotonic() - started < AT_ONCE_S
