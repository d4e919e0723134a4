"""Passes over prompts that are not waited for: who is in the next step, and what is told when."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from engine.attention.sdpa import SdpaAttention
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.scheduler import Chunk
from engine.step_results import PromptResults
from engine.types import FinishReason, Request, SamplingParams, SequenceState, TokenDelta
from tests import support
from tests.engine.conftest import TinyModel
from tests.support import greedy, greedy_reference, make_engine, run_all


@pytest.fixture(autouse=True)
def _mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.MODE, "ahead", True)
    monkeypatch.setitem(support.MODE, "captured", True)
    monkeypatch.setattr(SdpaAttention, "ragged", True, raising=False)


def running(engine: Engine) -> list[str]:
    return [sequence.request.request_id for sequence in engine._scheduler.running]


def stepping(engine: Engine) -> list[str]:
    """Who is in the decode step under way."""
    flight = engine._flight
    return [] if flight is None else [s.request.request_id for s in flight.batch.sequences]


def rest(engine: Engine, found: list[TokenDelta]) -> dict[str, list[int]]:
    """All tokens of each request, with those of `found`."""
    while engine.has_work:
        found += engine.step()
    engine.check()
    tokens: dict[str, list[int]] = {}
    for delta in found:
        tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens


def poison(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The last row of passes over this request's prompt is not finite, nor is its K/V."""
    forward = CapturedRunner._chunks_forward

    def poisoned(self: CapturedRunner, chunks: list[Chunk]) -> torch.Tensor:
        hidden, end = forward(self, chunks), 0
        for chunk in chunks:
            end += chunk.size
            if chunk.sequence.request.request_id == name:
                hidden[end - 1, 0] = float("nan")
                row, offset = divmod(chunk.end - 1, self._pool.block_size)
                self._pool.data[:, :, chunk.sequence.blocks[row], : offset + 1] = float("nan")
        return hidden

    monkeypatch.setattr(CapturedRunner, "_chunks_forward", poisoned)


def test_the_first_step_is_launched_before_the_first_token_is_read(narrow: TinyModel) -> None:
    reference = greedy_reference(narrow.reference, [1, 2, 3], 9)
    engine = make_engine(narrow.folder, tree="off")
    engine.add(greedy("r", [1, 2, 3], 9))
    assert engine.step() == []  # the pass has been launched
    [made] = engine._scheduler.running
    assert (made.state, made.num_output, made.in_flight) == (SequenceState.DECODE, 0, 1)
    [first] = engine.step()  # and the step behind it
    assert first.token_ids == reference[:1]
    assert first.cached_tokens == 0
    assert first.queue_s >= 0
    assert stepping(engine) == ["r"]
    assert (made.num_output, made.in_flight) == (1, 1)
    [second] = engine.step()
    assert second.token_ids == reference[1:2]
    assert rest(engine, [first, second])["r"] == reference
    assert sum(engine.stats.acceptance_counts) == 8, "length is known beforehand: no step in vain"
    assert sum(engine.stats.step_seconds["prefill"].counts) == 1


def test_who_may_say_one_word_is_in_no_step(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    engine.add(greedy("one", [1, 2, 3], 1))
    engine.add(greedy("on", [4, 5], 9))
    assert engine.step() == []
    deltas = engine.step()
    assert stepping(engine) == ["on"]
    assert [(d.request_id, d.finish_reason) for d in deltas] == [("one", FinishReason.LENGTH), ("on", None)]
    assert rest(engine, deltas)["on"] == greedy_reference(narrow.reference, [4, 5], 9)


def test_a_first_token_that_ends_the_text_is_found_a_step_late(narrow: TinyModel) -> None:
    reference = greedy_reference(narrow.reference, [1, 2, 3], 1)
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    engine.add(greedy("ends", [1, 2, 3], 9, stop_token_ids=(reference[0],)))
    engine.add(greedy("on", [4, 5], 9))
    engine.step()
    deltas = engine.step()
    assert ("ends", FinishReason.STOP) in [(d.request_id, d.finish_reason) for d in deltas]
    assert sorted(stepping(engine)) == ["ends", "on"]
    [held] = engine._scheduler._ended
    assert held.blocks
    engine._scheduler.check()
    found = rest(engine, deltas)
    assert not held.blocks
    assert found == {"ends": reference, "on": greedy_reference(narrow.reference, [4, 5], 9)}


def test_an_abort_waits_for_the_pass_that_holds_it(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree="off", max_prefill_tokens=64)
    engine.add(greedy("long", [i % 12 for i in range(90)], 9))
    engine.step()
    [made] = engine._scheduler.running
    assert (made.state, made.num_cached, made.in_flight) == (SequenceState.PREFILL, 64, 1)
    engine.add(greedy("on", [4, 5], 9))
    [gone] = engine.abort("long")
    assert gone.finish_reason is FinishReason.ABORT
    assert made.blocks
    engine._scheduler.check()
    deltas = engine.step()
    assert not made.blocks
    assert rest(engine, deltas) == {"on": greedy_reference(narrow.reference, [4, 5], 9)}
    engine.add(greedy("alone", [1, 2], 9))
    engine.step()
    engine.abort("alone")
    engine.check()  # nobody is left in it, so it has been let go of


def test_chunks_follow_one_another_unread(narrow: TinyModel) -> None:
    prompt = [(i * i) % 12 for i in range(150)]
    engine = make_engine(narrow.folder, tree="off", max_prefill_tokens=64)
    engine.add(greedy("long", prompt, 5))
    passes = [[(c.start, c.end) for c in engine._prompts[0].chunks] for _ in range(3) if engine.step() == []]
    assert passes == [[(0, 64)], [(64, 128)], [(128, 150)]]
    assert rest(engine, []) == {"long": greedy_reference(narrow.reference, prompt, 5)}


def test_passes_in_turn_share_memory_of_the_hosts_and_passes_under_way_do_not(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, found = make_engine(narrow.folder, tree="off"), []
    under_way: list[list[Any]] = []
    ended = CapturedRunner._ended

    def noted(self: CapturedRunner, chunks: list[Chunk], *rest: Any) -> PromptResults:
        made = ended(self, chunks, *rest)
        under_way.append([each.results.results._lent for each in engine._prompts] + [made.results._lent])
        return made

    monkeypatch.setattr(CapturedRunner, "_ended", noted)
    prompts = {name: [i, 2, 3] for i, name in enumerate("abcd")}
    for name in "abc":  # each pass is launched while the one before is under way
        engine.add(greedy(name, prompts[name], 9))
        found += engine.step()
    texts = rest(engine, found)
    engine.add(greedy("d", prompts["d"], 9))
    texts |= rest(engine, [])
    assert texts == {name: greedy_reference(narrow.reference, prompts[name], 9) for name in "abcd"}
    [[a], [still_a, b], [still_b, c], [d]] = under_way
    assert still_a is a is not b is still_b
    assert c is a, "which had been read"
    assert d in (a, b)


def test_what_is_drawn_behind_chunks_is_the_first_draw(narrow: TinyModel) -> None:
    sampling = SamplingParams(temperature=0.9, seed=3, presence_penalty=0.7, max_tokens=9)
    request = Request("long", tuple((i * i) % 12 for i in range(150)), sampling)
    whole, chunks = (
        run_all(make_engine(narrow.folder, tree="off", max_prefill_tokens=tokens), [request])
        for tokens in (256, 64)
    )
    assert whole == chunks


def test_what_is_under_way_can_be_reused(narrow: TinyModel) -> None:
    """By who is admitted before it has been read: it is computed behind it."""
    prompt = [(i * i) % 12 for i in range(41)]
    engine = make_engine(narrow.folder, tree="off")
    engine.add(greedy("a", prompt, 5))
    engine.step()
    engine.add(greedy("b", [*prompt, 3], 5))
    found = rest(engine, [])
    assert engine.stats.prefix_hit_tokens == 40
    for name, tokens in (("a", prompt), ("b", [*prompt, 3])):
        assert found[name] == greedy_reference(narrow.reference, tokens, 5)


@pytest.mark.parametrize("length", [3, 90], ids=["whole", "in chunks"])
def test_values_that_are_not_finite_are_found_when_they_are_read(
    narrow: TinyModel, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(narrow.folder, tree="off", max_prefill_tokens=64)
    poison(monkeypatch, "bad")
    engine.add(greedy("bad", [i % 12 for i in range(length)], 9))
    engine.step()
    engine.add(greedy("good", [4, 5], 9))
    found: list[TokenDelta] = []
    while engine.has_work:
        found += engine.step()
    engine.check()
    [failed] = [delta for delta in found if delta.request_id == "bad"]
    assert failed.finish_reason is FinishReason.ERROR
    assert "not finite" in str(failed.error)
    assert engine._runner._pool.data.isfinite().all()
    assert rest(engine, found)["good"] == greedy_reference(narrow.reference, [4, 5], 9)


def test_a_chunk_that_is_not_finite_is_found_before_the_next_whoever_is_beside_it(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    engine = make_engine(narrow.folder, tree="off", max_prefill_tokens=64)
    poison(monkeypatch, "bad")
    engine.add(greedy("beside", [7, 8], 9))
    engine.add(greedy("bad", [i % 12 for i in range(90)], 9))
    engine.step()
    deltas = engine.step()
    assert [(d.request_id, d.finish_reason) for d in deltas] == [
        ("beside", None),
        ("bad", FinishReason.ERROR),
    ]
    assert not engine._prompts, "its next chunk is in no pass"
    assert rest(engine, deltas)["beside"] == greedy_reference(narrow.reference, [7, 8], 9)
    assert not caplog.records


def test_a_launch_that_fails_is_made_again_one_by_one(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the first try has done counts once."""
    caplog.set_level(logging.ERROR)
    samplings = {"a": {"presence_penalty": 0.7, "seed": 1}, "b": {"temperature": 0.0}, "bad": {}}

    def requests() -> list[Any]:
        return [
            Request(name, (3, 1, i), SamplingParams(max_tokens=9, **values))
            for i, (name, values) in enumerate(samplings.items())
        ]

    plain = run_all(make_engine(narrow.folder, tree="off"), requests()[:2])
    engine = make_engine(narrow.folder, tree="off")
    ended = CapturedRunner._ended

    def broken(self: CapturedRunner, chunks: list[Chunk], *rest: Any) -> Any:
        found = ended(self, chunks, *rest)
        if any(chunk.sequence.request.request_id == "bad" for chunk in chunks):
            raise RuntimeError("out of luck")
        return found

    monkeypatch.setattr(CapturedRunner, "_ended", broken)
    for request in requests():
        engine.add(request)
    deltas = engine.step()
    assert [(d.request_id, d.error) for d in deltas if d.error] == [("bad", "internal error: RuntimeError")]
    found = rest(engine, deltas)
    assert {(name, 0): found[name] for name in ("a", "b")} == plain
    assert "it is made again" in caplog.text


@pytest.mark.parametrize("wanted", [{"logprobs": 1}, {"prompt_logprobs": 1}], ids=str)
def test_what_is_wanted_beside_tokens_is_read_at_once(narrow: TinyModel, wanted: dict[str, int]) -> None:
    engine = make_engine(narrow.folder, tree="off")
    engine.add(greedy("r", [1, 2, 3], 9, **wanted))
    [first] = engine.step()
    assert first.token_ids == greedy_reference(narrow.reference, [1, 2, 3], 1)
    assert (first.logprobs or first.prompt_logprobs) is not None
    assert not engine._prompts


@pytest.mark.parametrize("length", [8, 10])
def test_who_ended_before_its_values_were_found_not_finite_leaves_none_behind(
    narrow: TinyModel, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told, but its blocks go to others."""
    engine = make_engine(narrow.folder, tree="off")
    poison(monkeypatch, "bad")
    prompt = [i % 12 for i in range(length)]
    engine.add(greedy("bad", prompt, 9))
    engine.step()
    engine.add(greedy("good", [4, 5], 9))
    engine.abort("bad")
    found = rest(engine, [])
    assert engine._runner._pool.data.isfinite().all()
    engine.add(greedy("again", prompt, 9))
    found |= rest(engine, [])
    assert found["good"] == greedy_reference(narrow.reference, [4, 5], 9)
    assert found["again"] == greedy_reference(narrow.reference, prompt, 9)


def test_what_was_reused_before_it_was_found_not_finite_is_zeroed_too(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(narrow.folder, tree="off")
    poison(monkeypatch, "bad")
    prompt = [i % 12 for i in range(8)]
    engine.add(greedy("bad", prompt, 9))
    engine.step()
    engine.add(greedy("reuses", [*prompt, 3], 9))
    found: list[TokenDelta] = []
    while engine.has_work:
        found += engine.step()
    assert engine.stats.prefix_hit_tokens == 8
    assert [(d.request_id, d.finish_reason) for d in found] == [
        (name, FinishReason.ERROR) for name in ("bad", "reuses")
    ]
    engine.check()
    assert engine._runner._pool.data.isfinite().all()
    engine.add(greedy("again", prompt, 9))
    assert rest(engine, []) == {"again": greedy_reference(narrow.reference, prompt, 9)}


def test_who_ended_before_its_step_was_found_not_finite_leaves_none_behind(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree="off")
    engine.add(greedy("bad", [1, 2, 3], 9))
    engine.step()
    engine.step()
    [made] = engine._scheduler.running
    assert engine._flight is not None
    with torch.inference_mode():
        assert engine._flight.results._lent is not None
        engine._flight.results._lent.array[0, 0] = 0
        engine._runner._pool.data[:, :, made.blocks[0]] = float("nan")
    engine.add(greedy("good", [4, 5], 9))
    engine.abort("bad")
    assert rest(engine, []) == {"good": greedy_reference(narrow.reference, [4, 5], 9)}
    assert engine._runner._pool.data.isfinite().all()


def test_the_second_try_of_a_last_chunk_draws_what_the_first_drew(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot is made anew: the first try has drawn, and counted, a token that nobody saw."""
    prompt = tuple((i * i) % 12 for i in range(90))
    sampling = SamplingParams(temperature=0.9, seed=4, max_tokens=9, presence_penalty=0.7)
    settings: dict[str, Any] = {"tree": "off", "max_prefill_tokens": 64}
    wanted = run_all(make_engine(narrow.folder, **settings), [Request("r", prompt, sampling)])
    engine = make_engine(narrow.folder, **settings)
    ended, tries = CapturedRunner._ended, []

    def broken(self: CapturedRunner, chunks: list[Chunk], *rest: Any) -> Any:
        found = ended(self, chunks, *rest)
        tries.append(chunks[0].end)
        if tries == [64, 90]:
            raise RuntimeError("out of luck")
        return found

    monkeypatch.setattr(CapturedRunner, "_ended", broken)
    engine.add(Request("r", prompt, sampling))
    assert rest(engine, []) == {"r": wanted["r", 0]}
    assert tries == [64, 90, 90]
