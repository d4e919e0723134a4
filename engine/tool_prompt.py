"""Tools in a conversation whose chat template knows none, or takes them in one form only.

Where it knows none, they are told, called and answered in plain messages. The form is Hermes's, which most
open models that call tools have seen: a call is JSON between `<tool_call>` and `</tool_call>`, what it
returned stands between `<tool_response>` and `</tool_response>`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.chat_template import REASONING

__all__ = [
    "A_CALL",
    "CALL_BEGIN",
    "CALL_END",
    "GLM_MARKS",
    "LISTED_BEGIN",
    "WITH_A_CALL",
    "arguments_told",
    "has_calls",
    "in_plain_messages",
    "in_some_form",
    "one_call_each",
    "with_arguments_told",
    "with_calls_as_text",
]

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
LISTED_BEGIN = "<|tool_call|>"
"""What opens a list of calls: Granite 3's."""
GLM_MARKS = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
"""Around a parameter's name and around its value, in GLM's calls."""

A_CALL = "called_for_a_sample"
WITH_A_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "Call."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": A_CALL, "arguments": {}}}
        ],
    },
]
"""A conversation with a call of that function, to see what a template makes of it."""

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


def arguments_told(arguments: Any) -> Any:
    """A call's arguments as templates know them: the object whose JSON they are, as in OpenAI's messages.

    Where a model's mistake comes back, they are the text that it wrote.
    """
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def with_arguments_told(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with what `arguments_told` makes of calls' arguments, and a content beside calls."""
    told = []
    for message in messages:
        if calls := message.get("tool_calls"):
            content = message.get("content")
            text = "" if content is None else content
            message = {**message, "content": text, "tool_calls": [_told(call) for call in calls]}
        told.append(dict(message))
    return told


def _told(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": arguments_told(function.get("arguments", ""))}}


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
        plain.append({"role": role, "content": _with_calls(text, message.get("tool_calls") or (), "")})
        if REASONING in message:
            plain[-1][REASONING] = message[REASONING]
    if tools:
        told = _TOLD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if plain and plain[0]["role"] in ("system", "developer"):
            plain[0]["content"] += f"\n\n{told}"
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain


def with_calls_as_text(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """The conversation with calls as content, for a template that tells tools and writes no calls.

    They have the form in which such a model writes them.
    """
    changed = []
    for message in messages:
        others = {name: value for name, value in message.items() if name != "tool_calls"}
        if calls := message.get("tool_calls"):
            others["content"] = _with_calls(message["content"], calls, template)
        changed.append(others)
    return changed


def in_some_form(
    write: Callable[[list[dict[str, Any]]], str],
    messages: list[dict[str, Any]],
    refusals: tuple[type[Exception], ...],
    others: Sequence[Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = (),
) -> str:
    """What a template makes of messages, or, if it refuses them, of others that say the same.

    Llama 3's templates take one call a message, Mistral's ids of nine letters and digits, and a few
    arguments as text. OpenAI's clients send several, ids of any form, and objects are what most take.

    Args:
        write: asks the template.
        refusals: what it raises; this raises the one that is left when nothing helps.
        others: further ways to say the same.
    """
    try:
        return write(messages)
    except refusals as error:
        refusal, reason = error, str(error)
    left = [*others, _short_ids, one_call_each, _arguments_as_text]
    while left:
        for rewrite in left:
            changed = rewrite(messages)
            if changed == messages:
                continue
            try:
                return write(changed)
            except refusals as error:
                if str(error) == reason:
                    continue
                # It took that, and refuses something else. As text most do not expect arguments, though.
                messages, reason = changed, str(error)
                refusal = refusal if rewrite is _arguments_as_text else error
                left.remove(rewrite)
                break
        else:
            break
    raise refusal


def _short_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def changed(message: dict[str, Any]) -> dict[str, Any]:
        told = dict(message)
        if calls := message.get("tool_calls"):
            told["tool_calls"] = [with_short(call, "id") for call in calls]
        return with_short(told, "tool_call_id")

    def with_short(told: dict[str, Any], name: str) -> dict[str, Any]:
        return {**told, name: _short(told[name])} if isinstance(told.get(name), str) else told

    return [changed(message) for message in messages]


def _short(call_id: str) -> str:
    if re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each call in a message of its own, followed by what it returned."""
    changed: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            changed.append(message)
            continue
        results = list(itertools.takewhile(lambda each: each["role"] == "tool", messages[at:]))
        at += len(results)
        for i, call in enumerate(calls):
            said = message if i == 0 else {"role": message["role"], "content": ""}
            changed.append({**said, "tool_calls": [call]})
            # One each: clients may give two calls the same id, or, of `LLM.chat`, none.
            for place, result in enumerate(results):
                if result.get("tool_call_id") == call.get("id"):
                    changed.append(results.pop(place))
                    break
        changed += results
    return changed


def _arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            return call
        text = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return [
        {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_calls(text: str, calls: Sequence[Mapping[str, Any]], template: str) -> str:
    """A message's content, and its calls behind it."""
    told = [{name: call["function"][name] for name in ("name", "arguments")} for call in calls]
    written = [json.dumps(call, ensure_ascii=False) for call in told]
    if LISTED_BEGIN in template:
        written = [f"{LISTED_BEGIN}[{', '.join(written)}]"] if written else []
    elif GLM_MARKS[0] in template:
        written = [_in_glms_form(call, template) for call in told]
    else:
        written = [f"{CALL_BEGIN}\n{call}\n{CALL_END}" for call in written]
    return "\n".join([text, *written] if text else written or [text])


def _in_glms_form(call: Mapping[str, Any], template: str) -> str:
    """A call with its parameters between tags, on lines of their own if the template shows them so."""
    key, key_end, value, value_end = GLM_MARKS
    parts, arguments = [f"{CALL_BEGIN}{call['name']}"], call["arguments"]
    if isinstance(arguments, Mapping):
        for name, told in arguments.items():
            text = told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)
            parts += f"{key}{name}{key_end}", f"{value}{text}{value_end}"
    else:  # what a model wrote by mistake
        parts.append(str(arguments))
    return ("" if key_end + value in template else "\n").join([*parts, CALL_END])
