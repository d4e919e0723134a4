"""A route that takes the short way from a body to its endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Message, Receive, Scope, Send

__all__ = ["BodyRoute"]


class BodyRoute(APIRoute):
    """A route of an endpoint `(body, http, context)`, whose body is a model in JSON.

    What FastAPI does to suit any signature is a fifth of a request's way to the engine, and when many come
    at once the last one waits for all of it. A body that is right goes straight to the endpoint here; any
    other is left to FastAPI, which finds the same fault and tells it as everywhere.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        assert self.body_field is not None
        model = self.body_field.field_info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        self._model = model
        self._by_fastapi = self.app
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages = [message := await receive()]
        while message.get("more_body", False):
            messages.append(message := await receive())
        body = self._body(scope, messages)
        if body is None:
            return await self._by_fastapi(scope, _again(messages, receive), send)
        context = scope["app"].state.context
        response = await self.endpoint(body=body, http=Request(scope, receive, send), context=context)
        await response(scope, receive, send)
        return None

    def _body(self, scope: Scope, messages: list[Message]) -> BaseModel | None:
        """The body, or None where FastAPI is to have it. Raises what the model's validators raise."""
        if messages[-1]["type"] != "http.request" or not _is_json(scope) or "fastapi.telemetry" in scope:
            return None
        try:
            data = json.loads(b"".join([message.get("body", b"") for message in messages]))
            return self._model.model_validate(data) if isinstance(data, dict) else None
        except (ValidationError, ValueError, RecursionError):
            return None


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
