"""Body of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from engine.errors import RequestError
from engine.sampling_params import MAX_LOGPROBS
from server.schemas.base import UNSUPPORTED_EVERYWHERE, first
from server.schemas.structured import ConstrainedBody

__all__ = ["CompletionRequest", "PromptInput"]

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, and vLLM's."""

PromptInput = str | list[int]
"""One prompt: text, or token ids."""


def _prompts(value: object) -> object:
    """One of OpenAI's four forms as a list of prompts.

    By hand: a union would try each form on every element, and report each that fails.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(one) is int for one in value):
            return [value]
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and all(type(token) is int for token in one) for one in value):
            return value
    raise ValueError("must be text, a list of texts, a list of token ids, or a list of lists of token ids")


_TokenId = Annotated[int, Field(ge=0)]
_Tokens = Annotated[list[_TokenId], Field(min_length=1)]
Prompts = Annotated[
    list[Any],
    BeforeValidator(
        _prompts,
        json_schema_input_type=str
        | _Tokens
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[_Tokens], Field(min_length=1)],
    ),
]


class CompletionRequest(ConstrainedBody):
    """Body of POST /v1/completions."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **UNSUPPORTED_EVERYWHERE,
        # OpenAI's: text to insert before, which takes a model made for it
        "suffix": ("",),
        # vLLM's
        "prompt_embeds": (),
    }
    NO_EFFECT: ClassVar[frozenset[str]] = frozenset({"user"})

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens must be at least 1, or 0 with echo", param="max_tokens")
        return self

    @property
    def prompts(self) -> list[PromptInput]:
        return self.prompt

    @property
    def echo_only(self) -> bool:
        """True where nothing is to be generated. The engine still draws one token, which is dropped."""
        return self.max_tokens == 0

    @property
    def output_limit(self) -> int | None:
        limit: int = 1 if self.echo_only else first(self.max_tokens, DEFAULT_MAX_TOKENS)
        return limit

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)
