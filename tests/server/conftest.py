"""A real uvicorn in a thread around a `FakeEngine`, and a byte-level tokenizer that round-trips any text."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from engine.fake import FakeEngine, Reply
from engine.text import TextProcessor
from engine.types import Request
from server.app import create_app
from server.context import ServerContext
from server.lifecycle import bind
from server.logs import configure_logging
from server.protocol import ServerConfig
from server.settings import Settings

MODEL = "fake-model"
EOS = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def make_text() -> TextProcessor:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=EOS, extra_special_tokens=["<|im_start|>"], chat_template=TEMPLATE
    )
    return TextProcessor(tokenizer)


TEXT = make_text()


def ids(text: str) -> list[int]:
    return TEXT.encode(text, add_special_tokens=False)


EOS_ID = ids(EOS)[0]


def steps(text: str, size: int = 3) -> list[list[int]]:
    """The text's tokens as steps: one from prefill, then up to `size` at a time."""
    tokens = ids(text)
    return [tokens[:1], *(tokens[i : i + size] for i in range(1, len(tokens), size))]


def says(text: str, size: int = 3) -> Reply:
    """A script in which every choice says `text` and then ends as a model does."""
    return lambda _request, _index: [*steps(text, size), [EOS_ID]]


def endless(_request: Request, _index: int) -> Iterator[list[int]]:
    """A script that goes on for longer than any test."""
    return iter([ids("x")] * 100_000)


@dataclass(frozen=True)
class Defaults:
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = (EOS_ID,)


class LoopServer(uvicorn.Server):
    """uvicorn that tells which event loop it runs on."""

    loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


class RunningServer:
    """A server in a thread, and clients for it."""

    def __init__(
        self, engine: FakeEngine, defaults: Defaults, options: dict[str, Any], text: TextProcessor = TEXT
    ) -> None:
        self.engine = engine
        settings = Settings(served_model_name=MODEL, **options)
        app = create_app(engine, text, settings, defaults)
        self.context: ServerContext = app.state.context
        self.server = LoopServer(ServerConfig(app, settings))
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        # Without certificates, which are not asked for and take 30 ms to read.
        self.http = httpx.Client(base_url=self.url, timeout=10, verify=False)

    @functools.cached_property
    def openai(self) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(
            base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=10, http_client=http
        )

    def __enter__(self) -> RunningServer:
        self._thread.start()
        wait_until(lambda: self.server.started or not self._thread.is_alive())
        assert self.server.started
        return self

    def __exit__(self, *_: object) -> None:
        if "openai" in vars(self):
            self.openai.close()
        self.http.close()
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def in_loop(self, work: Coroutine[Any, Any, None]) -> None:
        """Run on the server's event loop, where the engine's methods belong."""
        asyncio.run_coroutine_threadsafe(work, self.server.loop).result(5)

    def chat(self, **body: Any) -> httpx.Response:
        """POST a chat completion, `model` and `messages` given unless set."""
        content = json.dumps(chat_body(**body))  # in ASCII, as not every client sends it
        return self.http.post(
            "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )

    def events(self, **body: Any) -> list[Any]:
        """The JSON of each event of a stream, and "[DONE]" as itself."""
        return [data if data == "[DONE]" else json.loads(data) for data in self.event_data(**body)]

    def event_data(self, **body: Any) -> list[str]:
        with self.http.stream(
            "POST", "/v1/chat/completions", json=chat_body(stream=True, **body)
        ) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines)
        return [line.removeprefix("data: ") for line in lines]

    def metrics(self) -> dict[str, float]:
        """Sample name, with its labels if it has any, to value."""
        text = self.http.get("/metrics").text
        return {
            sample.name + ("" if not sample.labels else str(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def chat_body(**body: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body}


def wait_until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Poll until true; fails the test if it does not become so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


Serve = Callable[..., RunningServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that stop with the test: `serve(reply_or_engine, defaults=…, text=…, **settings)`."""
    with contextlib.ExitStack() as stack:

        def start(
            engine: FakeEngine | Reply,
            *,
            defaults: Defaults | None = None,
            text: TextProcessor = TEXT,
            **options: Any,
        ) -> RunningServer:
            if not isinstance(engine, FakeEngine):
                engine = FakeEngine(engine, vocab_size=text.vocab_size, eos_token_ids=(EOS_ID,))
            options = {"drain_timeout": 0.0, **options}
            return stack.enter_context(RunningServer(engine, defaults or Defaults(), options, text))

        yield start


@pytest.fixture(scope="module")
def hello() -> Iterator[RunningServer]:
    """One server for the tests of a module that need no script of their own: it says "Hello, world!"."""
    engine = FakeEngine(says("Hello, world!"), vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,))
    with RunningServer(engine, Defaults(), {"drain_timeout": 0.0}) as server:
        yield server


@contextlib.contextmanager
def logs_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="package", autouse=True)
def _quiet_logs() -> Iterator[None]:
    """Of these tests alone: others, which a process runs after them, look for warnings."""
    with logs_as_before():
        configure_logging("error", "json", io.StringIO())
        yield


@pytest.fixture
def log_lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The JSON log lines written so far."""
    stream = io.StringIO()
    with logs_as_before():
        configure_logging("info", "json", stream)
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
