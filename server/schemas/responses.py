"""Body of POST /v1/responses, and the chat completion that it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from engine.errors import RequestError
from engine.sampling_params import MAX_LOGPROBS
from server.errors import UNSEEN, UnsupportedFieldError, field_path, in_json_words
from server.schemas.base import UNSUPPORTED_EVERYWHERE, Body, SamplingBody, without_unsupported
from server.schemas.chat import ChatRequest, Metadata
from server.schemas.response_items import InputItem, as_messages, full_name, goes_on, plain_items
from server.schemas.structured import StructuredOutputs
from server.schemas.tools import MAX_TOOLS, FunctionDefinition, FunctionName, Part

__all__ = ["ENCRYPTED", "LOGPROBS", "ResponsesRequest"]

MAX_ITEMS = 8192
MAX_NAME = 64
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"


def _input(value: object) -> object:
    """Text is a user's message."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be text or a list of items")
    if len(value) > MAX_ITEMS:
        raise ValueError(f"must have at most {MAX_ITEMS} items, not {len(value)}")
    return plain_items(value)


_Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Input = Annotated[_Items, BeforeValidator(_input, json_schema_input_type=str | _Items)]


class FunctionTool(FunctionDefinition):
    """A function that the model may call, with what a chat completion's tool has around it."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]

    def as_told(self) -> dict[str, Any]:
        """The tool as answers repeat it."""
        return {**dict(self), "strict": bool(self.strict)}


class NamespaceTool(Part):
    """Functions under a common name, as Codex has them."""

    type: Literal["namespace"]
    name: FunctionName
    description: str | None = Field(None, description="No effect: the model is told of the functions.")
    tools: list[FunctionTool] = Field(max_length=MAX_TOOLS)

    def as_told(self) -> dict[str, Any]:
        """The tool as answers repeat it."""
        return {**dict(self), "tools": [tool.as_told() for tool in self.tools]}


class PlacedTool(NamedTuple):
    """A function of a request.

    Args:
        place: in the request.
        tool: the function.
        namespace: that it is in, if it is in one.
    """

    place: str
    tool: FunctionTool
    namespace: str | None = None

    @property
    def name(self) -> str:
        """By which the model knows it."""
        return full_name(self.namespace, self.tool.name)

    def as_chat(self) -> dict[str, Any]:
        """The tool as chat completions have it. Raises RequestError for a name that is too long."""
        if len(self.name) > MAX_NAME:
            param = f"{self.place}.name"
            message = f"{param}: {self.name!r}, by which the model is to know it, is longer than {MAX_NAME}"
            raise RequestError(message, param=param)
        function = {name: value for name, value in self.tool if name != "type"}
        return {"type": "function", "function": {**function, "name": self.name}}


def _tools(value: object) -> object:
    """Each without the fields that pass by being empty, and hosted ones refused by their names."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        return value
    return [_plain_tool(tool, "tools", i) for i, tool in enumerate(value)]


def _plain_tool(tool: Any, *place: str | int) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str):
        param = field_path(place if not isinstance(tool, dict) else [*place, "type"])
        needed = "a string" if isinstance(tool, dict) else "an object"
        raise RequestError(f"{param}: must be {needed}", param=param)
    if kind == "namespace" and len(place) == 2:
        tools = tool.get("tools")
        plain = without_unsupported(NamespaceTool, tool, {}, *place)
        if isinstance(tools, list) and len(tools) <= MAX_TOOLS:
            plain = {**plain, "tools": [_plain_tool(one, *place, "tools", i) for i, one in enumerate(tools)]}
        return plain
    if kind != "function":
        param = field_path([*place, "type"])
        message = f"{param}: tools of type {kind!r} are not supported, only 'function': this server runs none"
        raise UnsupportedFieldError(message, param=param)
    return without_unsupported(FunctionTool, tool, FunctionTool.UNSUPPORTED, *place)


def _tool_tag(tool: Any) -> str:
    return UNSEEN + str(tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None))


_Tool = Annotated[
    Annotated[FunctionTool, Tag(f"{UNSEEN}function")] | Annotated[NamespaceTool, Tag(f"{UNSEEN}namespace")],
    Discriminator(_tool_tag),
]
_Tools = Annotated[list[_Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
Tools = Annotated[_Tools, BeforeValidator(_tools, json_schema_input_type=_Tools)]

_Word = Literal["none", "auto", "required"]


class NamedFunction(Part):
    """A function by its name: the one that has to be called, or one that may be."""

    type: Literal["function"]
    name: FunctionName


class AllowedFunctions(Part):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS, description="All are told of.")


class _FunctionChoice(Part):
    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    name: FunctionName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedFunction] | None = Field(None, min_length=1, max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        for name, kind in (("name", "function"), ("mode", "allowed_tools"), ("tools", "allowed_tools")):
            if (getattr(self, name) is None) == (self.type == kind):
                param = f"tool_choice.{name}"
                how = "goes with" if self.type != kind else "is missing in"
                raise RequestError(f"{param} {how} a tool_choice of type {kind!r}", param=param)
        return self

    def as_chat(self) -> Any:
        """The choice as chat completions have it."""
        if self.type == "function":
            return {"type": "function", "function": {"name": self.name}}
        if self.type == "allowed_tools":
            tools = [{"type": "function", "function": {"name": tool.name}} for tool in self.tools or ()]
            return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": tools}}
        return self.type

    def as_told(self) -> Any:
        """The choice as answers repeat it."""
        return self.model_dump(exclude_none=True) if self.name or self.tools else self.type


def _choice(value: object) -> object:
    """A word as an object of this type, so that errors inside of objects have one place."""
    if isinstance(value, str) and value in get_args(_Word):
        return {"type": value}
    if isinstance(value, dict):
        if (kind := value.get("type")) in ("function", "allowed_tools"):
            return value
        if isinstance(kind, str) and kind not in get_args(_Word):
            raise UnsupportedFieldError(
                f"tool_choice.type: {kind!r} is not supported, only 'function' and 'allowed_tools'",
                param="tool_choice.type",
            )
    raise ValueError("must be 'none', 'auto', 'required', or an object of type 'function' or 'allowed_tools'")


ToolChoice = Annotated[
    _FunctionChoice, BeforeValidator(_choice, json_schema_input_type=_Word | NamedFunction | AllowedFunctions)
]


class TextFormat(Body):
    """The form of an answer."""

    PATH = ("text", "format")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="No effect: the schema is enforced either way.")
    description: str | None = Field(None, description="No effect: the model is told nothing of the schema.")

    @model_validator(mode="after")
    def _fields_go_with_the_type(self) -> Self:
        fields = {"name": self.name, "schema": self.schema_}
        others = {"strict": self.strict, "description": self.description}
        for name, value in (fields if self.type == "json_schema" else {**fields, **others}).items():
            if (value is None) == (self.type == "json_schema"):
                param = f"text.format.{name}"
                how = "is missing" if value is None else "goes"
                raise RequestError(f"{param} {how} with text.format.type 'json_schema'", param=param)
        return self

    def as_told(self) -> dict[str, Any]:
        """The format as answers repeat it."""
        told = {name.removesuffix("_"): value for name, value in self}
        return {name: value for name, value in told.items() if value is not None}

    def as_chat(self) -> dict[str, Any]:
        """As `response_format`."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}


class TextConfig(Body):
    PATH = ("text",)
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class Reasoning(Body):
    PATH = ("reasoning",)
    # `auto` leaves it to the server whether there is a summary, and here is none: thoughts come as they are.
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "context": ("auto",),
        "generate_summary": ("auto",),
        "mode": ("standard",),
        "summary": ("auto",),
    }

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponseStreamOptions(Body):
    PATH = ("stream_options",)
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {"include_obfuscation": (False,)}


def _included(value: object) -> object:
    for i, name in enumerate(value if isinstance(value, list) else ()):
        if isinstance(name, str) and name not in (LOGPROBS, ENCRYPTED):
            param = f"include[{i}]"
            message = f"{param}: {name!r} is not supported, only {LOGPROBS!r} and {ENCRYPTED!r}"
            raise UnsupportedFieldError(message, param=param)
    return value


_Included = Annotated[
    list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field(max_length=16)
]
Include = Annotated[_Included, BeforeValidator(_included, json_schema_input_type=_Included)]

_KEPT_NOWHERE: dict[str, str] = {
    "conversation": "send its items themselves as `input`",
    "previous_response_id": "send the items of what came before, answers' `output` too, in `input`",
    "prompt": "send what it holds as `instructions` and `input`",
}
"""Fields that refer to what another server would keep, and what to do instead."""


class ResponsesRequest(SamplingBody):
    """Body of POST /v1/responses."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **UNSUPPORTED_EVERYWHERE,
        # OpenAI's
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": ({},),
        "prompt_cache_retention": ("in_memory",),
        "store": (False,),
        "truncation": ("disabled",),
        # vLLM's
        "ec_transfer_params": (),
        "enable_response_messages": (False,),
        "media_io_kwargs": ({},),
        "mm_payload": (),
        "mm_processor_kwargs": ({},),
        "previous_input_messages": ([],),
        "return_mm_kwargs": (),
    }
    NO_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {"client_metadata", "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"}
    )

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream_options: ResponseStreamOptions | None = None
    include: Include | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    client_metadata: dict[str, str] | None = Field(None, description="No effect: Codex sends it.")
    metadata: Metadata | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="No effect.")

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_kept(cls, data: Any) -> Any:
        for name, instead in _KEPT_NOWHERE.items() if isinstance(data, dict) else ():
            if data.get(name) is not None:
                message = f"{name} is not supported: this server keeps no responses; {instead}"
                raise UnsupportedFieldError(message, param=name)
        if isinstance(data, dict) and data.get("store") is True:
            message = "store: this server keeps no responses: leave it out, or send false"
            raise UnsupportedFieldError(message, param="store")
        return data

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.top_logprobs and not self.wants_logprobs:
            message = f"top_logprobs goes with {LOGPROBS!r} in include"
            raise RequestError(message, param="top_logprobs")
        may_call = self.tools and not (self.tool_choice and self.tool_choice.type == "none")
        if self.wants_logprobs and may_call:
            message = f"include: {LOGPROBS!r} does not go with tools that may be called"
            raise UnsupportedFieldError(message, param="include")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def wants_encrypted(self) -> bool:
        return ENCRYPTED in (self.include or ())

    @property
    def functions(self) -> list[PlacedTool]:
        """The functions that may be called, in the order in which the model is told of them."""
        found: list[PlacedTool] = []
        for i, tool in enumerate(self.tools or ()):
            place = f"tools[{i}]"
            if isinstance(tool, NamespaceTool):
                inside = enumerate(tool.tools)
                found += [PlacedTool(f"{place}.tools[{j}]", one, tool.name) for j, one in inside]
            else:
                found.append(PlacedTool(place, tool))
        return found

    def in_own_terms(self, error: RequestError) -> RequestError:
        """An error about the chat completion that this stands for, told by the names of this API's fields."""
        places = [tool.place for tool in self.functions]

        def told(text: str) -> str:
            for pattern, ours in _TERMS:
                text = pattern.sub(ours, text)
            return _TOOL.sub(lambda found: places[int(found[1])], text)

        error.args = (told(str(error)), *error.args[1:])
        error.param = error.param and told(error.param)
        return error

    def as_chat(self) -> ChatRequest:
        """The chat completion that answers it.

        Raises:
            RequestError: fields that do not go together, or a value out of range: see `in_own_terms`.
        """
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        told_format = self.text and self.text.format
        body: dict[str, Any] = {
            **{name: getattr(self, name) for name in _SAME},
            "messages": instructions + as_messages(self.input),
            "continue_final_message": goes_on(self.input) or None,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
            "tools": [tool.as_chat() for tool in self.functions],
            # Codex and others say it beside an empty list, where at most one call is what there is.
            "parallel_tool_calls": self.parallel_tool_calls if self.functions else None,
            "tool_choice": self.tool_choice and self.tool_choice.as_chat(),
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "response_format": told_format and told_format.as_chat(),
        }
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as invalid:  # what only shows when items are put together
            first = invalid.errors()[0]
            place, reason = field_path(first["loc"]), in_json_words(first["msg"])
            if place == "messages":  # of which there are fewer than items
                reason = reason.replace("item", "message")
            raise RequestError(f"{place}: {reason}", param=place) from invalid


_SAME = (
    *SamplingBody.model_fields,
    "chat_template_kwargs",
    "include_reasoning",
    "structured_outputs",
)
"""Fields that chat completions have too."""

_TERMS = [
    (re.compile(f"(?<!'){pattern}"), ours)  # in quotes stands what the client calls so
    for pattern, ours in (
        (r"\bmax_(?:completion_)?tokens\b", "max_output_tokens"),
        (r"\bresponse_format\.json_schema\b", "text.format"),
        (r"\bresponse_format\b", "text.format"),
        (r"\breasoning_effort\b", "reasoning.effort"),
        (r"\btool_choice\.allowed_tools\b", "tool_choice"),
        (r"\btool_choice\.function\b", "tool_choice"),
        (r"^(?:messages(?:\[\d+\])?[\w.\[\]]*|prompt)(?=:|$)", "input"),
        (r"^continue_final_message(?=:|$)", "input"),
    )
]
_TOOL = re.compile(r"\btools\[(\d+)\](?:\.function\b|(?=:|$))")
