"""Response bodies. Completions are dumped with `exclude_unset`: a null is sent exactly where one was set."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatCompletion",
    "ChatDelta",
    "ChatFinishReasonName",
    "ChatLogprobs",
    "ChunkChoice",
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionChunkChoice",
    "CompletionLogprobs",
    "CompletionTokensDetails",
    "DetokenizeResponse",
    "ErrorBody",
    "ErrorObject",
    "FinishReasonName",
    "ModelCard",
    "ModelList",
    "PromptLogprob",
    "PromptTokensDetails",
    "ResponseMessage",
    "StopReason",
    "TokenLogprob",
    "TokenizeResponse",
    "TokenizerInfo",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallFunction",
    "ToolCallFunctionDelta",
    "TopLogprob",
    "Usage",
]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Sent where the request had a prediction, or the answer may have begun with a thought."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int
    audio_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability; `bytes` is null for a special token, which is no text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry per token of the text it goes with."""

    content: list[TokenLogprob]
    refusal: None


class PromptLogprob(BaseModel):
    """In vLLM's form; the key it stands under is the token's id."""

    logprob: float
    rank: int
    decoded_token: str


FinishReasonName = Literal["stop", "length"]

ChatFinishReasonName = Literal["stop", "length", "tool_calls"]

StopReason = str | int | None
"""vLLM's: the request's stop string or stop token id that ended a choice; null where neither did."""


class ToolCallFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of one of the request's functions; the arguments are JSON if the model wrote JSON."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ResponseMessage(BaseModel):
    """Content is null where calls or a thought are all there is; without calls there is no field of them.

    The thought has the name of DeepSeek's API and llama.cpp, and that of vLLM; where thoughts are told from
    content, both fields are there, null where there was none.
    """

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReasonName
    stop_reason: StopReason


class ChatCompletion(BaseModel):
    """Answer of a chat completion that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = None


class ToolCallFunctionDelta(BaseModel):
    """The name comes with a call's first arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """More of the call with this index."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: ToolCallFunctionDelta


class ChatDelta(BaseModel):
    """More of the thought comes under both of its names."""

    role: Literal["assistant"] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReasonName | None
    stop_reason: StopReason = None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """One entry per token of the text in each list; null where nothing predicts the token.

    A token that is not text by itself, a part of a character, is named by its bytes: `bytes:\\xe2\\x80`.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName
    stop_reason: StopReason
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = None


class Completion(BaseModel):
    """Answer of a text completion that is not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage


class CompletionChunkChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None
    stop_reason: StopReason = None


class CompletionChunk(BaseModel):
    """One event of a streamed text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "medusa-serve"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What lm-eval asks a server of its tokenizer, and some of what vLLM tells."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class ErrorObject(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error, and the event that ends a stream with one."""

    error: ErrorObject
