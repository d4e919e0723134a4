"""The engine offline: prompts or requests in, outputs out, in the caller's own thread; no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeAlias, cast, overload

import torch
from pydantic import ValidationError

from engine.config import EngineConfig, faults, with_near
from engine.detokenizer import Detokenizer
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.grammar import GrammarCompiler, GrammarSpec
from engine.loader import load
from engine.model.weights import GenerationDefaults
from engine.stats import EngineStats
from engine.text import ROLES, TextProcessor
from engine.types import (
    EngineInfo,
    FinishReason,
    MedusaParams,
    Request,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
)

__all__ = ["LLM", "Output"]

Prompt: TypeAlias = str | Sequence[int]
"""Text, which gets the tokenizer's own special tokens, or token ids."""

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": …, "content": …}` each."""


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
    """

    request_id: str
    index: int
    started_s: float
    prompt_token_ids: tuple[int, ...] = ()
    deltas: list[TokenDelta] = field(default_factory=list)
    _processor: TextProcessor | None = None
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
        """Its text without special tokens, what ended it left out; made when first asked for."""
        if self._text is None:
            if self._processor is None:
                raise ValueError("an output that no LLM made has no text")
            ended_by_token = bool(self.deltas) and self.deltas[-1].stop_token_id is not None
            tokens = self.token_ids[:-1] if ended_by_token else self.token_ids
            self._text = self._processor.detokenizer(self.prompt_token_ids).push(tokens, final=True).text
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
class _StopSearch:
    """The text of one output as it grows, searched for stop strings."""

    detokenizer: Detokenizer
    pieces: list[str] = field(default_factory=list)

    def take(self, delta: TokenDelta) -> TokenDelta:
        """The delta, cut behind the token that completed a stop string, where one did."""
        tokens = delta.token_ids if delta.stop_token_id is None else delta.token_ids[:-1]
        text = self.detokenizer.push(tokens, final=delta.finish_reason is not None)
        self.pieces.append(text.text)
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


class LLM:
    """A loaded engine that answers lists of prompts, or runs lists of requests, to their end.

        llm = LLM("smollm2-135m", max_model_len=2048)
        for output in llm.generate(["The sky is", "Grass is"], SamplingParams(temperature=0, max_tokens=16)):
            print(output.text, output.finish_reason, output.acceptance_length)

    Use it in the thread that made it: each thread that runs torch keeps a pool of workers of its own, and
    two pools slow each other down (see `engine.loop`).

    Args:
        model: a model's name, folder or hub id, or all settings as an `EngineConfig`.
        progress: show a bar while weights load, if stderr is a terminal.
        settings: fields of `EngineConfig`, where `model` is a name.

    Raises:
        ConfigError: settings that are unknown, contradict each other or do not fit this machine.
        ModelError: the model, the heads or the tree cannot be used.
    """

    def __init__(
        self, model: str | EngineConfig = "smollm2-135m", *, progress: bool = True, **settings: Any
    ) -> None:
        if isinstance(model, EngineConfig):
            if settings:
                raise ConfigError(f"{', '.join(settings)}: put these into the EngineConfig")
            config = model
        else:
            config = _config(model, settings)
        loaded = load(config, progress=progress)
        self.text: TextProcessor = loaded.text
        self.generation_defaults: GenerationDefaults = loaded.generation_defaults
        self._grammars = GrammarCompiler(self.text.tokenizer, self.generation_defaults.eos_token_ids)
        self._engine, self._device = Engine(loaded), loaded.pool.data.device
        self._numbers = count()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def promised(self, batch: int, context: int) -> dict[int, float]:
        """Tokens per second that each size of the heads' tree promises; see `AdaptiveTree.promised`."""
        return self._engine.promised(batch, context)

    @property
    def stats(self) -> EngineStats:
        """Totals since loading; differences of two readings describe what ran between them."""
        return self._engine.stats

    @overload
    def generate(self, prompts: Sequence[Request]) -> list[Output]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: str | Sequence[str] = (),
        medusa: MedusaParams | None = None,
        grammar: GrammarSpec | None = None,
        progress: bool = True,
    ) -> list[Output]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Sequence[Request],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: str | Sequence[str] = (),
        medusa: MedusaParams | None = None,
        grammar: GrammarSpec | None = None,
        progress: bool = True,
    ) -> list[Output]:
        """Continue prompts together until all have ended.

        More of them than `max_num_seqs` wait for a slot, as they would in the server. One that fails on
        its way ends with `FinishReason.ERROR`; the others go on.

        Args:
            prompts: a text, token ids, or a list of such; or requests, which say everything themselves.
            sampling: for all of them or one each; `default_sampling` if not given.
            stop: an output ends before the first of these, or of its sampling's own, to be complete in it.
            medusa: how drafts are verified; exactly, if not given.
            grammar: what every output has to follow.
            progress: show a bar, if stderr is a terminal.

        Returns:
            One output per prompt and choice, in the order asked.

        Raises:
            RequestError, ContextLengthError: a prompt that can never run, or no valid grammar; nothing has
                run then.
        """
        if isinstance(prompts, Sequence) and len(prompts) and isinstance(prompts[0], Request):
            if sampling is not None or stop or medusa is not None or grammar is not None:
                raise RequestError("requests carry their own sampling; it cannot be given beside them")
            return self._run(cast("Sequence[Request]", prompts), progress=False)
        tokens = self._tokens(cast("Prompt | Sequence[Prompt]", prompts))
        return self._run(self._requests(tokens, sampling, medusa, grammar), stop, progress=progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        stop: str | Sequence[str] = (),
        medusa: MedusaParams | None = None,
        grammar: GrammarSpec | None = None,
        progress: bool = True,
    ) -> list[Output]:
        """Answer conversations, written as the model's own chat template has them.

        Args:
            messages: one conversation, a list of `{"role": …, "content": …}`, or a list of conversations; see
                `TextProcessor.encode_chat` for those of calls.
            tools: that the model is told of, `{"type": "function", "function": {…}}`. Its calls are text, in
                the form that its template asks for.

        The rest is as in `generate`.

        Raises:
            RequestError: as `generate`; or a role is unknown, or there is no chat template, or it refuses the
                messages.
        """
        single = not len(messages) or isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Messages]", [messages] if single else messages)
        for i, turns in enumerate(conversations):
            _check_messages(turns, "messages" if single else f"messages[{i}]")
        tokens = [
            self.text.encode_chat([dict(each) for each in turns], tools=tools) for turns in conversations
        ]
        return self._run(self._requests(tokens, sampling, medusa, grammar), stop, progress=progress)

    @property
    def default_sampling(self) -> SamplingParams:
        """What the model's publisher recommends, as the server takes it; runs to the context's end."""
        return self.generation_defaults.sampling()

    def _tokens(self, prompts: Prompt | Sequence[Prompt]) -> list[Sequence[int]]:
        """Token ids of each prompt."""
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
            prompts = [cast("Prompt", prompts)]
        each = cast("Sequence[Prompt]", prompts)
        return [self.text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in each]

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        medusa: MedusaParams | None,
        grammar: GrammarSpec | None,
    ) -> list[Request]:
        if sampling is None:
            sampling = self.default_sampling
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts and {len(each)} sampling params", param="sampling")
        follows = self._grammars.compile(grammar, param="grammar") if grammar is not None else None
        return [
            Request(
                f"offline-{next(self._numbers)}",
                tuple(tokens),
                params,
                medusa=medusa or MedusaParams(),
                grammar=follows,
            )
            for tokens, params in zip(prompts, each, strict=True)
        ]

    def _run(
        self, requests: Sequence[Request], stop: str | Sequence[str] = (), *, progress: bool
    ) -> list[Output]:
        from tqdm import tqdm

        started_s = time.monotonic()
        outputs = {
            (request.request_id, index): Output(
                request.request_id, index, started_s, request.prompt_token_ids, _processor=self.text
            )
            for request in requests
            for index in range(request.sampling.n)
        }
        everywhere = (stop,) if isinstance(stop, str) else tuple(stop)
        searches: dict[tuple[str, int], _StopSearch] = {}
        for request in requests:
            if stops := (*everywhere, *request.sampling.stop):
                for index in range(request.sampling.n):
                    detokenizer = self.text.detokenizer(
                        request.prompt_token_ids, stop=stops, min_tokens=request.sampling.min_tokens
                    )
                    searches[request.request_id, index] = _StopSearch(detokenizer)
        requests = [_without_stops(request) for request in requests]  # the engine knows tokens only
        tokens = 0
        bar = tqdm(total=len(outputs), unit="answer", leave=False, disable=None if progress else True)
        with bar, closing(self.steps(requests)) as steps:
            for deltas in steps:
                for delta in deltas:
                    output = outputs[delta.request_id, delta.index]
                    if (search := searches.get((delta.request_id, delta.index))) is not None:
                        ended = delta.finish_reason is not None
                        delta = search.take(delta)
                        if delta.finish_reason is not None:
                            output._text = "".join(search.pieces)
                            if not ended:  # a stop string did, of which the engine knows nothing
                                self._engine.abort(delta.request_id, delta.index)
                    if delta.finish_reason is not None:
                        bar.update()
                    output.deltas.append(delta)
                    tokens += len(delta.token_ids)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started_s):.0f} tokens/s", refresh=False)
        return list(outputs.values())

    def steps(self, requests: Sequence[Request]) -> Generator[list[TokenDelta], None, None]:
        """The same step by step: yields each step's deltas. Closed early, it aborts what still runs.

        Raises:
            RequestError, ContextLengthError: a request that can never run; nothing has run then.
            RuntimeError: another generation is under way.
        """
        if self._working():
            raise RuntimeError("this LLM is generating already; one call at a time")
        if len({request.request_id for request in requests}) < len(requests):
            raise RequestError("request ids must differ", param="request_id")
        for request in requests:
            self.info.check(request)
        try:
            for request in requests:
                self._engine.add(request)
            while self._working():
                yield self._step()
        finally:
            if self._working():
                for request in requests:
                    self._engine.abort(request.request_id)

    def stream(self, take: Callable[[], Request | None]) -> Iterator[list[TokenDelta]]:
        """Steps over requests that are not all known at once, with every slot busy as long as there are any.

        Closed early, it aborts what still runs.

        Args:
            take: asked before each step for another request while a slot is free; None where there is
                none right now. It ends when there is none and nothing runs.

        Raises:
            RequestError, ContextLengthError: a request that can never run; the others are aborted.
            RuntimeError: another generation is under way.
        """
        if self._working():
            raise RuntimeError("this LLM is generating already; one call at a time")
        live: dict[str, int] = {}  # choices still running
        try:
            while True:
                while self.stats.running + self.stats.waiting < self.info.max_num_seqs:
                    if (request := take()) is None:
                        break
                    self.info.check(request)
                    if request.request_id in live:
                        raise RequestError("request ids must differ", param="request_id")
                    self._engine.add(request)
                    live[request.request_id] = request.sampling.n
                if not self._working():
                    return
                deltas = self._step()
                for delta in deltas:
                    if delta.finish_reason is not None:
                        live[delta.request_id] -= 1
                        if not live[delta.request_id]:
                            del live[delta.request_id]
                yield deltas
        finally:
            for request_id in live:
                self._engine.abort(request_id)

    def check(self) -> None:
        """Raise RuntimeError if K/V blocks are lost, or owned while nothing runs."""
        self._engine.check()

    def _step(self) -> list[TokenDelta]:
        if self._device.index is not None:  # the caller's thread may be another than the one that loaded
            torch.cuda.set_device(self._device)
        return self._engine.step()

    def _working(self) -> bool:  # a call, since mypy takes a property for unchanged between two looks
        return self._engine.has_work


def _config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    if unknown := settings.keys() - EngineConfig.model_fields:
        told = with_near(sorted(unknown), EngineConfig.model_fields)
        raise ConfigError(f"the engine has no such setting: {told}")
    try:
        return EngineConfig(model=model, **settings)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{name}: {text}" for name, text in faults(error).items())) from None


def _check_messages(messages: Sequence[Any], place: str) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            where = f"{place}[{i}]"
            raise RequestError(f"{where} must be a dict with role and content, got {message!r}", param=where)
        if (role := message.get("role")) not in ROLES:
            where, known = f"{place}[{i}].role", ", ".join(map(repr, ROLES))
            raise RequestError(f"{where} must be one of {known}, got {role!r}", param=where)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _without_stops(request: Request) -> Request:
    if not request.sampling.stop:
        return request
    return replace(request, sampling=replace(request.sampling, stop=()))
