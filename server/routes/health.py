"""What an operator asks: alive, ready, which version, and the metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server import __version__
from server.context import Context

__all__ = ["QUIET_PATHS", "router"]

QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Polled every few seconds; logged at debug level only."""

_OPENMETRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/openmetrics-text": {}}}}
_NOT_NOW: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; `status` says why."}}

router = APIRouter()


@router.get("/health", responses=_NOT_NOW)
async def health(context: Context) -> JSONResponse:
    """200 while the engine works; 503, because its thread died or a step is stuck, asks for a restart."""
    return _status(context.healthy, "ok", "stuck" if context.stuck else "dead")


@router.get("/ready", responses=_NOT_NOW)
async def ready(context: Context) -> JSONResponse:
    """200 while new requests are taken, else 503: from the signal to shut down on it is 503."""
    return _status(context.ready, "ready", "draining" if context.draining else "not ready")


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=PlainTextResponse, responses=_OPENMETRICS)
async def metrics(request: Request, context: Context) -> Response:
    """Prometheus text, or OpenMetrics where the Accept header asks for it."""
    body, content_type = context.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})


def _status(good: bool, yes: str, no: str) -> JSONResponse:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)
