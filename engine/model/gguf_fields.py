"""What a GGUF's metadata has to be for the rest to read it, key by key: files are made by many tools."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.errors import UnsupportedModelError

__all__ = ["checked_fields", "same_in_all_layers"]


class _Kind(NamedTuple):
    told: str
    holds: Callable[[Any], bool]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_SIZE = _Kind("a whole number above 0", _is_size)
_COUNT = _Kind("a whole number", _is_count)
_COUNTS = _Kind(
    "a whole number, or a list of these",
    lambda value: _is_count(value) or (_all(_is_count)(value) and bool(value)),
)
_NUMBER = _Kind("a finite number", _is_number)
_SWITCH = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("a text", _is_text)
_TEXTS = _Kind("a list of texts", _all(_is_text))

_KINDS = {
    "general.architecture": _TEXT,
    "split.count": _COUNT,
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.tokens": _TEXTS,
    "tokenizer.ggml.merges": _TEXTS,
    "tokenizer.ggml.token_type": _Kind("a list of whole numbers", _all(_is_count)),
    "tokenizer.ggml.scores": _Kind("a list of numbers", _all(lambda value: type(value) in (int, float))),
    "tokenizer.ggml.add_bos_token": _SWITCH,
    "tokenizer.ggml.add_space_prefix": _SWITCH,
    "tokenizer.chat_template": _TEXT,
    "tokenizer.chat_templates": _TEXTS,
}
_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "unknown"))
_PADDING = "tokenizer.ggml.padding_token_id"
_OF_EACH_TOKEN = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
_NUMBERS = (
    *("attention.clamp_kqv", "expert_weights_scale"),
    *("attention.layer_norm_rms_epsilon", "attention.scale", "attention.temperature_scale"),
    *("embedding_scale", "residual_scale", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.attn_factor", "rope.scaling.factor"),
    *(f"rope.scaling.yarn_{name}" for name in ("attn_factor", "beta_fast", "beta_slow", "ext_factor")),
    "rope.scaling.yarn_log_multiplier",
)
_OF_ARCHITECTURE = {
    **dict.fromkeys(("block_count", "context_length", "embedding_length", "feed_forward_length"), _SIZE),
    **dict.fromkeys(("attention.head_count", "attention.key_length", "rope.dimension_count"), _SIZE),
    "attention.head_count_kv": _Kind(
        "a whole number above 0, or a list of these",
        lambda value: _is_size(value) or (_all(_is_size)(value) and bool(value)),
    ),
    **dict.fromkeys(("expert_feed_forward_length", "expert_used_count"), _COUNTS),
    **dict.fromkeys(("expert_count", "expert_gating_func", "expert_group_count"), _COUNT),
    **dict.fromkeys(("expert_shared_count", "expert_shared_feed_forward_length"), _COUNT),
    **dict.fromkeys(("expert_group_used_count", "leading_dense_block_count", "nextn_predict_layers"), _COUNT),
    "interleave_moe_layer_step": _COUNT,
    "expert_weights_norm": _SWITCH,
    "attention.sliding_window": _COUNT,
    "attention.sliding_window_pattern": _Kind(
        "a whole number above 0, or a list of true and false",
        lambda value: _is_size(value) or _all(lambda each: each in (0, 1))(value),
    ),
    "logit_scale": _Kind("a finite number other than 0", lambda value: _is_number(value) and value != 0),
    **dict.fromkeys(_NUMBERS, _NUMBER),
    "rope.scaling.finetuned": _SWITCH,
    "rope.scaling.original_context_length": _SIZE,
    "rope.scaling.type": _TEXT,
}


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, of which what is there is what it has to be; what is missing is found by who needs it.

    Without a padding token that is none, such as -1 written without a sign: nothing is padded here.

    Raises:
        ValueError: something is of another type, out of range, or not as long as the vocabulary.
    """
    own = f"{fields.get('general.architecture')}."
    for key, value in fields.items():
        kind = _KINDS.get(key) or (_OF_ARCHITECTURE.get(key[len(own) :]) if key.startswith(own) else None)
        if kind is not None and not kind.holds(value):
            raise ValueError(f"{key} must be {kind.told}")
    count = len(fields.get("tokenizer.ggml.tokens", ()))
    for key in _OF_EACH_TOKEN:
        if key in fields and len(fields[key]) != count:
            raise ValueError(f"{key} is of {len(fields[key])} tokens, and there are {count}")
    for key in _TOKENS:
        if key in fields and not _is_token(fields[key], count):
            raise ValueError(f"{key} is none of the {count} tokens: {fields[key]!r:.40}")
    return {key: value for key, value in fields.items() if key != _PADDING or _is_token(value, count)}


def same_in_all_layers(stated: int | list[int], told: str) -> int:
    """What may be a list, where a converter knows models in which layers differ.

    Raises:
        UnsupportedModelError: they do.
    """
    found = set(stated) if isinstance(stated, list) else {stated}
    if len(found) > 1:
        raise UnsupportedModelError(f"a GGUF whose layers differ in {told} is not supported")
    return found.pop()


def _is_token(value: Any, count: int) -> bool:
    return _is_count(value) and value < count
