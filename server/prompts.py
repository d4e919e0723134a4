"""Prompts that come at once are encoded together."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["Prompts"]

_TOGETHER_CHARACTERS = 16 * 1024
"""Encoded in one turn of the event loop; takes about five milliseconds on one core."""


class Prompts:
    """Encodes the prompts of all requests that are ready in the same turn of the event loop in one call.

    The tokenizer spreads them over the cores, and gives Python's lock away once, not for each.

    Args:
        text: encodes.
    """

    def __init__(self, text: TextProcessor) -> None:
        self._text = text
        self._waiting: deque[tuple[str, bool, asyncio.Future[list[int]]]] = deque()

    async def encoded(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """See `TextProcessor.encode`."""
        self._text.check_text(text, param)
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[int]] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._encode)
        self._waiting.append((text, add_special_tokens, found))
        return await found

    def _encode(self) -> None:
        """Encode the first that waits and those behind it that are of its kind, as many as go together."""
        special, left = self._waiting[0][1], _TOGETHER_CHARACTERS
        texts: list[str] = []
        asked: list[asyncio.Future[list[int]]] = []
        while self._waiting and self._waiting[0][1] is special and (not texts or left > 0):
            text, _, found = self._waiting.popleft()
            texts.append(text)
            asked.append(found)
            left -= len(text)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._encode)
        try:
            encoded = self._text.encode_checked(texts, add_special_tokens=special)
        except BaseException as error:  # a panic of the library's is no Exception
            for found in asked:
                if not found.done():
                    found.set_exception(error)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return
        for found, tokens in zip(asked, encoded, strict=True):
            if not found.done():
                found.set_result(tokens)
