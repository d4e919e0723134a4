"""Swagger UI at /docs: from the package that holds it, or else from the network."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse

__all__ = ["make_app"]

_PLACE = b'<div id="swagger-ui">'
_HINT = b"""
<p>Swagger UI comes from cdn.jsdelivr.net. If this line stays, your browser cannot reach that:
<code>pip install fastapi-offline</code> beside the server brings Swagger UI along, and
<a href="openapi.json">openapi.json</a> is what it would show.</p>
"""


def make_app(**options: Any) -> FastAPI:
    """An app whose /docs needs no internet where the extra `docs` is installed, and says so where it is not.

    Args:
        options: FastAPI's.
    """
    try:
        from fastapi_offline import FastAPIOffline
    except ImportError:
        app = FastAPI(docs_url=None, **options)
        app.add_route("/docs", _page, include_in_schema=False)
        return app
    offline: FastAPI = FastAPIOffline(**options)
    return offline


async def _page(request: Request) -> HTMLResponse:
    """FastAPI's page, with what a reader sees until the scripts are there."""
    root = request.scope.get("root_path", "").rstrip("/")
    app: FastAPI = request.app
    page = get_swagger_ui_html(openapi_url=f"{root}{app.openapi_url}", title=f"{app.title} - Swagger UI")
    return HTMLResponse(bytes(page.body).replace(_PLACE, _PLACE + _HINT))
