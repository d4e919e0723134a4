"""A server process from settings to exit: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys

import structlog
import uvicorn

from engine.errors import MedusaError
from engine.types import EngineClient, EngineInfo
from server.app import create_app
from server.logs import configure_logging
from server.settings import Settings

__all__ = ["Server", "bind", "run"]

KEEP_ALIVE_S = 75
"""Longer than nginx keeps an idle upstream connection (60 s), so that it is never the server that closes
one just as a request is put on it."""

HANDSHAKE_S = 5
"""What connections get to close after the drain, in seconds."""

log = structlog.stdlib.get_logger("server")


def run(settings: Settings) -> int:
    """Serve until a signal says stop; returns the process's exit status.

    The port is claimed before the model is loaded, so that a wrong one is told at once; it takes
    connections only when the engine is ready.
    """
    configure_logging(settings.log_level, settings.log_format)
    try:
        listener = bind(settings.host, settings.port)
    except OSError as error:
        return _fail(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}")
    with listener:
        from engine.loop import EngineLoop  # late: it imports torch, which takes seconds

        try:
            engine = EngineLoop.load(settings.engine_config)
        except MedusaError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            return _fail("interrupted while loading")
        app = create_app(engine, engine.text, settings, engine.generation_defaults)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.drain_s) + HANDSHAKE_S,
            server_header=False,
        )
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when it has shut down
            Server(config, engine, settings).run(sockets=[listener])
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address, not yet listening. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


class Server(uvicorn.Server):
    """uvicorn, telling when it serves, and draining the engine while connections finish."""

    def __init__(self, config: uvicorn.Config, engine: EngineClient, settings: Settings) -> None:
        super().__init__(config)
        self._engine = engine
        self._settings = settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            _announce(self._settings, self._engine.info, sockets[0])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop taking connections, and at the same time let the engine finish or abort its requests.

        uvicorn alone would wait for the responses first and stop the engine after, without a bound that
        the engine knows of; here a request cut off by the drain is told so in its own stream.
        """
        log.info("shutting_down", running=self._engine.stats.running, waiting=self._engine.stats.waiting)
        drain = asyncio.create_task(self._engine.stop(self._settings.drain_s))
        await super().shutdown(sockets)
        if self.force_exit:  # a second signal
            drain.cancel()
            await self._engine.stop()
        else:
            await drain


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _announce(settings: Settings, info: EngineInfo, listener: socket.socket) -> None:
    """One line that says what is served and where, and a request to try."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    body = {
        "model": settings.model_name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    curl = (
        f"curl {address}/v1/chat/completions \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )
    in_log = {"try": curl} if settings.log_format == "json" else {}
    log.info(
        "serving",
        model=settings.model_name,
        dtype=info.dtype,
        quantization=info.quantization,
        device=info.device,
        heads=info.num_heads,
        tree=info.tree,
        lookup=info.lookup or "off",
        kv_cache_tokens=info.kv_cache_tokens,
        address=address,
        **in_log,
    )
    if settings.log_format == "console":
        print(f"\nTry it:\n\n{curl}\n", file=sys.stderr)
