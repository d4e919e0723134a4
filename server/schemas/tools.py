"""The parts of bodies that are about tools: OpenAI's function calling."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from engine.errors import RequestError
from engine.tool_prompt import arguments_told
from server.schemas.base import Body

__all__ = ["MAX_TOOLS", "FunctionName", "MessageToolCall", "Part", "Tool", "ToolChoice"]

MAX_TOOLS = 128
MAX_CALLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Part(BaseModel):
    """Strict as a `Body`; pydantic names the place where something is wrong."""

    model_config = Body.model_config


class FunctionDefinition(Part):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of an object; none: no arguments."
    )
    strict: bool | None = Field(
        None, description="The arguments follow the schema, also where the model may choose not to call."
    )


class Tool(Part):
    type: Literal["function"]
    function: FunctionDefinition

    def as_template_input(self) -> dict[str, Any]:
        """The tool as chat templates know it."""
        function = self.function
        told: dict[str, Any] = {"name": function.name}
        if function.description is not None:
            told["description"] = function.description
        told["parameters"] = function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": told}


class _Named(Part):
    name: FunctionName


class NamedTool(Part):
    """A function by its name: the one that has to be called, or one that may be."""

    type: Literal["function"]
    function: _Named


class _Allowed(Part):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS, description="All are told of.")


class AllowedTools(Part):
    """A choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: _Allowed


_Word = Literal["none", "auto", "required"]


def _as_object(value: object) -> object:
    """A word as an object of this type, so that errors inside of objects have one place."""
    if isinstance(value, str) and value in get_args(_Word):
        return {"type": value}
    if isinstance(value, dict) and value.get("type") in ("function", "allowed_tools"):
        return value
    raise ValueError("must be 'none', 'auto', 'required', or an object of type 'function' or 'allowed_tools'")


class _ToolChoice(Part):
    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: _Named | None = None
    allowed_tools: _Allowed | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Self:
        for name in ("function", "allowed_tools"):
            if (getattr(self, name) is None) == (self.type == name):
                param = f"tool_choice.{name}"
                how = "goes with" if self.type != name else "is missing in"
                raise RequestError(f"{param} {how} a tool_choice of type {name!r}", param=param)
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        mode = self.type if self.allowed_tools is None else self.allowed_tools.mode
        return mode in ("required", "function")

    @property
    def names(self) -> dict[str, str]:
        """The functions that may be called, by where they are named; empty for all of them."""
        if self.function is not None:
            return {"function.name": self.function.name}
        tools = [] if self.allowed_tools is None else self.allowed_tools.tools
        return {f"allowed_tools.tools[{i}].function.name": tool.function.name for i, tool in enumerate(tools)}


ToolChoice = Annotated[
    _ToolChoice, BeforeValidator(_as_object, json_schema_input_type=_Word | NamedTool | AllowedTools)
]


class _CalledFunction(Part):
    name: str = Field(min_length=1)
    arguments: str
    parsed_arguments: Any = Field(None, description="No effect: OpenAI's client puts it there.")


class MessageToolCall(Part):
    """A call that an assistant's message made."""

    id: str
    type: Literal["function"]
    function: _CalledFunction
    index: int | None = Field(None, description="No effect: it comes from a stream's chunks.")

    def as_template_input(self) -> dict[str, Any]:
        """The call as chat templates know it: with an object of arguments."""
        told = arguments_told(self.function.arguments)
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": told}}
