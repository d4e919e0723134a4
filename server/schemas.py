"""Request bodies, strict: nothing is accepted and ignored.

A field is supported (a model field here), or without effect and documented as such (`NO_EFFECT`), or
refused by name unless it has its default value (`UNSUPPORTED`), or unknown and refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine.errors import RequestError
from engine.types import MAX_BAD_WORDS, MAX_LOGPROBS, Acceptance, MedusaParams, SamplingParams
from server.errors import UnsupportedFieldError, field_path

__all__ = [
    "NO_EFFECT",
    "UNSUPPORTED",
    "ChatMessage",
    "ChatRequest",
    "MedusaOptions",
    "Prediction",
    "SamplingDefaults",
    "StreamOptions",
    "TokenizeRequest",
]

MAX_TEMPERATURE = 2.0
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024

NO_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
"""Fields of a chat completion that are checked and then have no effect, as the API's documentation says."""

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # OpenAI's
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Known fields of a chat completion that are refused, and the values that pass besides null."""

_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""An assistant's message may come back as the client got it, so its empty fields pass."""


class SamplingDefaults(Protocol):
    """What a model's own generation settings say about fields a request leaves out; None says nothing."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...


class _Body(BaseModel):
    """A request body: no coercion, no NaN, no field that is not understood."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Body):
    """A content part; only text is understood."""

    type: Literal["text"]
    text: str


def _parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _biases(value: object) -> object:
    """JSON's keys are strings: decimal token ids."""
    if not isinstance(value, dict):
        return value
    if wrong := [key for key in value if not _TOKEN_ID.fullmatch(str(key))]:
        raise ValueError(f"{wrong[0]!r} is not a token id")
    return {int(key): bias for key, bias in value.items()}


_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")

Content = Annotated[
    list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart]), Field(min_length=1)
]
StopString = Annotated[str, Field(min_length=1)]
StopStrings = Annotated[
    list[StopString],
    BeforeValidator(_listed, json_schema_input_type=str | list[StopString]),
    Field(max_length=MAX_STOP_STRINGS),
]


LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]],
    BeforeValidator(_biases, json_schema_input_type=dict[str, float]),
    Field(max_length=MAX_LOGIT_BIAS),
]


class ChatMessage(_Body):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content

    def as_template_input(self) -> dict[str, Any]:
        """The message with its text parts joined by newlines, as in vLLM."""
        return {"role": self.role, "content": "\n".join(part.text for part in self.content)}


class StreamOptions(_Body):
    include_usage: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        # Obfuscation pads chunks against traffic analysis; leaving it out is a default of false.
        unsupported = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
        return _without_unsupported(cls, data, unsupported, "stream_options")


class Prediction(_Body):
    """OpenAI's predicted output: text that the answer is expected to repeat."""

    type: Literal["content"]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        return _without_unsupported(cls, data, {}, "prediction")

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class MedusaOptions(_Body):
    """How the request's drafts are verified; not in OpenAI's API."""

    acceptance: Literal["exact", "typical"] | None = None
    epsilon: float | None = None
    delta: float | None = None
    max_tree_size: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        return _without_unsupported(cls, data, {}, "medusa")

    def params(self) -> MedusaParams:
        """The engine's parameters.

        Raises:
            RequestError: a value out of range, or a threshold that would have no effect.
        """
        defaults = MedusaParams()
        params = MedusaParams(
            acceptance=Acceptance(_first(self.acceptance, defaults.acceptance)),
            epsilon=_first(self.epsilon, defaults.epsilon),
            delta=_first(self.delta, defaults.delta),
            max_tree_size=self.max_tree_size,
        )
        if params.acceptance is Acceptance.EXACT:
            for name in ("epsilon", "delta"):
                if getattr(params, name) != getattr(defaults, name):
                    raise UnsupportedFieldError(
                        f"medusa.{name} goes with medusa.acceptance 'typical'", param=f"medusa.{name}"
                    )
        return params


class ChatRequest(_Body):
    """Body of POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0.0, le=MAX_TEMPERATURE)
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, description="0 or -1 keeps all tokens.")
    min_p: float | None = None
    seed: int | None = None
    stop: StopStrings | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=MAX_BAD_WORDS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prediction: Prediction | None = None
    cache_salt: str | None = Field(None, min_length=1)
    medusa: MedusaOptions | None = None

    user: str | None = Field(None, description="No effect.")
    metadata: dict[str, str] | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="No effect.")
    store: Literal[False] | None = Field(None, description="No effect.")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        data = _without_unsupported(cls, data, UNSUPPORTED)
        return _with_plain_messages(data)

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError(
                "max_tokens and max_completion_tokens cannot both be set", param="max_completion_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not allowed when stream is true", param="prompt_logprobs")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def prediction_text(self) -> str:
        """What the answer is predicted to hold; empty for no prediction."""
        return "" if self.prediction is None else self.prediction.text

    def sampling(
        self,
        defaults: SamplingDefaults,
        vocab_size: int,
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> SamplingParams:
        """The engine's parameters: the request's values, else the model's defaults, else OpenAI's.

        Args:
            defaults: the model's.
            vocab_size: token ids are below it.
            bad_words: the field's tokens.

        Raises:
            RequestError: a value out of range, with the field's name as the client wrote it.
        """
        for field, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            if beyond := [token for token in tokens or () if token >= vocab_size]:
                message = f"{field}: {beyond[0]} is not a token of this model (it has {vocab_size})"
                raise RequestError(message, param=field)
        top_k = _first(self.top_k, defaults.top_k, 0)
        try:
            return SamplingParams(
                temperature=_first(self.temperature, defaults.temperature, 1.0),
                top_p=_first(self.top_p, defaults.top_p, 1.0),
                top_k=max(top_k, 0),
                min_p=_first(self.min_p, defaults.min_p, 0.0),
                seed=self.seed,
                max_tokens=_first(self.max_completion_tokens, self.max_tokens),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                n=_first(self.n, 1),
                presence_penalty=_first(self.presence_penalty, 0.0),
                frequency_penalty=_first(self.frequency_penalty, 0.0),
                repetition_penalty=_first(self.repetition_penalty, 1.0),
                logit_bias=tuple((self.logit_bias or {}).items()),
                min_tokens=_first(self.min_tokens, 0),
                bad_words=tuple(bad_words),
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                prompt_logprobs=self.prompt_logprobs,
            )
        except RequestError as error:
            if self.max_completion_tokens is None or "max_tokens" not in str(error):
                raise
            # The client knows the bound by its other name.
            param = "max_completion_tokens" if error.param == "max_tokens" else error.param
            message = str(error).replace("max_tokens", "max_completion_tokens")
            raise RequestError(message, param=param) from None


class TokenizeRequest(_Body):
    """Body of POST /tokenize, in vLLM's shape: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        unsupported: dict[str, tuple[object, ...]] = {
            "chat_template": (),
            "chat_template_kwargs": ({},),
            "continue_final_message": (False,),
            "mm_processor_kwargs": ({},),
            "tools": ([],),
        }
        data = _without_unsupported(cls, data, unsupported)
        return _with_plain_messages(data)

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise UnsupportedFieldError(
                "add_special_tokens is not supported with messages: the chat template adds them",
                param="add_special_tokens",
            )
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise RequestError("add_generation_prompt goes with messages", param="add_generation_prompt")
        return self


def _first(*values: Any) -> Any:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def _with_plain_messages(data: Any) -> Any:
    """Messages without the fields that pass by being empty, each checked by its own path."""
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        return data
    messages = [
        _without_unsupported(ChatMessage, message, _UNSUPPORTED_IN_MESSAGE, "messages", i)
        for i, message in enumerate(data["messages"])
    ]
    return {**data, "messages": messages}


def _without_unsupported(
    model: type[BaseModel], data: Any, unsupported: Mapping[str, tuple[object, ...]], *location: str | int
) -> Any:
    """The body without unsupported fields that are null or default.

    Raises:
        UnsupportedFieldError: a field that is not known, or has a value that would be ignored.
    """
    if not isinstance(data, dict):
        return data
    known = {}
    for name, value in data.items():
        param = field_path([*location, str(name)])
        if name in model.model_fields:
            known[name] = value
        elif name not in unsupported:
            raise UnsupportedFieldError(f"Unrecognized request argument: {param}", param=param)
        elif value is not None and not any(_same(value, default) for default in unsupported[name]):
            raise UnsupportedFieldError(
                f"{param} is not supported: leave it out, or null, or its default", param=param
            )
    return known


def _same(value: object, default: object) -> bool:
    """Equal as JSON: 0 and 0.0 are, false and 0 are not."""
    return isinstance(value, bool) == isinstance(default, bool) and value == default
