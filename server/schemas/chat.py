"""Body of POST /v1/chat/completions, and the messages that /tokenize takes too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from engine.errors import RequestError
from engine.sampling_params import MAX_LOGPROBS
from engine.types import SamplingParams
from server.errors import UnsupportedFieldError, field_path
from server.schemas.base import (
    MAX_MESSAGES,
    MAX_METADATA,
    UNSUPPORTED_EVERYWHERE,
    Body,
    GenerationDefaults,
    TextPart,
    at_most,
    first,
    parts,
    without_unsupported,
)
from server.schemas.structured import ConstrainedBody
from server.schemas.tools import MAX_CALLS, MAX_TOOLS, MessageToolCall, Tool, ToolChoice

__all__ = ["ChatMessage", "ChatRequest", "Conversation", "Metadata", "Prediction"]

_Parts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
Content = Annotated[_Parts, BeforeValidator(parts, json_schema_input_type=str | _Parts)]
_Pairs = Annotated[dict[str, str], Field(max_length=MAX_METADATA)]
Metadata = Annotated[_Pairs, BeforeValidator(at_most(MAX_METADATA), json_schema_input_type=_Pairs)]

ToolCalls = Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]

_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
"""An assistant's message may come back as the client got it, so its empty fields pass."""


class ChatMessage(Body):
    """One turn of the conversation."""

    UNSUPPORTED = _UNSUPPORTED_IN_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    tool_calls: ToolCalls | None = None
    tool_call_id: str | None = None
    name: str | None = Field(None, description="Of a function, or of who speaks; for the chat template.")
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="The same by vLLM's name.")
    parsed: Any = Field(None, description="No effect: OpenAI's client puts it there.")

    @model_validator(mode="before")
    @classmethod
    def _may_have_no_content(cls, data: Any) -> Any:
        """Where calls, or a thought that was cut, are all there is."""
        others = ("tool_calls", "reasoning_content", "reasoning")
        if isinstance(data, dict) and data.get("content") is None and any(map(data.get, others)):
            return {**data, "content": ""}
        return data

    def check(self, path: str) -> None:
        """Raises RequestError for a field that does not go with the role; `path` is the message's."""
        of_assistants = {
            "tool_calls": bool(self.tool_calls),
            "reasoning_content": bool(self.reasoning_content),
            "reasoning": bool(self.reasoning),
            "parsed": self.parsed is not None,
        }
        for name, given in of_assistants.items():
            if self.role != "assistant" and given:
                param = f"{path}.{name}"
                raise RequestError(f"{param} goes with role 'assistant'", param=param)
        if (self.role == "tool") == (self.tool_call_id is None):
            param = f"{path}.tool_call_id"
            if self.role != "tool":
                raise UnsupportedFieldError(f"{param} goes with role 'tool' only", param=param)
            raise RequestError(f"{param} is missing: the id of the call that returned it", param=param)
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            param = f"{path}.reasoning"
            raise RequestError(f"{param} and reasoning_content are two names of one text", param=param)

    @property
    def text(self) -> str:
        """Its text parts joined by newlines, as in vLLM."""
        return "\n".join(part.text for part in self.content)

    def as_template_input(self) -> dict[str, Any]:
        """The message for `TextProcessor.encode_chat`."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if thought := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = thought
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        told = {"tool_call_id": self.tool_call_id, "name": self.name}
        return message | {name: value for name, value in told.items() if value is not None}


class Conversation(Body):
    """The fields that say what the chat template is to write."""

    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_messages(cls, data: Any) -> Any:
        """Messages without the fields that pass by being empty, each checked by its own path."""
        if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
            return data
        if len(data["messages"]) > MAX_MESSAGES:
            return data
        messages = [
            without_unsupported(ChatMessage, message, _UNSUPPORTED_IN_MESSAGE, "messages", i)
            for i, message in enumerate(data["messages"])
        ]
        for i, message in enumerate(messages):
            _refuse_other_parts(message, i)
        return {**data, "messages": messages}

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true",
                param="continue_final_message",
            )
        if self.continue_final_message and self.messages and self.messages[-1].tool_calls:
            raise RequestError(  # a prompt ends behind the message's text, before them
                "continue_final_message: no answer can go on with a message that has tool_calls",
                param="continue_final_message",
            )
        return self

    @model_validator(mode="after")
    def _fields_fit_roles(self) -> Self:
        for i, message in enumerate(self.messages or ()):
            message.check(f"messages[{i}]")
        return self

    @model_validator(mode="after")
    def _one_tool_of_a_name(self) -> Self:
        names: set[str] = set()
        for i, tool in enumerate(self.tools or ()):
            if tool.function.name in names:
                param = f"tools[{i}].function.name"
                raise RequestError(f"{param}: another tool is called {tool.function.name!r}", param=param)
            names.add(tool.function.name)
        return self

    @property
    def told_tools(self) -> list[Tool]:
        """The tools that the template writes."""
        return list(self.tools or ())

    @property
    def begun_text(self) -> str:
        """What the answer goes on with; empty where it is a message of its own."""
        last = self.messages[-1] if self.messages and self.continue_final_message else None
        return last.text if last and last.role == "assistant" else ""

    def template_options(self) -> dict[str, Any]:
        """The options of `TextProcessor.encode_chat`."""
        continues = bool(self.continue_final_message)
        return {
            "add_generation_prompt": first(self.add_generation_prompt, not continues),
            "continue_final_message": continues,
            "add_special_tokens": bool(self.add_special_tokens),
            "template_kwargs": self.chat_template_kwargs or {},
            "tools": [tool.as_template_input() for tool in self.told_tools],
        }

    def template_input(self) -> list[dict[str, Any]]:
        """The messages for `TextProcessor.encode_chat`."""
        return [message.as_template_input() for message in self.messages or ()]


class Prediction(Body):
    """OpenAI's predicted output: text that the answer is expected to repeat."""

    PATH = ("prediction",)

    type: Literal["content"]
    content: Annotated[
        list[TextPart],
        Field(fail_fast=True),
        BeforeValidator(parts, json_schema_input_type=str | list[TextPart]),
    ]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatRequest(ConstrainedBody, Conversation):
    """Body of POST /v1/chat/completions."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **UNSUPPORTED_EVERYWHERE,
        # OpenAI's
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": ("in_memory",),
        "verbosity": ("medium",),
        "web_search_options": (),
        # vLLM's
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "mm_processor_kwargs": ({},),
    }
    NO_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prediction: Prediction | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    metadata: Metadata | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="No effect.")
    store: Literal[False] | None = Field(None, description="No effect.")

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError(
                "max_tokens and max_completion_tokens cannot both be set", param="max_completion_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        given = {"tool_choice": self.must_call, "parallel_tool_calls": self.parallel_tool_calls is False}
        if not self.tools and (without := [name for name, is_given in given.items() if is_given]):
            raise RequestError(f"{without[0]} is only allowed when tools are given", param=without[0])
        known = {tool.function.name for tool in self.tools or ()}
        for place, name in self._chosen.items():
            if name not in known:
                param = f"tool_choice.{place}"
                raise RequestError(f"{param}: none of the tools is called {name!r}", param=param)
        if not self.callable_tools:
            return self
        others = [name for name in self.constrained_by if name != "response_format"]
        if others:
            message = f"{others[0]} does not go with tools: use response_format, or tool_choice 'none'"
            raise RequestError(message, param=others[0])
        if self.calls_follow_grammar and self.min_tokens:
            raise RequestError(
                "min_tokens cannot be set where calls follow a grammar (tool_choice that requires a call or "
                "allows some of the tools, strict tools, parallel_tool_calls false): where the grammar ends, "
                "so does the answer",
                param="min_tokens",
            )
        return self

    @property
    def told_tools(self) -> list[Tool]:
        """The tools that the model is told of: with `tool_choice` none, none."""
        return [] if self.tool_choice and self.tool_choice.type == "none" else list(self.tools or ())

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice is not None and self.tool_choice.must_call

    @property
    def _chosen(self) -> dict[str, str]:
        """The functions that `tool_choice` names, by where it does."""
        return {} if self.tool_choice is None else self.tool_choice.names

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        chosen = set(self._chosen.values())
        return [tool for tool in self.told_tools if not chosen or tool.function.name in chosen]

    @property
    def calls_follow_grammar(self) -> bool:
        """Whether calls cannot be wrong: unless they have to be right, what is drawn need not wait for it.

        A model that was told of more tools than it may call would sooner or later call one of the others.
        """
        tools = self.callable_tools
        right = any(tool.function.strict for tool in tools) or len(tools) < len(self.told_tools)
        right = right or self.parallel_tool_calls is False or self.must_call
        return bool(tools) and (right or bool(self.constrained_by))

    @property
    def prediction_text(self) -> str:
        """What the answer is predicted to hold; empty for no prediction."""
        return "" if self.prediction is None else self.prediction.text

    @property
    def output_limit(self) -> int | None:
        limit: int | None = first(self.max_completion_tokens, self.max_tokens)
        return limit

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def sampling(self, defaults: GenerationDefaults, vocab_size: int, bad_words: Any = ()) -> SamplingParams:
        """See `GenerationBody.sampling`."""
        try:
            return super().sampling(defaults, vocab_size, bad_words)
        except RequestError as error:
            if self.max_completion_tokens is None or "max_tokens" not in str(error):
                raise
            # The client knows the bound by its other name.
            param = "max_completion_tokens" if error.param == "max_tokens" else error.param
            message = str(error).replace("max_tokens", "max_completion_tokens")
            raise RequestError(message, param=param) from None


def _refuse_other_parts(message: Any, index: int) -> None:
    """Raises UnsupportedFieldError for a content part of a known form that is not text."""
    content = message.get("content") if isinstance(message, dict) else None
    for j, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            param = field_path(["messages", index, "content", j, "type"])
            raise UnsupportedFieldError(
                f"{param}: content parts of type {kind!r} are not supported, only 'text'", param=param
            )
