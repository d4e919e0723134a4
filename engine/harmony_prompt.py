"""Conversations as templates of harmony take them, which leave out without a word what they do not expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.harmony import Marks
from engine.tool_prompt import one_call_each

__all__ = ["expected", "with_preambles_in_thoughts"]

_SYSTEM = ("system", "developer")


def expected(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages and tools in the form of which nothing is left out.

    There is one message of the system, or a developer, at the beginning, with the text of all; a message has
    one call, and what that returned behind it; a tool has a description.
    """
    told = [message for message in messages if message["role"] in _SYSTEM]
    others = [dict(message) for message in messages if message["role"] not in _SYSTEM]
    if told:
        others.insert(0, {**told[0], "content": "\n\n".join(message["content"] for message in told)})
    described = [{**tool, "function": {"description": "", **tool["function"]}} for tool in tools]
    return one_call_each(others), described


def with_preambles_in_thoughts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with what stands beside a thought and a call, which the template refuses to write.

    What it writes of the thought is then two messages: that and the one to the user, as the model wrote them.
    """
    return [_with_preamble(message) for message in messages]


def _with_preamble(message: dict[str, Any]) -> dict[str, Any]:
    thought, said = message.get("thinking"), message.get("content")
    if not (thought and said and message.get("tool_calls")):
        return message
    following = f"{Marks.END}{Marks.START}assistant{Marks.CHANNEL}commentary{Marks.MESSAGE}"
    return {**message, "content": "", "thinking": f"{thought}{following}{said}"}
