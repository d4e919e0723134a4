"""The parts of bodies that are about tools: OpenAI's function calling."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.schemas.base import Body

__all__ = ["MAX_TOOLS", "MessageToolCall", "NamedTool", "Tool"]

MAX_TOOLS = 128
MAX_CALLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class _Part(BaseModel):
    """Strict as a `Body`; pydantic names the place where something is wrong."""

    model_config = Body.model_config


class FunctionDefinition(_Part):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of an object; none: no arguments."
    )
    strict: bool | None = Field(
        None, description="The arguments follow the schema, also where the model may choose not to call."
    )


class Tool(_Part):
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


class _Named(_Part):
    name: FunctionName


class NamedTool(_Part):
    """A choice of the one function that has to be called."""

    type: Literal["function"]
    function: _Named


class _CalledFunction(_Part):
    name: str = Field(min_length=1)
    arguments: str
    parsed_arguments: Any = Field(None, description="No effect: OpenAI's client puts it there.")


class MessageToolCall(_Part):
    """A call that an assistant's message made."""

    id: str
    type: Literal["function"]
    function: _CalledFunction
    index: int | None = Field(None, description="No effect: it comes from a stream's chunks.")

    def as_template_input(self) -> dict[str, Any]:
        """The call as chat templates know it: with an object of arguments.

        Where a model's mistake comes back, they are the text that it wrote.
        """
        arguments = self.function.arguments
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        told = value if isinstance(value, dict) else arguments
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": told}}
