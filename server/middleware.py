"""Around every request: its id, the bound on its body, its log line, the last resort for errors."""

from __future__ import annotations

import asyncio
import os
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineStoppedError
from server.arrivals import Intake
from server.context import RequestRecord, ServerContext
from server.errors import CLIENT_CLOSED_REQUEST, error_response
from server.metrics import Metrics
from server.protocol import DIRECT, Direct
from server.routes.health import QUIET_PATHS
from server.settings import Settings

__all__ = ["REQUEST_ID_HEADER", "HeadMiddleware", "ReadinessMiddleware", "RequestMiddleware"]

REQUEST_ID_HEADER = "X-Request-Id"
MAX_REQUEST_ID = 128

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.stdlib.get_logger("server.request")


class RequestMiddleware:
    """The outermost layer of ours, in plain ASGI: streamed bodies pass through untouched.

    Args:
        app: what to wrap.
        settings: `max_body_bytes` (larger bodies get 413) and `read_timeout` (slower ones 408).
        metrics: where requests are counted.
        intake: where those that bring a body wait for their turn.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, intake: Intake) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = settings.max_body_bytes
        self._read_timeout = settings.read_timeout
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = RequestRecord(*_request_ids(Headers(scope=scope).get(REQUEST_ID_HEADER)))
        scope.setdefault("state", {})["record"] = record
        status: int | None = None
        direct: Direct | None = scope.get("extensions", {}).get(DIRECT)
        closes = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, closes
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = record.request_id
                closes = headers.get("connection") == "close"
            elif closes and record.unread and direct is not None and not message.get("more_body"):
                await send({**message, "more_body": True})
                return await direct.close_when_sent(receive)
            return await send(message)

        try:
            if scope["method"] == "POST" and DIRECT not in scope.get("extensions", ()):
                await self._intake.turn()  # else its connection has waited for it
            await self._app(scope, self._bounded(scope, receive, record), send_with_id)
        except Exception as error:
            log.exception("request_failed", request_id=record.request_id)
            if status is not None:
                raise  # the server must see that the response was cut short
            await error_response(error)(scope, receive, send_with_id)
        finally:
            if status is None or record.cut_short:
                status = CLIENT_CLOSED_REQUEST
            _log_line(scope, record, status)
            self._metrics.http_request(*_route(scope), status)
        return None

    def _bounded(self, scope: Scope, receive: Receive, record: RequestRecord) -> Receive:
        """`receive` with bounds on the body's size and time. What is left of a refused body is not kept."""
        headers = Headers(scope=scope)
        length, encoding = headers.get("content-length", ""), headers.get("content-encoding", "identity")
        announced = length.isdecimal() and int(length) > self._max_body_bytes
        direct = scope.get("extensions", {}).get(DIRECT)
        complete = False
        deadline = asyncio.get_running_loop().time() + self._read_timeout
        close = {"Connection": "close"}

        async def bounded() -> Message:
            nonlocal complete
            if complete:  # what follows the body is the client's going away
                return await receive()
            if encoding.strip().lower() != "identity":
                raise HTTPException(415, f"Content-Encoding must be identity, got '{encoding}'.", close)
            message: Message = {}
            if not announced and direct is not None and (body := direct.body()) is not None:
                message = {"type": "http.request", "body": body}  # it is there, as most are by their turn
            elif not announced:
                try:
                    async with asyncio.timeout_at(deadline):
                        message = await receive()
                except TimeoutError:
                    late = f"The request's body did not arrive within {self._read_timeout:g} s."
                    raise HTTPException(408, late, close) from None
            record.body_bytes += len(message.get("body", b""))
            record.unread = announced or message.get("more_body", False)
            if announced or record.body_bytes > self._max_body_bytes:
                large = f"The request body is larger than {self._max_body_bytes} bytes."
                raise HTTPException(413, large, close)
            complete = not message.get("more_body", False)
            record.cut_short = message["type"] == "http.disconnect"
            return message

        return bounded


class HeadMiddleware:
    """Answers HEAD as GET without the body, which every server shall: monitors ask so whether it is there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        inner = {**scope, "method": "GET"}
        try:
            await self._app(inner, receive, send_head)
        finally:
            scope["route"] = inner.get("route")  # for the metrics
        return None


class ReadinessMiddleware:
    """Answers 503 to new work while none is taken, before any of it is read.

    While the server drains every answer closes its connection, so that clients find another replica.
    """

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self._context.draining:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if scope["method"] == "POST":
            try:
                self._context.check_ready()
            except EngineStoppedError as error:
                return await error_response(error)(scope, receive, send_and_close)
        return await self._app(scope, receive, send_and_close)


def _request_ids(given: str | None) -> tuple[str, str]:
    """The id to answer with and one for the engine, unique whatever the client sent.

    A client's id is kept if it is short printable ASCII, which is safe in headers and logs.
    """
    new = os.urandom(16).hex()
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given, f"{given}-{new[:8]}"
    return new, new


def _route(scope: Scope) -> tuple[str, str]:
    """Method and path as labels: few, whatever clients send."""
    method = scope["method"] if scope["method"] in _METHODS else "other"
    return method, getattr(scope.get("route"), "path", "other")


def _log_line(scope: Scope, record: RequestRecord, status: int) -> None:
    write = log.debug if scope["path"] in QUIET_PATHS else log.info
    write(
        "request",
        request_id=record.request_id,
        method=scope["method"],
        path=scope["path"],
        status=status,
        e2e_s=round(time.monotonic() - record.started, 4),
        **record.fields,
    )
