"""Tools in a conversation whose chat template knows none: told, called and answered in plain messages.

The form is Hermes's, which most open models that call tools have seen: a call is JSON between `<tool_call>`
and `</tool_call>`, what it returned stands between `<tool_response>` and `</tool_response>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.chat_template import REASONING

__all__ = ["CALL_BEGIN", "CALL_END", "has_calls", "in_plain_messages"]

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"

_TOLD = """\
# Tools

You can call these functions; each is described in JSON:
<tools>
{tools}
</tools>

To call one, answer with its name and its arguments in JSON between tags, with one such block for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>"""


def has_calls(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation has calls of tools, or what they returned."""
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def in_plain_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation in messages of role and content alone, for a template that knows no tools.

    Args:
        messages: an assistant's may have `tool_calls`, with arguments as objects, and `reasoning_content`,
            which it keeps; those of role `tool` hold what a call returned.
        tools: `{"type": "function", "function": {…}}`; told at the end of the system message, which is made
            where there is none.
    """
    plain: list[dict[str, Any]] = []
    answered = False  # whether the last message ends with what a call returned
    for message in messages:
        role, text = message["role"], message["content"]
        behind, answered = answered, role == "tool"
        if answered:
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        if behind and role == "user":  # as one message: some templates want an assistant's between two
            plain[-1]["content"] += f"\n{text}"
            continue
        calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
        plain.append({"role": role, "content": "\n".join([text, *calls] if text else calls or [text])})
        if REASONING in message:
            plain[-1][REASONING] = message[REASONING]
    if tools:
        told = _TOLD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if plain and plain[0]["role"] in ("system", "developer"):
            plain[0]["content"] += f"\n\n{told}"
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain


def _call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{CALL_BEGIN}\n{json.dumps(call, ensure_ascii=False)}\n{CALL_END}"
