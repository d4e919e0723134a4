"""`FakeEngine`: the engine's interface with a script for a model, so the server can be tested for real.

Time passes in steps as in the engine: each step admits what waits, then hands every running choice the
next token list of its script. Queue bound, slots, abort, truncation, statistics and traces are real;
only the tokens are made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence as SequenceOf
from dataclasses import dataclass

from engine.config import MAX_TREE_NODES
from engine.errors import EngineStoppedError, QueueFullError, RequestError
from engine.stats import EngineStats
from engine.stream import DeltaStream
from engine.types import (
    DraftSource,
    EngineInfo,
    FinishReason,
    Request,
    StepTrace,
    TokenDelta,
    TokenLogprobs,
)

__all__ = ["FakeEngine", "FakeStep", "Reply", "Step"]


@dataclass(frozen=True, slots=True)
class FakeStep:
    """One step's tokens of one choice, and what else its delta says.

    Args:
        tokens: emitted.
        logprobs: one per token, for requests that ask; made up if None.
        cached_tokens: prompt tokens that were reused; for the first step of choice 0.
        accepted_prediction_tokens: of the tokens, how many the prediction had drafted.
    """

    tokens: SequenceOf[int]
    logprobs: SequenceOf[TokenLogprobs] | None = None
    cached_tokens: int = 0
    accepted_prediction_tokens: int = 0


Step = SequenceOf[int] | FakeStep | Exception
"""One step's tokens of one choice, or what that step fails with."""

Reply = Callable[[Request, int], Iterable[Step]]
"""Script of a choice: (request, choice index) to the steps it gets. The first stands for prefill."""


@dataclass(slots=True, eq=False)
class _Choice:
    """One choice on its way through the fake."""

    request: Request
    index: int
    script: list[Step]
    stream: DeltaStream
    position: int = 0
    num_output: int = 0
    last_token: int = 0
    queue_s: float = 0.0


class FakeEngine:
    """A scripted `EngineClient`.

    Args:
        reply: the script of each choice. An exception in it fails that step: the choice ends with
            `FinishReason.ERROR` and the exception's text, by its own fault if it is a RequestError. A script
            that runs out ends with STOP.
        step_s: wall time of a step in seconds; 0 yields to the event loop once.
        max_num_seqs: choices that run together.
        max_waiting: choices that may wait before `submit` raises `QueueFullError`.
        max_model_len: prompt plus output bound, in tokens.
        vocab_size: reported in `info`.
        eos_token_ids: end a choice unless the request ignores them.
        draft_tokens: draft nodes counted per decode step; 0 is plain decoding.
        lookup: reported in `info`.
        quantization, lora: reported in `info`.
        kv_blocks: size of the pretended pool; a running choice holds one block.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        step_s: float = 0.0,
        max_num_seqs: int = 8,
        max_waiting: int = 64,
        max_model_len: int = 4096,
        vocab_size: int = 256,
        eos_token_ids: tuple[int, ...] = (),
        draft_tokens: int = 0,
        lookup: int = 0,
        quantization: str = "none",
        lora: tuple[str, ...] = (),
        kv_blocks: int = 256,
    ) -> None:
        self._reply = reply
        self._step_s = step_s
        self._max_waiting = max_waiting
        self._eos = eos_token_ids
        self._draft_tokens = draft_tokens
        self._waiting: list[_Choice] = []
        self._running: list[_Choice] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._accepting = False
        self._dead = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stats = EngineStats(
            kv_blocks_total=kv_blocks,
            kv_blocks_free=kv_blocks,
            tree_size=draft_tokens + 1,
            head_nodes=draft_tokens,
        )
        self._info = EngineInfo(
            model="fake",
            architecture="FakeForCausalLM",
            dtype="float32",
            device="cpu",
            num_heads=4 if draft_tokens else 0,
            tree_size=draft_tokens + 1,
            max_model_len=max_model_len,
            kv_cache_tokens=kv_blocks * 16,
            vocab_size=vocab_size,
            max_num_seqs=max_num_seqs,
            tree=str(draft_tokens + 1) if draft_tokens else "off",
            lookup=lookup,
            quantization=quantization,
            lora=lora,
        )
        self.submitted: list[Request] = []
        """Every request taken, in order, for tests to look at."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def ready(self) -> bool:
        return self._accepting and self.healthy

    @property
    def healthy(self) -> bool:
        return not self._dead

    @property
    def pid(self) -> int | None:
        return None

    async def start(self) -> None:
        """Start stepping on the running event loop."""
        self._accepting = True
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name="fake-engine")

    def submit(self, request: Request) -> DeltaStream:
        """Queue a request. Raises what `EngineClient.submit` raises."""
        if not self.ready:
            raise EngineStoppedError("the engine is shutting down")
        self._info.check(request)
        sampling = request.sampling
        if sampling.n > (most := self._info.max_num_seqs + self._max_waiting):
            raise RequestError(f"n must be at most {most} on this server", param="n")
        free_slots = self._info.max_num_seqs - len(self._running)
        if len(self._waiting) + sampling.n > self._max_waiting + free_slots:
            raise QueueFullError("too many requests are waiting")
        self.submitted.append(request)
        stream = DeltaStream(request, lambda request_id: self.abort([request_id]))
        for index in range(sampling.n):
            self._waiting.append(_Choice(request, index, list(self._reply(request, index)), stream))
        self._gauges()
        self._wake.set()
        return stream

    def abort(self, request_ids: SequenceOf[str]) -> None:
        """Drop requests at once; unknown or finished ones are ignored."""
        self._drop(lambda choice: choice.request.request_id in request_ids)

    def abort_choice(self, request_id: str, index: int) -> None:
        """Drop one choice at once; unknown or finished ones are ignored."""
        self._drop(lambda choice: (choice.request.request_id, choice.index) == (request_id, index))

    async def stack(self) -> str:
        """See `EngineClient.stack`; it has no thread."""
        return ""

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new work, let running requests finish for up to `drain_s` seconds, abort the rest."""
        self._accepting = False
        if drain_s > 0 and not self._dead:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain_s)
        self._drop(lambda _: True)
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def die(self) -> None:
        """Pretend the engine thread crashed: every request fails, nothing is taken any more."""
        self._dead = True
        for choice in [*self._waiting, *self._running]:
            self._finish(choice, FinishReason.ERROR, error="the engine died")

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._step_s)
            self._step()
            if not self._waiting and not self._running:
                self._wake.clear()

    def _step(self) -> None:
        while self._waiting and len(self._running) < self._info.max_num_seqs:
            choice = min(self._waiting, key=lambda waiting: waiting.request.priority)  # the first of equals
            self._waiting.remove(choice)
            choice.queue_s = time.monotonic() - choice.request.arrived_s
            self._running.append(choice)
        self._gauges()
        self._stats.num_steps += 1
        for choice in list(self._running):
            self._advance(choice, batch_size=len(self._running))
        self._gauges()

    def _advance(self, choice: _Choice, batch_size: int) -> None:
        if choice.position == len(choice.script):
            return self._finish(choice, FinishReason.STOP)
        step = choice.script[choice.position]
        choice.position += 1
        if isinstance(step, Exception):
            return self._finish(choice, FinishReason.ERROR, step)
        if not isinstance(step, FakeStep):
            step = FakeStep(step)
        if len(step.tokens) > MAX_TREE_NODES:
            error = (
                f"a step of the script has {len(step.tokens)} tokens, and no tree more than {MAX_TREE_NODES}"
            )
            return self._finish(choice, FinishReason.ERROR, error=error)
        tokens, reason, stop_token_id = self._truncate(choice, list(step.tokens))
        prefill = choice.num_output == 0
        sampling = choice.request.sampling
        if reason is None and choice.position == len(choice.script):
            reason = FinishReason.STOP
        delta = TokenDelta(
            request_id=choice.request.request_id,
            index=choice.index,
            token_ids=tokens,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_steps=0 if prefill else 1,
            time_s=time.monotonic(),
            trace=self._trace(choice, tokens, batch_size) if choice.request.trace and not prefill else None,
            cached_tokens=step.cached_tokens,
            accepted_prediction_tokens=min(step.accepted_prediction_tokens, len(tokens)),
            queue_s=choice.queue_s if prefill else 0.0,
        )
        if sampling.logprobs is not None:
            known = step.logprobs or [self._made_up(token, sampling.logprobs) for token in tokens]
            delta.logprobs = list(known[: len(tokens)])
        if sampling.prompt_logprobs is not None and prefill and choice.index == 0:
            rest = choice.request.prompt_token_ids[1:]
            delta.prompt_logprobs = [None, *(self._made_up(t, sampling.prompt_logprobs) for t in rest)]
        choice.num_output += len(tokens)
        choice.last_token = tokens[-1] if tokens else choice.last_token
        self._count(choice, delta, prefill=prefill)
        if reason is not None:
            self._remove(choice)
        if choice.stream.put(delta):
            choice.stream.tell()
        return None

    def _truncate(
        self, choice: _Choice, tokens: list[int]
    ) -> tuple[list[int], FinishReason | None, int | None]:
        """Cut a step's tokens at the first stop token or at max_tokens, whichever comes first."""
        sampling = choice.request.sampling
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)}
        room = self._info.max_model_len - len(choice.request.prompt_token_ids)
        limit = min(room, sampling.max_tokens or room)
        for i, token in enumerate(tokens):
            if token in stops:
                return tokens[: i + 1], FinishReason.STOP, token
            if choice.num_output + i + 1 == limit:
                return tokens[: i + 1], FinishReason.LENGTH, None
        return tokens, None, None

    def _made_up(self, token: int, count: int) -> TokenLogprobs:
        """Token ids by rank as their own numbers say: the token is the best, the next one half as likely."""
        best = [((token + i) % self._info.vocab_size, -0.5 - i * 0.6931471805599453) for i in range(count)]
        return TokenLogprobs(token, -0.5, 1, tuple(best))

    def _trace(self, choice: _Choice, tokens: list[int], batch_size: int) -> StepTrace:
        """A chain: the root, then every emitted token but the last, which is the next root."""
        nodes = (choice.last_token, *tokens[:-1])
        return StepTrace(
            tokens=nodes,
            parents=tuple(range(-1, len(nodes) - 1)),
            sources=(DraftSource.ROOT, *[DraftSource.HEAD] * (len(nodes) - 1)),
            accepted=tuple(range(len(nodes))),
            next_root=tokens[-1],
            batch_size=batch_size,
            duration_s=self._step_s,
        )

    def _count(self, choice: _Choice, delta: TokenDelta, *, prefill: bool) -> None:
        stats = self._stats
        stats.emitted(len(delta.token_ids))
        if prefill:
            if choice.index == 0:  # the choices of one request prefill once
                stats.prompt_tokens += len(choice.request.prompt_token_ids)
                stats.prefix_query_tokens += len(choice.request.prompt_token_ids)
                stats.prefix_hit_tokens += delta.cached_tokens
            return
        stats.acceptance_counts[len(delta.token_ids)] += 1
        if self._draft_tokens:
            stats.num_drafts += 1
            stats.drafted_by_source["head"] += self._draft_tokens
            predicted = delta.accepted_prediction_tokens
            stats.accepted("prediction", predicted)
            stats.accepted("head", len(delta.token_ids) - 1 - predicted, above=predicted)

    def _finish(self, choice: _Choice, reason: FinishReason, error: str | Exception | None = None) -> None:
        self._remove(choice)
        request_id = choice.request.request_id
        now = time.monotonic()
        last = TokenDelta(request_id, choice.index, [], reason, time_s=now)
        if error is not None:
            last.error, last.own_fault = str(error), isinstance(error, RequestError)
            last.fault_param = getattr(error, "param", None)
        if choice.stream.put(last):
            assert self._loop is not None
            self._loop.call_soon_threadsafe(choice.stream.tell)  # later: whoever reads may have aborted it

    def _drop(self, condition: Callable[[_Choice], bool]) -> None:
        for choice in [c for c in [*self._waiting, *self._running] if condition(c)]:
            self._finish(choice, FinishReason.ABORT)

    def _remove(self, choice: _Choice) -> None:
        for queue in (self._waiting, self._running):
            if choice in queue:
                queue.remove(choice)
        self._gauges()

    def _gauges(self) -> None:
        stats = self._stats
        stats.running, stats.waiting = len(self._running), len(self._waiting)
        stats.kv_blocks_free = stats.kv_blocks_total - stats.running
        if self._running or self._waiting:
            self._idle.clear()
        else:
            self._idle.set()
