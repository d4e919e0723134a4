"""Bodies of POST /tokenize and POST /detokenize, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from engine.errors import RequestError
from server.schemas.base import Body
from server.schemas.chat import Conversation

__all__ = ["DetokenizeRequest", "TokenizeRequest"]

_ONLY_WITH_MESSAGES = (
    *("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort", "tools"),
)


class TokenizeRequest(Conversation):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "chat_template": (),
        "mm_processor_kwargs": ({},),
    }

    model: str | None = None
    prompt: str | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if self.prompt is not None:
            for name in _ONLY_WITH_MESSAGES:
                if getattr(self, name) is not None:
                    raise RequestError(f"{name} goes with messages", param=name)
        return self


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
