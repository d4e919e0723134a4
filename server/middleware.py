"""Around every request: its id, the bound on its body, its log line, the last resort for errors."""

from __future__ import annotations

import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.context import RequestRecord
from server.errors import CLIENT_CLOSED_REQUEST, error_response
from server.metrics import Metrics
from server.routes.health import QUIET_PATHS

__all__ = ["RequestMiddleware"]

REQUEST_ID_HEADER = "X-Request-Id"
MAX_REQUEST_ID = 128

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.stdlib.get_logger("server.request")


class RequestMiddleware:
    """The outermost layer of ours, in plain ASGI: streamed bodies pass through untouched.

    Args:
        app: what to wrap.
        max_body_bytes: larger request bodies are refused with 413.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = RequestRecord(*_request_ids(Headers(scope=scope).get(REQUEST_ID_HEADER)))
        scope.setdefault("state", {})["record"] = record
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        try:
            await self._app(scope, self._bounded(receive), send_with_id)
        except Exception as error:
            log.exception("request_failed", request_id=record.request_id)
            if status is not None:
                raise  # the server must see that the response was cut short
            await error_response(error)(scope, receive, send_with_id)
        finally:
            _log_line(scope, record, status)
            self._metrics.http_request(*_route(scope), CLIENT_CLOSED_REQUEST if status is None else status)
        return None

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, f"The request body is larger than {self._max_body_bytes} bytes.")
            return message

        return bounded


def _request_ids(given: str | None) -> tuple[str, str]:
    """The id to answer with and one for the engine, unique whatever the client sent.

    A client's id is kept if it is short printable ASCII, which is safe in headers and logs.
    """
    new = uuid.uuid4().hex
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given, f"{given}-{new[:8]}"
    return new, new


def _route(scope: Scope) -> tuple[str, str]:
    """Method and path as labels: few, whatever clients send."""
    method = scope["method"] if scope["method"] in _METHODS else "other"
    return method, getattr(scope.get("route"), "path", "other")


def _log_line(scope: Scope, record: RequestRecord, status: int | None) -> None:
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
