"""What an `LLM` gives: one choice of one request, with its text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from engine.detokenizer import Detokenizer
from engine.sampling_params import SamplingParams
from engine.text import TextProcessor
from engine.types import FinishReason, TokenDelta, TokenLogprobs

__all__ = ["Output", "StopSearch"]

_SHOWN = 60
"""Characters of an output's text in its `repr`."""


@dataclass(slots=True, repr=False)
class Output:
    """One choice of one request, as its deltas came.

    Args:
        request_id: the request.
        index: the choice, from 0.
        started_s: `time.monotonic()` when its request was queued.
        prompt_token_ids: what it continues.
        deltas: everything the engine said about it, in order, up to where a stop string ended it.
        stop_reason: the stop string or the id of `stop_token_ids` that ended it; None where neither did.
    """

    request_id: str
    index: int
    started_s: float
    prompt_token_ids: tuple[int, ...] = ()
    deltas: list[TokenDelta] = field(default_factory=list)
    stop_reason: str | int | None = None
    _processor: TextProcessor | None = None
    _sampling: SamplingParams = field(default_factory=SamplingParams)
    _text: str | None = None

    def __repr__(self) -> str:
        """On one line, its text cut to what fits there."""
        shown = [repr(self.request_id), f"index={self.index}", f"tokens={len(self.token_ids)}"]
        if self.finish_reason is not None:
            shown.append(f"finish_reason={self.finish_reason.value!r}")
            if self.error is not None:
                shown.append(f"error={_cut(self.error)!r}")
            if self._processor is not None:  # whose text is not made before it is whole
                shown.append(f"text={_cut(self.text)!r}")
        return f"Output({', '.join(shown)})"

    @property
    def text(self) -> str:
        """Its text, without special tokens and what ended it, unless its request asks for these; made when it
        is first asked for."""
        if self._text is None:
            if self._processor is None:
                raise ValueError("an output that no LLM made has no text")
            sampling, tokens = self._sampling, self.token_ids
            ended_by_token = bool(self.deltas) and self.deltas[-1].stop_token_id is not None
            if ended_by_token and not sampling.include_stop_str_in_output:
                tokens = tokens[:-1]
            detokenizer = self._processor.detokenizer(
                self.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
            )
            self._text = detokenizer.push(tokens, final=True).text
        return self._text

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs."""
        return self.deltas[-1].finish_reason if self.deltas else None

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """One per token, where the request asked for them."""
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens per decode step, root counted, so 1.0 is plain decoding; None without a step."""
        return self.num_decoded / self.num_steps if self.num_steps else None

    @property
    def error(self) -> str | None:
        """What went wrong, with `FinishReason.ERROR`."""
        return self.deltas[-1].error if self.deltas else None

    @property
    def num_steps(self) -> int:
        """Decode steps it took part in; the token drawn by prefill took none."""
        return sum(delta.num_steps for delta in self.deltas)

    @property
    def num_decoded(self) -> int:
        """Tokens that those steps emitted; over `num_steps` this is its acceptance length."""
        return sum(len(delta.token_ids) for delta in self.deltas if delta.num_steps)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from queueing to the end of the step that emitted the first token; None without one."""
        return next((delta.time_s - self.started_s for delta in self.deltas if delta.token_ids), None)

    @property
    def seconds(self) -> float:
        """Seconds from queueing to the last delta."""
        return self.deltas[-1].time_s - self.started_s if self.deltas else 0.0

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        count, first = len(self.token_ids), self.ttft_s
        return (self.seconds - first) / (count - 1) if count > 1 and first is not None else None


@dataclass(slots=True)
class StopSearch:
    """The text of one output as it grows, searched for stop strings.

    Args:
        detokenizer: looks for them.
        include_stop: a token that ends the output is text too.
    """

    detokenizer: Detokenizer
    include_stop: bool
    pieces: list[str] = field(default_factory=list)
    found: str | None = None

    def take(self, delta: TokenDelta) -> TokenDelta:
        """The delta, cut behind the token that completed a stop string, where one did."""
        unseen = delta.stop_token_id is not None and not self.include_stop
        tokens = delta.token_ids[:-1] if unseen else delta.token_ids
        text = self.detokenizer.push(tokens, final=delta.finish_reason is not None)
        self.pieces.append(text.text)
        self.found = text.stop
        if text.stop is None:
            return delta
        kept = text.num_tokens
        return replace(
            delta,
            token_ids=delta.token_ids[:kept],
            logprobs=None if delta.logprobs is None else delta.logprobs[:kept],
            finish_reason=FinishReason.STOP,
            stop_token_id=None,
        )


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
