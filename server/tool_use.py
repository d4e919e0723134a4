"""One request's tools: the grammar that its calls follow, and the calls in its answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from engine.errors import RequestError
from server.calls import Functions
from server.responses import (
    ChatFinishReasonName,
    FinishReasonName,
    ResponseMessage,
    ToolCall,
    ToolCallDelta,
    ToolCallFunction,
    ToolCallFunctionDelta,
)
from server.schemas.chat import ChatRequest
from server.schemas.structured import Constraint
from server.schemas.tools import Tool
from server.tool_calls import CallDelta, CallParser, Parsed
from server.tool_formats import AnyToolFormat, Function
from server.tool_grammars import FormError

__all__ = ["CallReader", "calls_constraint", "with_place"]


def calls_constraint(body: ChatRequest, form: AnyToolFormat, begun: str = "", unlike: str = "") -> Constraint:
    """The grammar of an answer whose calls cannot be wrong.

    Args:
        form: in which the model writes calls.
        begun: text that the answer goes on with.
        unlike: what opens a thought: text that began with it would be one.

    Raises:
        RequestError: a schema is nested too deeply to be written, or is of no object, or another form of
            answer cannot be told from a call, or the message that is continued has begun one.
    """
    parser: CallParser = form.parser(_by_name(body.callable_tools))
    parser.begin(begun)
    if parser.open:
        raise RequestError(
            "continue_final_message: the message has begun a call, and calls follow a grammar here, which "
            "cannot begin in the middle of one",
            param="continue_final_message",
        )
    for tool in body.callable_tools:
        kinds = (tool.function.parameters or {}).get("type", "object")
        if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
            place = f"{_place(body, tool)}.type"
            raise RequestError(f"{place}: must be 'object' where calls follow a grammar", param=place)
    schema: dict[str, Any] | None = None
    if body.constrained_by and not body.must_call:
        if form.like_json:  # an answer that begins with it would begin a call
            raise RequestError(
                "response_format does not go with tools here: this model's calls are JSON like it",
                param="response_format",
            )
        schema = json.loads(body.constraint().spec.text)
    one = body.tool_choice is not None and body.tool_choice.function is not None
    several = body.parallel_tool_calls is not False and not one
    functions = [
        Function(tool.function.name, tool.function.parameters, bool(tool.function.strict))
        for tool in body.callable_tools
    ]
    try:
        spec = form.grammar(functions, text=not body.must_call, schema=schema, several=several, unlike=unlike)
    except FormError as error:
        place = _place(body, body.callable_tools[error.index]) + error.path
        raise RequestError(f"{place}: {error}", param=place) from None
    except RecursionError:
        raise RequestError("tools: nested too deeply", param="tools") from None
    return Constraint(spec, "tools", "tools")


def with_place(error: RequestError, body: ChatRequest) -> RequestError:
    """An error in the grammar of calls, which no client has seen, by the place of the wrong schema."""
    if error.param != "tools" or (found := _IN_GRAMMAR.search(str(error))) is None:
        return error
    line, reason = found.groups()
    rule = re.search(rf"^ *{line} \| (?:[A-Za-z]+_(\d+)\w*|body):", str(error), re.MULTILINE)
    if rule is None:
        return error
    place = "response_format" if rule[1] is None else _place(body, body.callable_tools[int(rule[1])])
    return RequestError(f"{place}: {reason}", param=place)


_IN_GRAMMAR = re.compile(r"\bat (\d+)\(\d+\): (.*)")


def _place(body: ChatRequest, tool: Tool) -> str:
    """Of a tool's schema in the request."""
    return f"tools[{(body.tools or []).index(tool)}].function.parameters"


def _by_name(tools: Sequence[Tool]) -> Functions:
    return {tool.function.name: tool.function.parameters for tool in tools}


class CallReader:
    """Tells content from calls in the answers to one request.

    Args:
        form: in which the model writes calls.
        tools: that it may call.
        begun: text that each answer goes on with; a call that it has begun is the answer's.
    """

    def __init__(self, form: AnyToolFormat, tools: Sequence[Tool], begun: str = "") -> None:
        self._form, self._begun = form, begun
        self._functions = _by_name(tools)
        self._parsers: dict[int, CallParser] = {}

    def read(self, choice: int, text: str, *, final: bool) -> tuple[str, list[ToolCallDelta]]:
        """Content and calls of a choice's next piece of text; `final` if nothing follows."""
        parsed = self._parsed(choice, text, final)
        return parsed.content, [self._delta(call) for call in parsed.calls]

    def in_order(self, choice: int, text: str, *, final: bool) -> list[str | ToolCallDelta]:
        """The same in the order in which they came; no content is empty."""
        order = self._parsed(choice, text, final).order
        return [part if isinstance(part, str) else self._delta(part) for part in order]

    def _parsed(self, choice: int, text: str, final: bool) -> Parsed:
        if choice not in self._parsers:
            self._parsers[choice] = self._form.parser(self._functions)
            self._parsers[choice].begin(self._begun)
        return self._parsers[choice].feed(text, final)

    def finish_reason(self, choice: int, reason: FinishReasonName) -> ChatFinishReasonName:
        """Why a choice ended, in whose text calls may have been."""
        return "tool_calls" if reason == "stop" and self._parsers[choice].calls else reason

    def message(self, choice: int, text: str) -> ResponseMessage:
        """The message of a choice from all of its text."""
        content, deltas = self.read(choice, text, final=True)
        calls: list[ToolCall] = []
        for delta in deltas:
            if delta.id is not None and delta.function.name is not None:
                function = ToolCallFunction(name=delta.function.name, arguments="")
                calls.append(ToolCall(id=delta.id, type="function", function=function))
            calls[delta.index].function.arguments += delta.function.arguments
        if not calls:
            return ResponseMessage(role="assistant", content=content, refusal=None)
        return ResponseMessage(role="assistant", content=content or None, refusal=None, tool_calls=calls)

    def _delta(self, call: CallDelta) -> ToolCallDelta:
        if call.name is None:
            return ToolCallDelta(index=call.index, function=ToolCallFunctionDelta(arguments=call.arguments))
        return ToolCallDelta(
            index=call.index,
            id=self._form.new_id(),
            type="function",
            function=ToolCallFunctionDelta(name=call.name, arguments=call.arguments),
        )
