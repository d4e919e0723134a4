"""API keys: where they come from, and the check before every route that is not for operators."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import ConfigError
from server.errors import ErrorResponse, error_body

__all__ = ["KEY_VARIABLES", "OPEN_PATHS", "ApiKeys", "KeyMiddleware"]

KEY_VARIABLES = ("MEDUSA_API_KEY", "MEDUSA_API_KEYS")
"""One key, and several with commas between them. No settings: settings are printed."""

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""For probes and Prometheus, as in vLLM; a network policy keeps others away."""


class ApiKeys:
    """Keys that are known by their digests only, so that no dump or log can show one.

    Args:
        keys: at least one, and where each is from, for errors.

    Raises:
        ConfigError: one is empty or not printable ASCII without spaces, which no header
            could carry.
    """

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        found = list(keys)
        for key, source in found:
            if not (key.isascii() and key.isprintable()) or not key or " " in key:
                raise ConfigError(f"{source}: an API key must be printable ASCII without spaces")
        self._digests = [_digest(key) for key, _ in found]

    @classmethod
    def load(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys | None:
        """The keys of the file (one a line; empty lines and # comments are skipped) and the environment.

        Returns:
            None where no key is set: everybody may ask.

        Raises:
            ConfigError: the file cannot be read or holds none, or a key is malformed.
        """
        keys = [(key.strip(), name) for name in KEY_VARIABLES for key in environment.get(name, "").split(",")]
        keys = [(key, name) for key, name in keys if key]
        if file is not None:
            try:
                lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
                raise ConfigError(f"cannot read --api-key-file {file}: {reason}") from None
            in_file = [
                (line, f"{file}, line {number}")
                for number, line in enumerate(lines, 1)
                if line and not line.startswith("#")
            ]
            if not in_file:
                raise ConfigError(f"--api-key-file {file} holds no API key")
            keys += in_file
        return cls(keys) if keys else None

    def accept(self, key: str) -> bool:
        """Whether `key` is one of them; takes as long for any that is not."""
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class KeyMiddleware:
    """Answers 401 unless the request carries `Authorization: Bearer KEY`.

    Args:
        app: what to wrap.
        keys: the accepted ones.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        message = "No API key, or an incorrect one. Send it as 'Authorization: Bearer KEY'."
        body = error_body(401, message, code="invalid_api_key")
        # Its body is not read, so the connection cannot be used again.
        headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
        return await ErrorResponse(body, 401, headers)(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._keys.accept(key.strip())
