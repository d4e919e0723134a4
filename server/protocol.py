"""HTTP connections that cannot be held for ever: uvicorn's protocol with deadlines and a bound on headers."""

from __future__ import annotations

import asyncio
import json
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.arrivals import Intake
from server.errors import error_body
from server.settings import Settings

__all__ = [
    "DIRECT",
    "KEEP_ALIVE_S",
    "LINGER_BYTES",
    "LINGER_S",
    "MAX_HEAD_BYTES",
    "Direct",
    "GuardedProtocol",
    "ServerConfig",
]

KEEP_ALIVE_S = 75
"""Longer than nginx keeps an idle upstream connection (60 s), so that it is never the server that closes
one just as a request is put on it."""

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers."""

LINGER_S = 5.0
LINGER_BYTES = 64 * 2**20
"""So long, and so much of it, what a client still sends is read behind an answer that closes."""

DIRECT = "medusa.direct"
"""The ASGI extension that holds a `Direct`."""

log = structlog.stdlib.get_logger("server.connection")


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration as every server here has it.

    Args:
        app: of `create_app`.
        settings: TLS files and time-outs are read from it.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.read_timeout = settings.read_timeout
        self.write_timeout = settings.write_timeout
        self.intake: Intake = app.state.context.arrivals.intake
        super().__init__(
            app,
            http=GuardedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S,
            server_header=False,
            proxy_headers=False,  # nobody asks for the client's address or scheme
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    From the first byte of a request its line and headers have `read_timeout` seconds (the body's share is
    kept by `RequestMiddleware`), else 408; more than `MAX_HEAD_BYTES` of them, or of what follows a chunked
    body, are a 431. A connection on which nothing is asked is closed after `KEEP_ALIVE_S`. A client that
    leaves 64 KiB unread for `write_timeout` seconds is cut off. With a connection end all its requests:
    uvicorn tells only the last of those that were sent in a row.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ServerConfig)
        self._read_timeout, self._write_timeout = config.read_timeout, config.write_timeout
        self._late: TimerHandle | None = None
        self._stalled: TimerHandle | None = None
        self._head_bytes = 0
        self._unanswered: deque[Direct] = deque()  # of which the first is being answered
        self._intake = config.intake
        self._held: list[bytes] = []  # what has come while its request waits for its turn

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(KEEP_ALIVE_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        self._flowing()
        self._held.clear()
        super().connection_lost(exc)
        for direct in self._unanswered:
            direct.lose()
        self._unanswered.clear()

    def data_received(self, data: bytes) -> None:
        if self._held:
            self._held.append(data)
            self.flow.pause_reading()
        elif self._idle and data.startswith(b"POST "):
            # Before it is parsed, which for all that have come at once takes as long as a few need for their
            # way to the engine.
            self._held.append(data)
            self._intake.take(self._let_in)
        else:
            self._take(data)

    def _let_in(self) -> None:
        if self._held:  # the client may have left
            data = b"".join(self._held)
            self._held.clear()
            self.flow.resume_reading()
            self._take(data)

    def shutdown(self) -> None:
        self._let_in()  # who has asked is answered
        super().shutdown()

    def _take(self, data: bytes) -> None:
        if self._late is None and self._idle:
            self._late = self.loop.call_later(self._read_timeout, self._on_late)
        self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except HttpParserError:
            self._refuse(400, "Invalid HTTP request received.")

    def _stay(self, rest: bytes) -> None:
        """Take a request that offers another protocol as one that does not, which every server may.

        Java's client offers HTTP/2 with its first request, also where that has a body, which the parser
        takes for the other protocol's. So it is given the request again, without the offer.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            return self._refuse(400, "This server is no proxy.")
        head = [b"%b %b HTTP/%b" % (method, self.url, version)]
        head += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = HttpRequestParser(self)
        return self._parse(b"\r\n".join([*head, b"", rest]))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see `_stay`
        if len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers]) > MAX_HEAD_BYTES:
            self._refuse_head()  # which one read has brought whole, maybe with its body
            raise ValueError  # or the application would be asked all the same, and what follows be parsed
        self._in_time()
        self._head_bytes = 0
        before = self.cycle
        super().on_headers_complete()
        if (cycle := self.cycle) is not before:
            # Its task begins later. ASGI's type of an extension is a dict, whatever it may hold.
            direct = Direct(cycle)
            self.scope["extensions"] = {DIRECT: direct}  # type: ignore[dict-item]
            self._unanswered.append(direct)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_time()  # of a body that nobody wanted
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._write_timeout, self._on_stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flowing()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _flowing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _on_late(self) -> None:
        self._late = None
        self._refuse(408, f"The request did not arrive within {self._read_timeout:g} s.")

    def _on_stalled(self) -> None:
        self._stalled = None
        log.warning("client_too_slow", client=self.client, unread_for_s=self._write_timeout)
        self.transport.abort()

    def _refuse_head(self) -> None:
        self._refuse(431, f"The request's headers are larger than {MAX_HEAD_BYTES} bytes.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request, and close."""
        self._in_time()
        if self.transport.is_closing():
            return
        if self._unanswered and self._unanswered[0].begun:
            self.transport.close()  # in the midst of an answer nothing else can be said
            return
        phrase = HTTPStatus(status).phrase
        log.info("refused", client=self.client, status=status)
        body = json.dumps(error_body(status, message, code=phrase.lower().replace(" ", "_"))).encode()
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class Direct:
    """One request's connection, without tasks, and without the layers between it and the application.

    To be used in the event loop.
    """

    __slots__ = ("_cycle", "_lost")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._lost: Callable[[], None] | None = None

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        return self._cycle.disconnected

    @property
    def begun(self) -> bool:
        """Whether the client has been sent a part of the response."""
        return self._cycle.response_started

    def on_lost(self, call: Callable[[], None] | None) -> None:
        """Have `call` called when the client leaves."""
        self._lost = call

    def lose(self) -> None:
        """The connection is lost before the client has the whole response."""
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self._lost is not None:
            self._lost()

    def body(self) -> bytes | None:
        """What is left to receive of the request's body, if all of it is there; it is then received."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or cycle.waiting_for_100_continue:
            return None
        cycle.flow.resume_reading()
        cycle.message_event.clear()
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    async def close_when_sent(self, receive: Receive) -> None:
        """Close after an answer that came before the end of the request's body, for which nobody waited.

        The client is told at once that no more comes. What it is still sending is read, and thrown away, for
        `LINGER_S` or `LINGER_BYTES`: closed with something unread TCP resets a connection, and takes the
        answer from a client that has not read it yet (RFC 9112, 9.6). nginx says 503 then.
        """
        transport, left = self._cycle.transport, LINGER_BYTES
        if transport.can_write_eof():  # TLS cannot
            transport.write_eof()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while left > 0 and (message := await receive()).get("more_body"):
                    left -= len(message["body"])
        transport.close()
        self._cycle.disconnected = True  # its end is not to be written

    def write(self, part: bytes, last: bool) -> bool:
        """Write a part of the body of a response that has begun.

        Args:
            part: not empty.
            last: the client then has the whole response, and the application ends it without another.

        Returns:
            False, and nothing is written, where the client reads too slowly or has left; the part is to be
            sent as usual then.
        """
        cycle = self._cycle
        free = not (cycle.flow.write_paused or cycle.disconnected or cycle.response_complete)
        if not (free and cycle.chunked_encoding and part):
            return False
        chunk = b"%x\r\n%b\r\n" % (len(part), part)
        if last:
            chunk += b"0\r\n\r\n"
            # Or its end would be written twice.
            cycle.chunked_encoding, cycle.expected_content_length = False, 0
        cycle.transport.write(chunk)
        return True
