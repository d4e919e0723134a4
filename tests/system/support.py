"""Real programs for system tests: replicas with the real model, nginx and Prometheus as they are deployed.

Each is started in a folder of its own, on ports of 127.0.0.1, and stopped with the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import openai
import yaml

from benchmarks.common import free_port, thread_environment

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
MODEL = "smollm2-135m"
START_S = 600.0
"""Longest wait for a replica, on two cores that have other work too."""

PROMPTS = (
    "Write a short poem about rivers.",
    "List ten animals and repeat the list twice.",
    "Explain how a bicycle works.",
    "Count from one to forty in words.",
)


def program(name: str, package: str) -> str:
    """Where a program of the distribution is. Its absence is an error, not a reason to skip."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise RuntimeError(
            f"{name} is missing; `make test-system` installs it, or: apt-get install {package}"
        )
    return found


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.05)


class Process:
    """A child process that logs into a file."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, **env: str) -> None:
        self.name = name
        self.command = list(command)
        self.log = folder / f"{name}.log"
        self._env = {**os.environ, **env}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        if self.running:
            self.signal(signal.SIGTERM)
            try:
                self.wait(20)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.wait(10)

    def wait_answering(self, url: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not answers(url):
            if not self.running or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"{self.name} does not answer {url}; its log ends:\n{tail}")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


class Replica(Process):
    """`medusa-serve serve` with one thread on a port of its own, which it keeps over restarts."""

    def __init__(
        self, name: str, folder: Path, *options: str, drain_s: float = 60.0, faults: str = ""
    ) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        command = [sys.executable, "-m", "server.cli", "serve", MODEL, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--drain-timeout", str(drain_s), *options]
        environment = {"MEDUSA_LOG_FORMAT": "json", "MEDUSA_FAULTS": faults, **thread_environment(1)}
        super().__init__(name, command, folder, **environment)

    def wait_ready(self) -> None:
        self.wait_answering(f"{self.url}/ready", START_S)

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


class Nginx(Process):
    """nginx with the template that compose.yaml uses; only addresses and the port differ."""

    def __init__(self, folder: Path, replicas: Sequence[Replica]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        compose = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
        values = dict(compose["services"]["nginx"]["environment"])
        servers = " ".join(f"server {replica.address} max_fails=0;" for replica in replicas)
        values |= {"NGINX_UPSTREAMS": servers, "NGINX_PORT": f"127.0.0.1:{self.port}"}
        text = (DOCKER / "nginx" / "nginx.conf.template").read_text(encoding="utf-8")
        for name, value in values.items():
            text = text.replace(f"${{{name}}}", value)
        # Its own folder instead of the container's /tmp and standard output.
        self.access_log = folder / "access.log"
        text = text.replace("/tmp/", f"{folder}/").replace("/dev/stdout", str(self.access_log))
        config = folder / "nginx.conf"
        config.write_text(text)
        # Started by root, its workers would be nobody, who may not write into the folder.
        options = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
        command = [program("nginx", "nginx-light"), "-c", str(config), "-g", options]
        super().__init__("nginx", command, folder)

    def start(self) -> None:
        super().start()
        self.wait_answering(f"{self.url}/nginx-health", 10)

    def log_lines(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.access_log.read_text().splitlines()]

    def times(self) -> dict[str, float]:
        """Seconds from each request's first byte to its answer's last, by id; the later one's of two."""
        return {line["request_id"]: float(line["e2e_s"]) for line in self.log_lines()}

    def line_of(self, request_id: str) -> dict[str, str]:
        """A request's one line, which may be written a moment after the client has its last byte."""

        def lines() -> list[dict[str, str]]:
            return [line for line in self.log_lines() if line["request_id"] == request_id]

        wait_until(lines, 5, f"nginx logs {request_id}")
        (line,) = lines()
        return line

    def replica_of(self, request_id: str) -> str:
        """The address that answered a request last."""
        return self.line_of(request_id)["replica"].split(", ")[-1]


STREAM = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Count from one to twenty in words."}],
    "max_tokens": 40,
    "ignore_eos": True,
    "stream": True,
}


def pieces(url: str, request_id: str) -> tuple[str, int]:
    """The id in a stream's answer, and in how many pieces it came: one a step, unless something buffers."""
    headers = {"X-Request-Id": request_id}
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=STREAM, headers=headers, timeout=120, trust_env=False
    ) as answer:
        assert answer.status_code == 200
        return answer.headers["x-request-id"], sum(1 for _ in answer.iter_raw())


@dataclass
class Outcome:
    """One streamed request, as its client saw it. Times are `time.monotonic()`."""

    request_id: str
    prompt: str
    started: float
    first_token: float | None = None
    ended: float = 0.0
    tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    status: int | None = None
    retry_after: str | None = None

    @property
    def whole(self) -> bool:
        return self.error is None and self.finish_reason is not None and self.tokens > 0


_TICK_S = 0.005


@dataclass
class Load:
    """Clients that stream one request after the other through the official client, which never retries.

    Args:
        url: the server's, without `/v1`.
        clients: how many stream at a time.
        max_tokens: of each answer; EOS is ignored, so that each has exactly so many.
        pauses: when the clients' own event loop was late for a callback, from when it was due until it came.
    """

    url: str
    clients: int
    max_tokens: int = 32
    outcomes: list[Outcome] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set and each client's last answer has ended."""
        async with (
            httpx.AsyncClient(
                trust_env=False, timeout=120.0, limits=httpx.Limits(max_connections=None)
            ) as http,
            openai.AsyncOpenAI(
                base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            watch = asyncio.create_task(self._watch())
            clients = [group.create_task(self._client(client, n, stop)) for n in range(self.clients)]
            try:
                await asyncio.wait(clients)
            finally:
                watch.cancel()

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.pauses.append((due, time.monotonic()))

    def waited_for_itself(self, outcome: Outcome) -> float:
        """Seconds of a request in which its client's event loop was busy with others."""
        first = bisect_left(self.pauses, outcome.started, key=itemgetter(1))
        last = bisect_left(self.pauses, outcome.ended, key=itemgetter(0))
        return sum(min(b, outcome.ended) - max(a, outcome.started) for a, b in self.pauses[first:last])

    async def _client(self, client: openai.AsyncOpenAI, number: int, stop: asyncio.Event) -> None:
        turn = 0
        while not stop.is_set():
            prompt = PROMPTS[(number + turn) % len(PROMPTS)]
            outcome = Outcome(f"client-{number}-{turn}", prompt, time.monotonic())
            self.outcomes.append(outcome)
            await self._stream(client, outcome)
            outcome.ended = time.monotonic()
            turn += 1
            if outcome.status == 503:
                await asyncio.sleep(float(outcome.retry_after or 0))

    async def _stream(self, client: openai.AsyncOpenAI, outcome: Outcome) -> None:
        extra: dict[str, Any] = {"ignore_eos": True}
        try:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": outcome.prompt}],
                max_tokens=self.max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
                extra_headers={"X-Request-Id": outcome.request_id},
            )
            async for chunk in stream:
                if chunk.usage is not None:
                    outcome.tokens = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    outcome.text += choice.delta.content or ""
                    if outcome.text and outcome.first_token is None:
                        outcome.first_token = time.monotonic()
                    outcome.finish_reason = choice.finish_reason or outcome.finish_reason
            if outcome.tokens != self.max_tokens:
                outcome.error = f"{outcome.tokens} of {self.max_tokens} tokens"
        except openai.APIStatusError as error:
            outcome.error, outcome.status = str(error), error.status_code
            outcome.retry_after = error.response.headers.get("retry-after")
        except (openai.APIError, httpx.HTTPError) as error:
            outcome.error = f"{type(error).__name__}: {error}"


@contextlib.asynccontextmanager
async def running(load: Load) -> AsyncIterator[Load]:
    """The load while the block runs, and then to the end of what is under way."""
    stop = asyncio.Event()
    task = asyncio.create_task(load.run(stop))
    try:
        yield load
    finally:
        stop.set()
        await task


async def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """As `wait_until`, while the event loop goes on."""
    await asyncio.to_thread(wait_until, condition, timeout_s, what)
