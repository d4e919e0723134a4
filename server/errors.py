"""What goes wrong, as OpenAI's clients expect to read it: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from engine.errors import (
    ContextLengthError,
    EngineStoppedError,
    MedusaError,
    QueueFullError,
    RequestError,
    StepError,
)

__all__ = [
    "CLIENT_CLOSED_REQUEST",
    "UNSEEN",
    "ErrorResponse",
    "ModelNotFoundError",
    "RequestTimeoutError",
    "ResponseNotFoundError",
    "UnsupportedFieldError",
    "add_error_handlers",
    "error_body",
    "error_response",
    "field_path",
    "in_json_words",
    "on_http_error",
    "to_status",
]

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for logs and metrics, where nobody is left to answer."""

UNSEEN = "\0"
"""Begins a part of a place in a body that clients know nothing of: which form of several is meant there."""

_JSON_WORDS = {
    "Value error, ": "",
    " after validation": "",
    "a valid dictionary or object to extract fields from": "an object",
    "a valid dictionary": "an object",
    "a valid list": "a list",
    "True": "true",
    "False": "false",
}

SERVER_ERROR_MESSAGE = "The server had an error while processing your request. Its log has the details."


class ModelNotFoundError(RequestError):
    """The request names a model this server does not serve (HTTP 404)."""


class ResponseNotFoundError(RequestError):
    """An earlier response is asked for, and the server keeps none (HTTP 404)."""


class UnsupportedFieldError(RequestError):
    """A field that is unknown, or known and not supported (HTTP 400)."""


class RequestTimeoutError(MedusaError):
    """The answer took longer than `request_timeout` (HTTP 504)."""


def to_status(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers of an error. Unknown errors are a 500 that tells nothing."""
    headers: dict[str, str] = {}
    match error:
        case ModelNotFoundError():
            status, code = 404, "model_not_found"
        case ResponseNotFoundError():
            status, code = 404, "response_not_found"
        case ContextLengthError():
            status, code = 400, "context_length_exceeded"
        case UnsupportedFieldError():
            status, code = 400, "unsupported_parameter"
        case RequestError():
            status, code = 400, "invalid_value"
        case QueueFullError():
            status, code = 503, "queue_full"
            headers["Retry-After"] = str(error.retry_after_s)
        case EngineStoppedError():
            status, code = 503, "shutting_down"
            headers["Retry-After"] = "1"
        case StepError():
            status, code = 500, "step_failed"
        case RequestTimeoutError():
            status, code = 504, "request_timeout"
        case _:
            return 500, error_body(500, SERVER_ERROR_MESSAGE, code="internal_error"), headers
    param = error.param if isinstance(error, RequestError) else None
    return status, error_body(status, str(error), param=param, code=code), headers


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object; the type follows from the status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorResponse(JSONResponse):
    """JSON in ASCII: a message may quote a client's unpaired surrogate, which UTF-8 cannot write."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


def error_response(error: Exception) -> ErrorResponse:
    """The whole HTTP answer for an error."""
    status, body, headers = to_status(error)
    return ErrorResponse(body, status, headers)


def field_path(location: Sequence[str | int]) -> str:
    """A field as a user would write it: `("messages", 0, "role")` is `messages[0].role`."""
    path = ""
    for part in location:
        if isinstance(part, str) and part.startswith(UNSEEN):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in OpenAI's form."""
    app.add_exception_handler(MedusaError, _on_medusa_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)


async def _on_medusa_error(_request: Request, error: Exception) -> ErrorResponse:
    return error_response(error)


async def _on_invalid_body(request: Request, error: Exception) -> ErrorResponse:
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, Any] = error.errors()[0]
    where, *location = first["loc"]
    if where == "body" and not location:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            message = f"Content-Type must be application/json, got '{content_type}'."
            return ErrorResponse(error_body(415, message, code="unsupported_media_type"), 415)
        return ErrorResponse(
            error_body(400, "The request body must be a JSON object.", code="invalid_type"), 400
        )
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        message = f"The request body is not valid JSON: {reason} at character {location[-1]}."
        return ErrorResponse(error_body(400, message, code="invalid_json"), 400)
    param, message = field_path(location), in_json_words(first["msg"])
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ErrorResponse(error_body(400, f"{param}: {message}", param=param, code=code), 400)


def in_json_words(message: str) -> str:
    """What pydantic says of a value, in the words of who sent it."""
    message = re.sub(r"^(Input|Value|List|String|Dictionary) should ", "must ", message)
    for python, json_word in _JSON_WORDS.items():
        message = message.replace(python, json_word)
    return message


def _not_json(cause: BaseException) -> str:
    """What to say of a body that could not be read."""
    match cause:
        case UnicodeDecodeError():
            reason = "not UTF-8"
        case RecursionError():
            reason = "nested too deeply"
        case _:
            reason = "a number is too long"
    return f"The request body is not valid JSON: {reason}."


async def on_http_error(request: Request, error: Exception) -> ErrorResponse:
    """The answer for an error of Starlette's, FastAPI's, or about how a body came."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and error.__cause__ is not None:  # FastAPI's, who has tried to parse it
        message = _not_json(error.__cause__)
        return ErrorResponse(error_body(400, message, code="invalid_json"), 400, error.headers)
    match error.status_code:
        case 404:
            message, code = f"Unknown path: {request.method} {request.url.path}", "unknown_url"
        case 405:
            message, code = f"{request.url.path} does not answer {request.method}", "method_not_allowed"
        case 413:
            message, code = str(error.detail), "content_too_large"
        case status:
            message = str(error.detail)
            code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    body = error_body(error.status_code, message, code=code)
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":  # routes do not know of `HeadMiddleware`
        headers["Allow"] = "GET, HEAD"
    return ErrorResponse(body, error.status_code, headers)
