"""Random requests that come, fail, are aborted and end while steps and passes over prompts are under way.

Each text is that of plain steps where nothing of that happens, and at every step the books say what is under
way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest
import torch

from engine.attention.sdpa import SdpaAttention
from engine.batch import Batch, Verified
from engine.engine import Engine
from engine.grammar import GrammarSpec
from engine.graphs import CapturedRunner
from engine.scheduler import Chunk
from engine.step_results import PromptResults
from engine.types import FinishReason, Request, SamplingParams, Sequence, SequenceState, TokenDelta
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_constrained import COMPILER, END
from tests.support import make_engine

GRAMMAR = GrammarSpec("regex", "([a-c]{1,3}g)*h")

Key = tuple[str, int]

POISONED, BROKEN = "poisoned", "broken"
"""In names of requests whose K/V is not finite, and whose passes raise an error."""

PREFIX = [(i * i + i // 5) % 12 for i in range(60)]

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.8, "seed": 5, "n": 2, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logprobs": 1},
    {"temperature": 0.7, "seed": 6, "top_p": 0.8, "prompt_logprobs": 0, "n": 2},
    {"temperature": 0.0, "stop_token_ids": (3,)},
    {"temperature": 1.0, "seed": 7, "bad_words": ((5,), (1, 2)), "logit_bias": ((4, 2.0),)},
    {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": (0, 1, 2, 3, 4, 5)},
]

SETTINGS: dict[str, dict[str, Any]] = {
    "small pool": {"tree": 8, "kv_cache_tokens": 164, "max_num_seqs": 8},
    "chunks": {"tree": 8, "kv_cache_tokens": 400, "max_num_seqs": 6, "max_step_tokens": 64},
    "plain": {"tree": "off", "lookup": "off", "kv_cache_tokens": 200, "max_num_seqs": 5},
    "nothing shared": {"tree": 4, "kv_cache_tokens": 164, "max_num_seqs": 8, "prefix_caching": False},
}


def some_request(random: Random, name: str) -> Request:
    tail = [random.randrange(12) for _ in range(random.choice([0, 1, 3, 6]))]
    prompt = (PREFIX[: random.choice([0, 1, 4, 4, 9, 9, 24, 60])] + tail) or [4]
    sampling = dict(random.choice(SAMPLINGS))
    most = random.choice([1, 2, 25, 40, 50])
    sampling["min_tokens"] = min(most, sampling.get("min_tokens", 0))
    others: dict[str, Any] = {"priority": random.choice([0, 0, 1, -1]), "trace": random.random() < 0.1}
    if random.random() < 0.15:
        others["prediction_token_ids"] = tuple(PREFIX[20:45])
    if random.random() < 0.08:
        others["grammar"] = COMPILER.compile(GRAMMAR)
        sampling["stop_token_ids"] = (END,)
        sampling.pop("bad_words", None)
        sampling["min_tokens"] = 0
    if random.random() < 0.15:
        others["cache_salt"] = "a"
    if random.random() < 0.1:
        name += random.choice([POISONED, BROKEN])
        others["cache_salt"] = name  # who reuses what is not finite fails too
    return Request(name, tuple(prompt), SamplingParams(max_tokens=most, **sampling), **others)


def shown(deltas: list[TokenDelta]) -> Any:
    logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    prompt = [entry for delta in deltas for entry in delta.prompt_logprobs or []]

    def rounded(entry: Any) -> Any:
        return None if entry is None else (entry.token_id, pytest.approx(entry.logprob, abs=1e-4))

    last = deltas[-1]
    tokens = [token for delta in deltas for token in delta.token_ids]
    return (
        tokens,
        list(map(rounded, logprobs)),
        list(map(rounded, prompt)),
        last.finish_reason,
        last.stop_token_id,
    )


def in_calm(model: TinyModel, requests: Iterable[Request]) -> dict[Key, list[TokenDelta]]:
    """What they give where nothing fails or is short: in eager plain steps that nobody launches ahead."""
    engine = make_engine(model.folder, tree="off", lookup="off", prefix_caching=False, max_model_len=96)
    for request in requests:
        engine.add(request)
    found: dict[Key, list[TokenDelta]] = {}
    while engine.has_work:
        for delta in engine.step():
            found.setdefault((delta.request_id, delta.index), []).append(delta)
    return found


class Failing(CapturedRunner):
    """Fails for some requests, and now and then."""

    random: Random
    failed: set[str]  # requests that may have

    def _chunks_forward(self, chunks: list[Chunk]) -> torch.Tensor:
        hidden, end = super()._chunks_forward(chunks), 0
        for chunk in chunks:
            end += chunk.size
            if POISONED in chunk.sequence.request.request_id:
                hidden[end - 1] = float("nan")
                for block in chunk.sequence.blocks[chunk.start // self._pool.block_size :]:
                    self._pool.data[:, :, block] = float("nan")
        return hidden

    def _ended(self, chunks: list[Chunk], *rest: Any) -> PromptResults:
        found = super()._ended(chunks, *rest)
        if any(BROKEN in chunk.sequence.request.request_id for chunk in chunks):
            raise RuntimeError("out of luck")
        if len(chunks) > 1 and self.random.random() < 0.1:
            raise RuntimeError("out of luck for now")
        return found

    def _first_tokens(self, chunks: list[Chunk], *rest: Any) -> Any:
        if any(BROKEN in chunk.sequence.request.request_id for chunk in chunks):
            raise RuntimeError("out of luck")
        return super()._first_tokens(chunks, *rest)

    def targets_accept_compact(self, batch: Batch, verified: Verified) -> Any:
        found = super().targets_accept_compact(batch, verified)
        if self.random.random() < 0.01:
            self.failed.update(sequence.request.request_id for sequence in batch.sequences)
            raise RuntimeError("out of luck")
        return found


def check_books(engine: Engine) -> None:
    """What is under way, and what each running sequence has cached."""
    scheduler, under_way = engine._scheduler, Counter[Sequence]()
    if engine._flight is not None:
        under_way.update(dict(zip(engine._flight.batch.sequences, engine._flight.most, strict=True)))
    under_way.update(chunk.sequence for flight in engine._prompts for chunk in flight.chunks)
    for sequence in [*scheduler, *scheduler._ended]:
        assert sequence.in_flight == under_way.pop(sequence, 0)
    assert not under_way
    assert all(sequence.in_flight for sequence in scheduler._ended)
    slots = [sequence.slot for sequence in [*scheduler.running, *scheduler._ended]]
    assert len({*slots, *scheduler._free_slots}) == len(slots) + len(scheduler._free_slots)
    for sequence in scheduler.running:
        rows = len(sequence.blocks) * engine._blocks.block_size
        assert sequence.num_cached + sequence.in_flight <= rows
        if sequence.state is SequenceState.DECODE:
            assert sequence.num_cached == max(len(sequence.token_ids) - 1, sequence.num_prompt)
    engine.check()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_each_text_is_that_of_its_request_in_calm(
    narrow: TinyModel, settings: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = dict(support.MODE)
    monkeypatch.setitem(support.MODE, "captured", True)
    monkeypatch.setitem(support.MODE, "ahead", True)
    monkeypatch.setattr(SdpaAttention, "ragged", True, raising=False)
    heads = {} if settings["tree"] == "off" else {"heads": str(narrow.heads)}
    monkeypatch.setattr("engine.runners.CapturedRunner", Failing)
    engine = make_engine(narrow.folder, max_model_len=96, **heads, **settings)
    random, asked, found = Random(seed), dict[str, Request](), dict[Key, list[TokenDelta]]()
    Failing.random, Failing.failed = Random(seed + 1), set()

    def come_and_go() -> list[TokenDelta]:
        for _ in range(random.choice([0, 0, 0, 1, 1, 3]) if len(asked) < 40 else 0):
            request = some_request(random, f"{len(asked)}")
            asked[request.request_id] = request
            engine.add(request)
        if random.random() < 0.03 and (live := list(engine._scheduler)):
            gone = random.choice(live)
            return engine.abort(gone.request.request_id, random.choice([None, gone.index]))
        return []

    while len(asked) < 40 or engine.has_work:
        deltas = come_and_go()
        check_books(engine)
        if engine.has_work:
            deltas += engine.step(come_and_go)
            check_books(engine)
        for delta in deltas:
            deltas_of = found.setdefault((delta.request_id, delta.index), [])
            assert not deltas_of or deltas_of[-1].finish_reason is None
            deltas_of.append(delta)
    assert engine._flight is None
    assert not engine._prompts
    assert engine._runner._pool.data.isfinite().all()
    assert engine.stats.preemptions or settings["kv_cache_tokens"] >= 200
    assert {deltas[-1].finish_reason for deltas in found.values()} == {*FinishReason}
    monkeypatch.setattr(support, "MODE", calm)
    for key, wanted in in_calm(narrow, asked.values()).items():
        deltas, name = found[key], key[0]
        if (reason := deltas[-1].finish_reason) in (FinishReason.ABORT, FinishReason.ERROR):
            assert (
                reason is FinishReason.ABORT or POISONED in name or BROKEN in name or name in Failing.failed
            )
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert tokens == shown(wanted)[0][: len(tokens)]
        else:
            assert shown(deltas) == shown(wanted), asked[name]
            assert POISONED not in name
            assert BROKEN not in name
