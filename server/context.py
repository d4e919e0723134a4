"""What the routes share, and what one request tells the log."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Request

from engine.client import EngineClient
from engine.errors import EngineStoppedError
from engine.grammar import GrammarCompiler
from engine.reasoning import AnyThoughtFormat, thought_format_of
from server import __version__
from server.arrivals import Arrivals
from server.errors import ModelNotFoundError
from server.grammars import Grammars
from server.metrics import Metrics
from server.prompts import Prompts
from server.schemas.base import GenerationDefaults
from server.settings import Settings
from server.tool_formats import AnyToolFormat, format_of

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["Context", "RequestRecord", "ServerContext", "record_of"]

T = TypeVar("T")

_AT_ONCE_BYTES = 4096
"""Whose encoding takes about a millisecond."""


@dataclass(slots=True)
class ServerContext:
    """One running server: its engine and everything around it. Lives as long as the app."""

    engine: EngineClient
    text: TextProcessor
    settings: Settings
    defaults: GenerationDefaults
    metrics: Metrics
    arrivals: Arrivals = field(default_factory=Arrivals)
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    text_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="text")
    )
    prompts: Prompts = field(init=False)
    grammars: Grammars = field(init=False)
    tool_format: AnyToolFormat = field(init=False)
    thought_format: AnyThoughtFormat | None = field(init=False)
    """None where all text is content."""
    model_names: tuple[str, ...] = field(init=False)
    """All names clients may use, the main one first."""
    fingerprint: str = field(init=False)
    """`system_fingerprint`: equal where a seed gives the same text, as far as the server knows."""

    def __post_init__(self) -> None:
        described = json.dumps([__version__, asdict(self.engine.info)], sort_keys=True)
        self.model_names = self.settings.model_names  # which looks at the disk
        self.prompts = Prompts(self.text)
        self.tool_format = format_of(self.text, self.settings.tool_call_parser)
        self.thought_format = thought_format_of(self.text, self.settings.reasoning_parser)
        self.grammars = Grammars(
            GrammarCompiler(self.text.tokenizer, self.defaults.eos_token_ids, self.engine.info.vocab_size)
        )
        self.fingerprint = "fp_" + hashlib.sha256(described.encode()).hexdigest()[:10]

    @property
    def healthy(self) -> bool:
        """False once the engine has died, and while a step takes longer than it may."""
        return self.engine.healthy and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether the step under way has taken longer than `step_timeout`."""
        return 0 < self.settings.step_timeout < self.engine.stats.step_age()

    @property
    def idle(self) -> bool:
        """Whether no choice runs or waits."""
        return not self.engine.stats.running and not self.engine.stats.waiting

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.healthy and self.engine.ready and not self.draining

    def check_ready(self) -> None:
        """Raises EngineStoppedError if new requests are not taken."""
        if self.stuck:
            seconds = self.engine.stats.step_age()
            raise EngineStoppedError(f"the engine has been in one step for {seconds:.0f} s")
        if self.draining:
            raise EngineStoppedError("the server is shutting down and takes no new requests")

    async def in_thread(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """The result of `work`, in a thread: encoding a prompt of megabytes, or writing logprobs of a long
        one, takes seconds, and every stream and probe would wait for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.text_thread, partial(work, *args, **options))

    async def encoded(self, record: RequestRecord, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """The result of `work` on a request's text: at once where its body is small, in the thread where not.

        To hand a short prompt over and back takes longer than to encode it, above all when many come.
        """
        if record.body_bytes <= _AT_ONCE_BYTES:
            return work(*args, **options)
        return await self.in_thread(work, *args, **options)

    async def tokens_of(
        self, record: RequestRecord, write: Callable[[], str], *, add_special_tokens: bool, param: str
    ) -> list[int]:
        """`TextProcessor.encode` of what `write` returns, a prompt of the request's: as `encoded`."""
        if record.body_bytes <= _AT_ONCE_BYTES:
            return await self.prompts.encoded(write(), add_special_tokens=add_special_tokens, param=param)
        return await self.in_thread(
            lambda: self.text.encode(write(), add_special_tokens=add_special_tokens, param=param)
        )

    def name_of(self, given: str | None) -> str:
        """What a request calls the model: the main name where it says nothing."""
        return given or self.model_names[0]

    def check_model(self, name: str) -> None:
        """Raises ModelNotFoundError if `name` is none of the served model's."""
        if name not in self.model_names:
            raise ModelNotFoundError(f"The model '{name}' does not exist.", param="model")


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request, as its line in the log will have it.

    Args:
        request_id: the client's X-Request-Id, or one made here.
        engine_id: the same made unique, since a client may use its id again while the first request runs.
        started: `time.monotonic()` at its arrival.
        body_bytes: how much of its body has been read.
        unread: not all of its body has been received.
        cut_short: the client left before its body was whole.
        fields: what the route adds to the line; never any text of the prompt or the output.
    """

    request_id: str
    engine_id: str
    started: float = field(default_factory=time.monotonic)
    body_bytes: int = 0
    unread: bool = True
    cut_short: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def record_of(request: Request) -> RequestRecord:
    """The record the middleware made for this request."""
    record = request.state.record
    assert isinstance(record, RequestRecord)
    return record


async def _context(request: Request) -> ServerContext:  # FastAPI runs what is not async in a thread
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


Context = Annotated[ServerContext, Depends(_context)]
"""The server's context, as a route parameter."""
