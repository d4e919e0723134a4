"""A short way from a body to its endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import MedusaError
from server.errors import error_response, on_http_error

__all__ = ["BodyRoute", "ShortWay"]


class BodyRoute(APIRoute):
    """A route of an endpoint `(body, http, context)`, whose body is a model in JSON."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        assert self.body_field is not None
        model = self.body_field.field_info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        self._model = model

    def body(self, scope: Scope, messages: list[Message]) -> BaseModel | None:
        """The body, or None where FastAPI is to have it. Raises what the model's validators raise."""
        if messages[-1]["type"] != "http.request" or not _is_json(scope):
            return None
        try:
            data = json.loads(b"".join([message.get("body", b"") for message in messages]))
            return self._model.model_validate(data) if isinstance(data, dict) else None
        except (ValidationError, ValueError, RecursionError):
            return None


class ShortWay:
    """Leads requests for a `BodyRoute` to its endpoint.

    What FastAPI does to suit any signature, and its layers between here and a route, are a third of a
    request's way to the engine, and when many come at once the last one waits for all of it. A body that is
    right goes straight to the endpoint; any other is left to FastAPI, which finds the same fault and tells it
    as everywhere.

    Args:
        app: FastAPI's layers.
        routes: the application's.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes if isinstance(route, BodyRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http" and scope["method"] == "POST" and "fastapi.telemetry" not in scope:
            route = self._routes.get(scope["path"])
        if route is None:
            return await self._app(scope, receive, send)
        messages: list[Message] = []
        scope["route"] = route  # for the metrics
        response = await self._response(route, Request(scope, receive, send), messages)
        if response is None:
            return await self._app(scope, _again(messages, receive), send)
        return await response(scope, receive, send)

    async def _response(self, route: BodyRoute, http: Request, messages: list[Message]) -> Response | None:
        """The endpoint's, or that to an error; None where FastAPI is to make it of the messages read."""
        try:
            messages.append(message := await http.receive())
            while message.get("more_body", False):
                messages.append(message := await http.receive())
            if (body := route.body(http.scope, messages)) is None:
                return None
            response: Response = await route.endpoint(body=body, http=http, context=http.app.state.context)
        except MedusaError as error:
            return error_response(error)
        except HTTPException as error:
            return await on_http_error(http, error)
        return response


def _is_json(scope: Scope) -> bool:
    content_type: bytes = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return content_type.partition(b";")[0].strip().lower() == b"application/json"


def _again(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that begins with what was read."""
    left: Iterator[Message] = iter(messages)

    async def again() -> Message:
        message = next(left, None)
        return await receive() if message is None else message

    return again
