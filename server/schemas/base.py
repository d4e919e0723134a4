"""What request bodies share: strictness, and the fields of every request that generates text.

A field is supported (a model field), or without effect and documented as such (`NO_EFFECT`), or refused by
name unless it has its default value (`UNSUPPORTED`), or unknown and refused.
"""

from __future__ import annotations

import functools
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine.errors import RequestError
from engine.sampling_params import MAX_BAD_WORDS, MAX_LOGPROBS
from engine.types import Acceptance, MedusaParams, SamplingParams
from server.errors import UnsupportedFieldError, field_path

__all__ = [
    "UNSUPPORTED_EVERYWHERE",
    "Body",
    "GenerationBody",
    "GenerationDefaults",
    "MedusaOptions",
    "SamplingBody",
    "StreamOptions",
    "TextPart",
    "at_most",
    "first",
    "parts",
    "without_unsupported",
]

MAX_TEMPERATURE = 2.0
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 2048
MAX_METADATA = 16
MAX_INT64 = 2**63 - 1

UNSUPPORTED_EVERYWHERE: dict[str, tuple[object, ...]] = {
    # vLLM's
    "allowed_token_ids": (),
    "best_of": (1,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""Known fields that neither endpoint has, and the values that pass besides null."""


class GenerationDefaults(Protocol):
    """What a model's own generation settings say: values of fields a request leaves out, where not None, and
    what ends an answer."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class Body(BaseModel):
    """A part of a request body: no coercion, no NaN, no field that is not understood.

    `PATH` is where it stands in the request, for the names in errors; `UNSUPPORTED` its known fields that
    are refused, and the values that pass besides null; `NO_EFFECT` its fields that are checked only.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    PATH: ClassVar[tuple[str, ...]] = ()
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    NO_EFFECT: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        return without_unsupported(cls, data, cls.UNSUPPORTED, *cls.PATH)


class TextPart(BaseModel):
    """A content part; only text is understood."""

    model_config = Body.model_config

    type: Literal["text"]
    text: str


def parts(value: object) -> object:
    """Content as parts: a string is one."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be text or a list of parts")
    return value


def first(*values: Any) -> Any:
    """The first value that is not None, or None."""
    for value in values:
        if value is not None:
            return value
    return None


def at_most(entries: int) -> Callable[[object], object]:
    """A validator that refuses larger objects without looking into them."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > entries:
            raise ValueError(f"must have at most {entries} entries, not {len(value)}")
        return value

    return check


def _listed(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of strings")
    return value


def _biases(value: object) -> object:
    """JSON's keys are strings: decimal token ids."""
    if not isinstance(value, dict):
        return value
    if wrong := [key for key in value if not _TOKEN_ID.fullmatch(str(key))]:
        raise ValueError(f"{wrong[0]!r} is not a token id")
    return {int(key): bias for key, bias in value.items()}


_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")

StopString = Annotated[str, Field(min_length=1)]
# Bounds come before a look at each element, and the first bad one ends it: a body has room for a million.
_Stops = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
StopStrings = Annotated[_Stops, BeforeValidator(_listed, json_schema_input_type=StopString | _Stops)]
_Biases = Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)]
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]],
    BeforeValidator(_biases, json_schema_input_type=_Biases),
    BeforeValidator(at_most(MAX_LOGIT_BIAS), json_schema_input_type=_Biases),
]


class StreamOptions(Body):
    PATH = ("stream_options",)
    # Obfuscation pads chunks against traffic analysis; leaving it out is a default of false.
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise RequestError(
                "stream_options.continuous_usage_stats goes with stream_options.include_usage",
                param="stream_options.continuous_usage_stats",
            )
        return self


class MedusaOptions(Body):
    """How the request's drafts are verified; not in OpenAI's API."""

    PATH = ("medusa",)

    acceptance: Literal["exact", "typical"] | None = None
    epsilon: float | None = None
    delta: float | None = None
    max_tree_size: int | None = None

    def params(self) -> MedusaParams:
        """The engine's parameters.

        Raises:
            RequestError: a value out of range, or a threshold that would have no effect.
        """
        defaults = MedusaParams()
        params = MedusaParams(
            acceptance=Acceptance(first(self.acceptance, defaults.acceptance)),
            epsilon=first(self.epsilon, defaults.epsilon),
            delta=first(self.delta, defaults.delta),
            max_tree_size=self.max_tree_size,
        )
        if params.acceptance is Acceptance.EXACT:
            for name in ("epsilon", "delta"):
                if getattr(params, name) != getattr(defaults, name):
                    raise UnsupportedFieldError(
                        f"medusa.{name} goes with medusa.acceptance 'typical'", param=f"medusa.{name}"
                    )
        return params


class SamplingBody(Body):
    """The fields of every request that generates text, by whatever API."""

    model: str | None = Field(None, description="None: the served one.")
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0.0, le=MAX_TEMPERATURE)
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, description="0 or -1 keeps all tokens.")
    min_p: float | None = None
    seed: int | None = None
    stop: StopStrings | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=MAX_BAD_WORDS)
    priority: int | None = Field(None, ge=-MAX_INT64 - 1, le=MAX_INT64)
    cache_salt: str | None = Field(None, min_length=1)
    medusa: MedusaOptions | None = None

    user: str | None = Field(None, description="No effect.")


class GenerationBody(SamplingBody):
    """The fields that chat and text completions share."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_INT64)

    @model_validator(mode="after")
    def _stream_combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not allowed when stream is true", param="prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens must be at least 1, or -1 for what fits the context",
                param="truncate_prompt_tokens",
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def output_limit(self) -> int | None:
        """Most tokens to generate, by whichever name; None runs to the context's end."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token; None reports nothing."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs

    def sampling(
        self,
        defaults: GenerationDefaults,
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
        top_k = first(self.top_k, defaults.top_k, 0)
        return SamplingParams(
            temperature=first(self.temperature, defaults.temperature, 1.0),
            top_p=first(self.top_p, defaults.top_p, 1.0),
            top_k=max(top_k, 0),
            min_p=first(self.min_p, defaults.min_p, 0.0),
            seed=self.seed,
            max_tokens=self.output_limit,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            n=first(self.n, 1),
            presence_penalty=first(self.presence_penalty, 0.0),
            frequency_penalty=first(self.frequency_penalty, 0.0),
            repetition_penalty=first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            logit_bias=tuple((self.logit_bias or {}).items()),
            min_tokens=first(self.min_tokens, 0),
            bad_words=tuple(bad_words),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )


def without_unsupported(
    model: type[BaseModel], data: Any, unsupported: Mapping[str, tuple[object, ...]], *location: str | int
) -> Any:
    """The body without unsupported fields that are null or default.

    Raises:
        UnsupportedFieldError: a field that is not known, or has a value that would be ignored.
    """
    if not isinstance(data, dict):
        return data
    fields = _names_in_json(model)
    if fields.issuperset(data):
        return data
    known = {}
    for name, value in data.items():
        if name in fields:
            known[name] = value
            continue
        param = field_path([*location, str(name)])
        if name not in unsupported:
            raise UnsupportedFieldError(f"Unrecognized request argument: {param}", param=param)
        if value is not None and not any(_same(value, default) for default in unsupported[name]):
            pass_by = " or ".join(["null", *(json.dumps(default) for default in unsupported[name])])
            raise UnsupportedFieldError(
                f"{param} is not supported: leave it out, or send {pass_by}", param=param
            )
    return known


@functools.cache
def _names_in_json(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


def _same(value: object, default: object) -> bool:
    """Equal as JSON: 0 and 0.0 are, false and 0 are not."""
    return isinstance(value, bool) == isinstance(default, bool) and value == default
