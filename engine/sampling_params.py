"""How the tokens of one request are drawn; plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as SequenceOf
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from engine.errors import RequestError
from engine.vllm_names import SAMPLING, explaining

__all__ = [
    "MAX_BAD_WORDS",
    "MAX_BAD_WORD_TOKENS",
    "MAX_LOGPROBS",
    "MAX_SEED",
    "SamplingParams",
]

MAX_SEED = 2**63 - 1

MAX_LOGPROBS = 20
"""Most alternatives reported beside a token, OpenAI's bound."""

MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 16
"""Bounds of `bad_words`: they live in slot tensors of this shape."""

T = TypeVar("T")


def _with_vllms_names(kind: type[T]) -> type[T]:
    """The class, which says of vLLM's fields that it lacks what takes their place."""
    kind.__init__ = explaining(SAMPLING, RequestError)(kind.__init__)  # type: ignore[method-assign]
    return kind


@_with_vllms_names
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    Order of the logits' adjustments: repetition, frequency and presence penalty, logit_bias, then what is
    forbidden (min_tokens, bad_words). Order of the filters, as in vLLM: temperature, min_p, top_k, top_p,
    renormalise.

    Args:
        temperature: 0 is greedy; at most 2 over HTTP, here 3e38 (what float32 holds).
        top_p: nucleus mass in (0, 1].
        top_k: candidates kept; 0 keeps all.
        min_p: keep tokens with p >= min_p * max(p), in [0, 1].
        seed: draws are a function of (seed, choice index, output position); None gets one at admission. -1
            becomes None: in vLLM and llama.cpp it asks for a random one, and programs send it for that.
        max_tokens: output bound; None runs to the context's end (where vLLM ends after 16).
        stop_token_ids: these end the output as EOS does, and are not part of it as text.
        ignore_eos: go on past the model's EOS ids (stop_token_ids still stop).
        n: number of choices.
        presence_penalty: subtracted from the logit of every token that the output holds, in [-2, 2].
        frequency_penalty: the same, times how often the output holds it, in [-2, 2].
        repetition_penalty: positive logits of tokens in prompt or output are divided by it, negative
            ones multiplied (Keskar et al. 2019); in [1e-44, 3e38] (what float32 holds), 1 is none.
        logit_bias: (token id, bias in [-100, 100]) pairs, added to the logits.
        min_tokens: no EOS or stop token id before so many tokens of output.
        bad_words: token sequences that the output must not hold, at most 64 of at most 16 tokens; or strings.
        logprobs: report the log-probability of each emitted token and of so many best ones, at most 20;
            None reports nothing. Raw: before penalties, bias, temperature and truncation.
        prompt_logprobs: the same for the prompt's tokens.
        stop: a string or several, of which the first to be complete ends the output before it.
        bad_strings: of the `bad_words` those that are text; put here from there.
        include_stop_str_in_output: the stop string is the end of the text, and so is the text of a token that
            ended it.
        skip_special_tokens: leave special tokens out of the text.
        truncate_prompt_tokens: keep the prompt's last so many tokens; -1 keeps what fits beside max_tokens.

    What `stop` begins is about text, so it is for `LLM.generate` and `LLM.chat`; the engine refuses it.

    As in vLLM, None is as good as a default, lists as tuples, a mapping as `logit_bias`, and -1 as `top_k` 0;
    its fields that are not here are refused with what takes their place.

    Raises:
        RequestError: a value out of range, with the field's name.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: SequenceOf[str] = ()
    bad_strings: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{param} must be {rule}, got {getattr(self, param)!r}", param=param)

        self._take_as_vllm_does()
        check(0.0 <= self.temperature <= 3e38, "temperature", "in [0, 3e+38]")
        check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        check(self.top_k >= 0, "top_k", "at least 0 (0 keeps all tokens)")
        check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        check(self.seed is None or -MAX_SEED - 1 <= self.seed <= MAX_SEED, "seed", "a 64-bit integer")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.n >= 1, "n", "at least 1")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        check(1e-44 <= self.repetition_penalty <= 3e38, "repetition_penalty", "in [1e-44, 3e+38]")
        check(all(-100.0 <= b <= 100.0 for _, b in self.logit_bias), "logit_bias", "values in [-100, 100]")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens"
        )
        check(
            len(self.bad_words) <= MAX_BAD_WORDS
            and all(1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in self.bad_words),
            "bad_words",
            f"at most {MAX_BAD_WORDS} sequences of 1 to {MAX_BAD_WORD_TOKENS} tokens",
        )
        for name, strings in (("stop", self.stop), ("bad_words", self.bad_strings)):
            if not all(isinstance(each, str) and each for each in strings):
                raise RequestError(f"{name} must be strings that are not empty, got {strings!r}", param=name)
        keep = self.truncate_prompt_tokens
        check(keep is None or keep == -1 or keep >= 1, "truncate_prompt_tokens", "at least 1, or -1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= MAX_LOGPROBS, name, f"from 0 to {MAX_LOGPROBS}")

    def _take_as_vllm_does(self) -> None:
        """Values as vLLM's users write them, in the form that the engine knows."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        biases = self.logit_bias or ()
        given: Any = self.bad_words or ()
        words = (given,) if isinstance(given, str) else given
        known: dict[str, Any] = {
            "seed": None if self.seed == -1 else self.seed,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "stop": stop,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logit_bias": tuple(biases.items() if isinstance(biases, Mapping) else biases),
            "bad_words": tuple(tuple(word) for word in words if not isinstance(word, str)),
            "bad_strings": (*(self.bad_strings or ()), *(word for word in words if isinstance(word, str))),
        }
        for name, default in _DEFAULTS:
            if getattr(self, name) is None:
                known[name] = default
        for name, value in known.items():
            object.__setattr__(self, name, value)

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Fields that ask for something that is about text, by the names that a user gives them."""
        asked = {
            "stop": bool(self.stop),
            "bad_words": bool(self.bad_strings),
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": not self.skip_special_tokens,
            "truncate_prompt_tokens": self.truncate_prompt_tokens is not None,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    def of_tokens(self, bad_words: SequenceOf[tuple[int, ...]]) -> SamplingParams:
        """The same for the engine, with the tokens of `bad_strings`."""
        return replace(
            self,
            bad_words=(*self.bad_words, *bad_words),
            bad_strings=(),
            stop=(),
            include_stop_str_in_output=False,
            skip_special_tokens=True,
            truncate_prompt_tokens=None,
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """True where a filter may exclude tokens."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def penalizes(self) -> bool:
        """True where earlier tokens change the logits."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0)

    @property
    def adjusts(self) -> bool:
        """True where logits are changed before they are filtered and drawn from."""
        return self.penalizes or bool(self.logit_bias or self.min_tokens or self.bad_words)


_DEFAULTS = [(each.name, each.default) for each in fields(SamplingParams) if each.default is not None]
