"""Prompts of several sequences in one pass, as on a GPU: nothing changes by it but the number of passes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from engine.attention.base import is_ragged
from engine.attention.sdpa import SdpaAttention
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.prompt_runner import PromptRunner
from engine.scheduler import Chunk
from engine.step_results import Prefilled
from engine.types import FinishReason, Request, SamplingParams, TokenDelta
from tests import support
from tests.engine.conftest import TinyModel
from tests.support import greedy, make_engine

PROMPTS = [[1, 2, 3], [4], [(5 * i) % 12 for i in range(41)], [7, 7, 2, 9, 1, 3], [3] * 17]


def runner() -> type[PromptRunner]:
    """Whose passes these are."""
    return CapturedRunner if support.MODE["captured"] else PromptRunner


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Sizes of the chunks of each pass."""
    monkeypatch.setattr(SdpaAttention, "ragged", True, raising=False)
    found: list[list[int]] = []
    forward = runner()._chunks_forward

    def noted(self: PromptRunner, chunks: list[Chunk]) -> torch.Tensor:
        found.append([chunk.end - chunk.start for chunk in chunks])
        return forward(self, chunks)

    monkeypatch.setattr(runner(), "_chunks_forward", noted)
    return found


def engine(model: TinyModel, **settings: Any) -> Engine:
    values: dict[str, Any] = {"tree": 8, "heads": str(model.heads), "attention": "sdpa", **settings}
    return make_engine(model.folder, **values)


def outputs(made: Engine, requests: list[Request]) -> dict[tuple[str, int], list[TokenDelta]]:
    for request in requests:
        made.add(request)
    found: dict[tuple[str, int], list[TokenDelta]] = {}
    while made.has_work:
        for delta in made.step():
            found.setdefault((delta.request_id, delta.index), []).append(delta)
    made.check()
    return found


def shown(deltas: list[TokenDelta]) -> Any:
    """What a client sees of a sequence, numbers to 1e-4."""
    logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    prompt = [entry for delta in deltas for entry in delta.prompt_logprobs or []]

    def rounded(entry: Any) -> Any:
        return None if entry is None else (entry.token_id, pytest.approx(entry.logprob, abs=1e-4))

    tokens = [token for delta in deltas for token in delta.token_ids]
    ends = [delta.finish_reason for delta in deltas]
    return tokens, [rounded(e) for e in logprobs], [rounded(e) for e in prompt], ends[-1]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3, "logprobs": 2},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 0.7, "seed": 5, "n": 3, "presence_penalty": 0.5},
    {"temperature": 0.0, "logprobs": 0},
]


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 64}, {"prefix_caching": False}], ids=str)
def test_prompts_together_give_what_each_gives_alone(
    narrow: TinyModel, passes: list[list[int]], settings: dict[str, Any]
) -> None:
    requests = [
        Request(f"{i}", tuple(prompt), SamplingParams(max_tokens=14, **sampling))
        for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
    ]
    together = outputs(engine(narrow, **settings), requests)
    assert max(map(len, passes)) > 1
    assert any(len(set(sizes)) > 1 for sizes in passes), "chunks of different lengths in one pass"
    passes.clear()
    alone: dict[tuple[str, int], list[TokenDelta]] = {}
    one_at_a_time = engine(narrow, max_num_seqs=1, **settings)
    for request in requests:
        alone |= outputs(one_at_a_time, [request])
    assert max(map(len, passes)) == 1
    assert together.keys() == alone.keys()
    for key in alone:
        assert shown(together[key]) == shown(alone[key]), key


def test_all_that_arrive_at_once_are_one_pass(narrow: TinyModel, passes: list[list[int]]) -> None:
    outputs(engine(narrow), [greedy(f"{i}", prompt, 4) for i, prompt in enumerate(PROMPTS)])
    assert passes == [[len(prompt) for prompt in PROMPTS]]


def test_the_bound_on_a_step_holds_for_all_of_its_prompts(narrow: TinyModel, passes: list[list[int]]) -> None:
    outputs(
        engine(narrow, max_step_tokens=64), [greedy(f"{i}", prompt, 4) for i, prompt in enumerate(PROMPTS)]
    )
    assert all(sum(sizes) <= 64 for sizes in passes)
    assert sum(map(sum, passes)) == sum(map(len, PROMPTS))


def test_without_such_attention_each_is_a_pass(
    narrow: TinyModel, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_ragged(SdpaAttention(2))
    monkeypatch.delattr(SdpaAttention, "ragged")
    assert not is_ragged(SdpaAttention(2))
    outputs(engine(narrow), [greedy(f"{i}", prompt, 4) for i, prompt in enumerate(PROMPTS)])
    assert [len(sizes) for sizes in passes] == [1] * len(PROMPTS)


def test_one_that_fails_costs_no_other(
    narrow: TinyModel,
    passes: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pass over several that fails is made again for each, and what it had done counts once."""
    caplog.set_level(logging.ERROR)
    requests = [
        Request(f"{i}", tuple(prompt), SamplingParams(max_tokens=8, **sampling))
        for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
    ]
    wanted = outputs(engine(narrow), requests)
    draw = runner()._first_tokens

    def broken(self: PromptRunner, chunks: list[Chunk], *rest: Any) -> list[Prefilled]:
        drawn = draw(self, chunks, *rest)
        if any(chunk.sequence.request.request_id == "1" for chunk in chunks):
            raise RuntimeError("out of luck")
        return drawn

    monkeypatch.setattr(runner(), "_first_tokens", broken)
    found = outputs(engine(narrow), requests)
    (failed,) = found.pop(("1", 0))
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "internal error: RuntimeError"
    del wanted[("1", 0)]
    assert {key: shown(deltas) for key, deltas in found.items()} == {
        key: shown(deltas) for key, deltas in wanted.items()
    }
    assert "each is computed on its own" in caplog.text


def test_values_that_are_not_finite_end_their_own_prompt_only(
    narrow: TinyModel, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = outputs(engine(narrow), [greedy("good", PROMPTS[2], 9)])
    forward = runner()._chunks_forward

    def poisoned(self: PromptRunner, chunks: list[Chunk]) -> torch.Tensor:
        hidden, end = forward(self, chunks), 0
        for chunk in chunks:
            end += chunk.end - chunk.start
            if chunk.sequence.request.request_id == "bad":
                hidden[end - 1, 0] = float("nan")
        return hidden

    monkeypatch.setattr(runner(), "_chunks_forward", poisoned)
    found = outputs(engine(narrow), [greedy("bad", PROMPTS[0], 9), greedy("good", PROMPTS[2], 9)])
    (failed,) = found["bad", 0]
    assert failed.finish_reason is FinishReason.ERROR
    assert "not finite" in str(failed.error)
    assert shown(found["good", 0]) == shown(wanted["good", 0])


def test_what_a_failed_pass_had_done_for_a_later_chunk_counts_once(
    narrow: TinyModel, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.9, seed=4, prompt_logprobs=1, presence_penalty=0.7)
    long = Request("long", tuple((7 * i) % 12 for i in range(80)), sampling)
    settings = {"max_step_tokens": 64}
    wanted = outputs(engine(narrow, **settings), [long])
    draw = runner()._first_tokens

    def broken(self: PromptRunner, chunks: list[Chunk], *rest: Any) -> list[Prefilled]:
        drawn = draw(self, chunks, *rest)
        if len(chunks) > 1 and all(chunk.draws for chunk in chunks):
            raise RuntimeError("out of luck")
        return drawn

    monkeypatch.setattr(runner(), "_first_tokens", broken)
    passes.clear()
    made = engine(narrow, **settings)
    made.add(long)
    made.step()
    found = outputs(made, [greedy("other", [1, 2] * 15, 5)])
    assert passes[:4] == [[64], [16, 30], [16], [30]]
    assert shown(found["long", 0]) == shown(wanted["long", 0])
    assert found["other", 0][-1].finish_reason is FinishReason.LENGTH


def test_prompts_come_in_chunks_of_their_own_bound(narrow: TinyModel) -> None:
    made = make_engine(narrow.folder, max_prefill_tokens=64)
    made.add(greedy("a", [i % 10 for i in range(100)], 2))
    for cached in (64, 100):
        made.step()
        (sequence,) = made._scheduler
        assert sequence.num_cached == cached
