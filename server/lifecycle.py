"""A server process from settings to exit: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import socket
import ssl
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn
from fastapi import FastAPI

from engine.client import EngineClient
from engine.errors import ConfigError, MedusaError
from engine.front import EngineFront
from server.app import create_app
from server.auth import ApiKeys
from server.context import ServerContext
from server.logs import configure_logging
from server.protocol import ServerConfig
from server.settings import Settings, unknown_variables

__all__ = ["Server", "bind", "in_process", "run"]

HANDSHAKE_S = 5
"""What connections get to close after the drain, in seconds."""

SWITCH_S = 0.0005
"""How long a thread keeps Python's lock while another wants it; Python's own is 5 ms. The engine's thread
gives the lock away in most of torch's calls. When the event loop has much to do, as in a burst, that thread
would wait 5 ms several times before each launch, and the device would have nothing to do."""

_CERTIFICATE = re.compile(rb"-----BEGIN ([A-Z0-9]+ )?CERTIFICATE-----")
_KEY = re.compile(rb"-----BEGIN ([A-Z]+ )?PRIVATE KEY-----")

log = structlog.stdlib.get_logger("server")


def run(settings: Settings) -> int:
    """Serve until a signal says stop or the engine dies; returns the process's exit status.

    The port is claimed before the model is loaded, so that a wrong one is told at once; it takes
    connections only when the engine is ready.
    """
    configure_logging(settings.log_level, settings.log_format)
    for name, meant in unknown_variables().items():
        log.warning("unknown_variable", variable=name, **({"did_you_mean": meant} if meant else {}))
    try:
        check(settings)
    except ConfigError as error:
        return _fail(str(error))
    try:
        listener = bind(settings.host, settings.port)
    except OSError as error:
        return _fail(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}")
    with listener:
        try:
            engine = _load(settings)
        except MedusaError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted while loading")
            _leave()
        try:
            app = create_app(engine, engine.text, settings, engine.generation_defaults)
            server = Server(app, settings)
        except (MedusaError, OSError) as error:
            return _fail(str(error))
        server.run(sockets=[listener])
    return int(server.engine_died)


def _load(settings: Settings) -> EngineFront:
    """The engine, in a thread or a process of its own. Raises MedusaError."""
    if in_process(settings):
        from engine.process import EngineProcess

        logs = partial(configure_logging, settings.log_level, settings.log_format)
        lock = partial(sys.setswitchinterval, SWITCH_S)
        return EngineProcess.load(settings.engine_config, prepare=[logs, lock])
    from engine.loop import EngineLoop  # late: it imports torch, which takes seconds

    return EngineLoop.load(settings.engine_config)


def in_process(settings: Settings) -> bool:
    """Whether these settings give the engine a process of its own on this machine."""
    if settings.engine_process == "auto":
        from engine.process import cuda_is_used

        # Windows has no pairs of sockets.
        return sys.platform != "win32" and cuda_is_used(settings.device)
    return settings.engine_process == "on"


def check(settings: Settings) -> None:
    """What can be wrong with the server's own files, before the model is loaded, which takes a while.

    Raises:
        ConfigError: API keys or TLS files that cannot be used.
    """
    ApiKeys.load(settings.api_key_file)
    if settings.ssl_certfile is not None:
        fault = _tls_fault(settings.ssl_certfile, settings.ssl_keyfile)
        if fault is not None:
            raise ConfigError(f"cannot use the TLS files: {fault}")


def _tls_fault(cert: Path, key: Path | None) -> str | None:
    """What is wrong with which file, of which OpenSSL says little and Python's error names none."""
    for setting, file in (("ssl_certfile", cert), ("ssl_keyfile", key)):
        try:
            if file is not None:
                file.open("rb").close()
        except OSError as error:
            return f"{setting} {file}: {error.strerror}"
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        own_key = f"ssl_keyfile {key}" if key is not None else f"ssl_certfile {cert}"
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            return f"the key in {own_key} is not that of the certificate in ssl_certfile {cert}"
        if not _CERTIFICATE.search(cert.read_bytes()):
            return f"ssl_certfile {cert} holds no certificate in PEM"
        if not _KEY.search((key or cert).read_bytes()):
            advice = "" if key is not None else "; give the file that does as ssl_keyfile"
            return f"{own_key} holds no private key in PEM{advice}"
        return f"ssl_certfile {cert}" + (f", ssl_keyfile {key}" if key is not None else "") + f": {error}"
    return None


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
    """uvicorn, telling when it serves, and draining from the first signal on.

    uvicorn alone closes the listening socket at the signal and stops the engine last. Here /ready turns 503
    at once and the socket stays open: load balancers see it, and what they still send is answered with 503.
    When the requests that run have ended, or the drain's deadline has passed and they were aborted and told
    so, connections get `HANDSHAKE_S` more to take their last bytes. A second signal ends all of that.

    An engine that dies ends the server the same way, with status 1: nothing here can bring it back, and
    Docker and systemd start anew what ends, not what answers 503.

    Args:
        app: of `create_app`.
        settings: of the server.

    Attributes:
        engine_died: whether that is why it ended.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(ServerConfig(app, settings))
        context = app.state.context
        assert isinstance(context, ServerContext)
        self._context = context
        self._needs_key: bool = app.state.needs_key
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self.engine_died = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        # What is loaded by now stays. Python's collector would go through all of it now and then, half a
        # million objects, tenths of a second in which no stream gets a token.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_S)
        super().run(sockets)
        if self.force_exit:
            _leave()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and sockets:
            _announce(self._settings, self._context.engine, sockets[0], needs_key=self._needs_key)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; returns whether to end."""
        if not (self._context.draining or self._context.engine.healthy):
            log.error("engine_died", advice="the server ends with status 1, to be started again")
            self.engine_died = True
            self._start_drain()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the hook's signature
        """Called by the signal, between two instructions of the event loop's thread."""
        if self._context.draining or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._context.draining = True  # here, not in the loop's next turn: /ready is 503 from now on
        self._loop.call_soon_threadsafe(self._start_drain)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drain is None:
            self._start_drain()
        assert self._drain is not None
        if self.force_exit:
            self._drain.cancel()
            with contextlib.suppress(TimeoutError):  # a stuck step is not waited for
                await asyncio.wait_for(self._context.engine.stop(), timeout=1)
        with contextlib.suppress(asyncio.CancelledError):
            await self._drain
        self.config.timeout_graceful_shutdown = 1 if self.force_exit else HANDSHAKE_S
        await super().shutdown(sockets)
        if self.force_exit:  # which uvicorn takes as a reason to leave the application as it is
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), timeout=1)

    def _start_drain(self) -> None:
        self._context.draining = True
        self._drain = asyncio.create_task(self._drained(), name="drain")

    async def _drained(self) -> None:
        stats, limit = self._context.engine.stats, self._settings.drain_timeout
        # A dead engine's statistics are those of its last step; what ran then has been ended.
        load = {"running": stats.running, "waiting": stats.waiting} if self._context.engine.healthy else {}
        log.info("shutting_down", **load, drain_timeout_s=limit)
        deadline = time.monotonic() + limit
        await self._context.engine.stop(limit)
        # What the engine has finished may still be on its way to a client that reads slowly.
        while self.server_state.tasks and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.should_exit = True


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _leave() -> NoReturn:
    """End with status 1 while the engine's thread works on: the interpreter's own end would wait for
    threads, and not survive one that is inside a kernel."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(1)


def _announce(settings: Settings, engine: EngineClient, listener: socket.socket, *, needs_key: bool) -> None:
    """One line that says what is served and where, and a request to try."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "http" if settings.ssl_certfile is None else "https"
    address = f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"
    body = {
        "model": settings.model_name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    curl = (
        f"curl {address}/v1/chat/completions \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        + ("  -H 'Authorization: Bearer KEY' \\\n" if needs_key else "")
        + f"  -d '{json.dumps(body)}'"
    )
    in_log: dict[str, str | int] = {"try": curl} if settings.log_format == "json" else {}
    if engine.pid is not None:  # whose memory of the GPU it is
        in_log["engine_pid"] = engine.pid
    info = engine.info
    if info.lora:
        in_log["lora"] = ", ".join(info.lora)
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
