"""The engine offline: prompts or requests in, outputs out, in the caller's own thread; no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias, cast, overload

import torch
from pydantic import ValidationError

from engine.config import EngineConfig, faults, with_near
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.grammar import GrammarCompiler, GrammarSpec
from engine.loader import load
from engine.model.weights import GenerationDefaults
from engine.output import Output, StopSearch
from engine.sampling_params import SamplingParams
from engine.stats import EngineStats
from engine.text import ROLES, TextProcessor
from engine.tool_prompt import with_arguments_told
from engine.types import EngineInfo, MedusaParams, Request, TokenDelta
from engine.vllm_names import CALLS, SETTINGS, explaining, without_vllms

__all__ = ["LLM", "Output"]

Prompt: TypeAlias = str | Sequence[int]
"""Text, which gets the tokenizer's own special tokens, or token ids."""

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: `{"role": …, "content": …}` each."""


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
        self._engine, self._device = Engine(loaded), loaded.pool.data.device
        self._grammars = GrammarCompiler(
            self.text.tokenizer, self.generation_defaults.eos_token_ids, self.info.vocab_size
        )
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

    @explaining(CALLS, RequestError)
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

    @explaining(CALLS, RequestError)
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
                `TextProcessor.encode_chat` for those of calls, whose arguments may also be the text of an
                object's JSON, as in OpenAI's API. What the model thinks before it answers is a
                part of the text, as calls are, and earlier thoughts may be given as `reasoning_content`.
            tools: that the model is told of, `{"type": "function", "function": {…}}`. Its calls are in the
                form that its template asks for.

        The rest is as in `generate`.

        Raises:
            RequestError: as `generate`; or a role is unknown, or there is no chat template, or it refuses the
                messages.
        """
        single = not len(messages) or isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Messages]", [messages] if single else messages)
        for i, turns in enumerate(conversations):
            _check_messages(turns, "messages" if single else f"messages[{i}]")
        tokens = [self.text.encode_chat(with_arguments_told(turns), tools=tools) for turns in conversations]
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
        asked, requests = requests, [self._for_engine(request) for request in requests]
        everywhere = (stop,) if isinstance(stop, str) else tuple(stop)
        outputs: dict[tuple[str, int], Output] = {}
        searches: dict[tuple[str, int], StopSearch] = {}
        for sampling, request in zip((each.sampling for each in asked), requests, strict=True):
            name, prompt = request.request_id, request.prompt_token_ids
            stops = (*everywhere, *sampling.stop)
            for index in range(sampling.n):
                outputs[name, index] = Output(
                    name, index, started_s, prompt, _processor=self.text, _sampling=sampling
                )
                if stops:
                    searches[name, index] = self._search(stops, prompt, sampling)
        tokens = 0
        bar = tqdm(total=len(outputs), unit="answer", leave=False, disable=None if progress else True)
        with bar, closing(self.steps(requests)) as steps:
            for deltas in steps:
                for delta in deltas:
                    output = outputs[delta.request_id, delta.index]
                    search = searches.get((delta.request_id, delta.index))
                    if search is not None:
                        ended = delta.finish_reason is not None
                        delta = search.take(delta)
                        if delta.finish_reason is not None:
                            output._text = "".join(search.pieces)
                            if not ended:  # a stop string did, of which the engine knows nothing
                                self._engine.abort(delta.request_id, delta.index)
                    if delta.finish_reason is not None:
                        bar.update()
                        if delta.stop_token_id in output._sampling.stop_token_ids:
                            output.stop_reason = delta.stop_token_id
                        if search is not None and search.found is not None:
                            output.stop_reason = search.found
                    output.deltas.append(delta)
                    tokens += len(delta.token_ids)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started_s):.0f} tokens/s", refresh=False)
        return list(outputs.values())

    def _for_engine(self, request: Request) -> Request:
        """The request without what is about text, of which the engine knows nothing."""
        sampling, prompt = request.sampling, request.prompt_token_ids
        if not sampling.text_fields:
            return request
        if (keep := sampling.truncate_prompt_tokens) is not None:
            if keep == -1:
                keep = max(1, self.info.max_model_len - (sampling.max_tokens or 1))
            prompt = prompt[-keep:]
        words = self.text.encode_bad_words(sampling.bad_strings)
        return replace(request, prompt_token_ids=prompt, sampling=sampling.of_tokens(words))

    def _search(self, stops: tuple[str, ...], prompt: Sequence[int], sampling: SamplingParams) -> StopSearch:
        include_stop = sampling.include_stop_str_in_output
        detokenizer = self.text.detokenizer(
            prompt,
            stop=stops,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
            include_stop=include_stop,
        )
        return StopSearch(detokenizer, include_stop)

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
    settings = without_vllms(settings, SETTINGS, ConfigError)
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
        for j, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                where = f"{place}[{i}].tool_calls[{j}]"
                told = f"must be a dict with a function, which has name and arguments, got {call!r}"
                raise RequestError(f"{where} {told}", param=where)
