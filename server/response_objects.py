"""What POST /v1/responses answers with: OpenAI's objects of that API, dumped as the other answers are."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

__all__ = [
    "CallItem",
    "IncompleteDetails",
    "InputTokens",
    "InputTokensDetails",
    "ItemStatus",
    "LogprobEntry",
    "MessageItem",
    "OutputItem",
    "OutputText",
    "OutputTokensDetails",
    "ReasoningItem",
    "ReasoningText",
    "ResponseError",
    "ResponseObject",
    "ResponseUsage",
    "TopLogprobEntry",
]

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputTokens(BaseModel):
    """Of a response that was not asked for."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class TopLogprobEntry(BaseModel):
    """A token and its log-probability; of a special token, which is no text, there are no bytes."""

    token: str
    logprob: float
    bytes: list[int]


class LogprobEntry(TopLogprobEntry):
    top_logprobs: list[TopLogprobEntry]


class OutputText(BaseModel):
    """Text of a message; logprobs are there where they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[LogprobEntry]


class MessageItem(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(BaseModel):
    """What was thought; it has no summary."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: str | None = None


class CallItem(BaseModel):
    """A call of one of the request's functions; the arguments are JSON if the model wrote JSON."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


OutputItem = MessageItem | ReasoningItem | CallItem


class InputTokensDetails(BaseModel):
    """Nobody is charged for what is written to the cache of prefixes: that is 0."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    """Why a response failed, of OpenAI's codes; the message tells more."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class ResponseObject(BaseModel):
    """An answer, whole or as a stream's events have it; much of it repeats the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
