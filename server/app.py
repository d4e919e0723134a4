"""The ASGI app: routes, errors and middleware around one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from sse_starlette.sse import AppStatus
from starlette.middleware.cors import CORSMiddleware

from engine.client import EngineClient
from server import __version__
from server.api_page import make_app
from server.auth import ApiKeys, KeyMiddleware
from server.context import ServerContext
from server.errors import add_error_handlers
from server.metrics import Metrics
from server.middleware import HeadMiddleware, ReadinessMiddleware, RequestMiddleware
from server.routes import chat, completions, health, models, responses, tokenize
from server.routes.body_route import ShortWay
from server.schemas.base import GenerationDefaults
from server.schemas.structured import JSON_OBJECT
from server.settings import Settings
from server.watchdog import watch_steps

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["create_app"]


def create_app(
    engine: EngineClient, text: TextProcessor, settings: Settings, defaults: GenerationDefaults
) -> FastAPI:
    """An app that starts `engine` with its lifespan and stops it at the end.

    Args:
        engine: loaded, not started.
        text: the tokenizer's two directions.
        settings: the served name and the limits are read from it.
        defaults: the model's own generation settings.

    Raises:
        ConfigError: the API keys cannot be used.
    """
    keys = ApiKeys.load(settings.api_key_file)
    metrics = Metrics(
        engine,
        settings.model_name,
        ready=lambda: context.ready,
        healthy=lambda: context.healthy,
    )
    context = ServerContext(engine, text, settings, defaults, metrics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        beside = [
            asyncio.create_task(watch_steps(context), name="watchdog"),
            asyncio.create_task(context.grammars.prepare(lambda: context.idle, JSON_OBJECT), name="grammars"),
        ]
        try:
            yield
        finally:
            for task in beside:
                task.cancel()
            await engine.stop(settings.drain_timeout)
            context.text_thread.shutdown(wait=False)
            context.grammars.close()

    # sse-starlette would cut every stream at SIGTERM; ours end with the engine's drain.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    app = make_app(title="medusa-serve", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.context = context
    app.state.needs_key = keys is not None
    # The routes themselves: FastAPI looks through an included router, of which ours use nothing, twice. And
    # before those of the documentation: the first that fits is taken.
    modules = (chat, completions, responses, models, tokenize, health)
    ours = [route for module in modules for route in module.router.routes]
    app.router.routes[:0] = ours
    add_error_handlers(app)
    # Each wraps the ones before: a refusal has its log line, and browsers may read it.
    app.add_middleware(ShortWay, routes=ours)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(ReadinessMiddleware, context=context)
    if keys is not None:
        app.add_middleware(KeyMiddleware, keys=keys)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    intake = context.arrivals.intake
    app.add_middleware(RequestMiddleware, settings=settings, metrics=context.metrics, intake=intake)
    return app
