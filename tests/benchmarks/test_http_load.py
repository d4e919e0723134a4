"""The load generator against a real HTTP server around a `FakeEngine`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from benchmarks import http_load
from benchmarks.common import new_client
from benchmarks.http_load import Sample, check_usage, parse, percentile, run_level, summary, sweep
from engine.fake import FakeEngine
from engine.types import Request
from tests.server.conftest import EOS_ID, MODEL, TEXT, Defaults, RunningServer, endless, ids

Reply = Callable[[Request, int], Any]


def server(reply: Reply, **options: Any) -> RunningServer:
    engine = FakeEngine(reply, vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,), **options)
    return RunningServer(engine, Defaults(), {"drain_timeout": 0.0})


@pytest.fixture(scope="module")
def slow() -> Iterator[RunningServer]:
    """Three tokens every 10 ms, four requests at a time."""

    def reply(_request: Request, _index: int) -> Iterator[Sequence[int]]:
        return iter([ids("x"), *[ids("xyz")] * 1000])

    with server(reply, step_s=0.01, max_num_seqs=4) as running:
        yield running


def load(url: str, count: int, concurrency: int, rate: float | None = None, **body: Any) -> dict[str, Any]:
    async def drive() -> dict[str, Any]:
        message = {"role": "user", "content": "hi"}
        bodies = [{"model": MODEL, "messages": [message], "max_tokens": 13, **body}] * count
        async with new_client(url) as client:
            samples, seconds = await run_level(client, bodies, concurrency, rate, random.Random(0))
        return summary(concurrency, samples, seconds)

    return asyncio.run(drive())


def test_a_level_is_counted_and_timed(slow: RunningServer) -> None:
    row = load(slow.url, 6, 4)
    assert row["completed"] == row["requests"] == 6
    assert row["errors"] == row["usage_mismatches"] == {}
    assert row["completion_tokens"] == 6 * 13
    assert row["finish_reasons"] == {"length": 6}
    assert 2 < row["tokens_per_chunk"] < 3  # 1, then 3 a step
    # 13 tokens are 5 steps of at least 10 ms; the twelve after the first share four of them.
    assert row["latency_ms"]["p50"] >= 50
    assert row["ttft_ms"]["p50"] >= 10
    # (The client may come to read the first one late.)
    assert 2.5 <= row["tpot_ms"]["p50"] < row["latency_ms"]["p50"] / 12
    # Four at once, then two: two rounds of 50 ms.
    assert row["seconds"] >= 0.1
    assert row["tokens_per_s"] == pytest.approx(78 / row["seconds"], rel=0.05)


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning"])
def test_a_thought_is_text_by_each_of_its_names(name: str) -> None:
    sample = Sample(0.0)
    for text in ("", "a", "b"):
        http_load._take(sample, {"choices": [{"delta": {name: text}}]})
    assert (sample.chunks, sample.first is None) == (2, False)


def test_arrivals_at_random_count_the_wait(slow: RunningServer) -> None:
    closed, open_ = load(slow.url, 6, 1), load(slow.url, 6, 1, rate=1000.0)
    assert open_["completed"] == 6
    # One at a time: the last arrival waits for the five before it, and its TTFT says so.
    assert open_["ttft_ms"]["p99"] > 4 * 50
    assert closed["ttft_ms"]["p99"] < open_["ttft_ms"]["p99"] / 2


def test_errors_are_told_by_kind_and_not_timed() -> None:
    def breaks(_request: Request, _index: int) -> Iterator[Any]:
        return iter([ids("x"), RuntimeError("boom")])

    with server(breaks) as running:
        row = load(running.url, 3, 3)
        assert row["errors"] == {"error event": 3}
        assert row["latency_ms"] is None
        assert load(running.url, 2, 1, temperature=9)["errors"] == {"HTTP 400": 2}
    assert load(running.url, 1, 1)["errors"] == {"ClientConnectorError": 1}


def test_usage_is_held_against_the_stream() -> None:
    good = Sample(
        0.0, chunks=3, prompt_tokens=5, completion_tokens=8, finish_reason="length", usage_seen=True
    )
    assert check_usage(good, 8) == []
    assert check_usage(good, None) == []
    assert check_usage(good, 9) == ["not max_tokens"]
    assert check_usage(good, 7) == ["not max_tokens"]
    good.chunks, good.prompt_tokens = 9, 0
    assert check_usage(good, 8) == ["fewer tokens than chunks", "no prompt tokens"]
    assert check_usage(Sample(0.0), 8) == ["no usage"]
    stopped = Sample(
        0.0, prompt_tokens=5, completion_tokens=6, finish_reason="stop", usage_seen=True, logprob_tokens=5
    )
    assert check_usage(stopped, 8) == []  # the end-of-text token has no entry
    stopped.logprob_tokens = 4
    assert check_usage(stopped, 8) == ["not as many as logprobs"]


def test_the_sweep_asks_for_the_first_model_listed() -> None:
    with server(endless) as running:
        arguments = ["--url", f"{running.url}/v1/", "--concurrency", "1,3", "--max-tokens", "5"]
        args, _ = parse([*arguments, "--prompt-tokens", "20", "--body", '{"seed": 1}'])
        model, rows = asyncio.run(sweep(args, args.url))
    assert model == MODEL
    assert [(row["concurrency"], row["completed"]) for row in rows] == [(1, 4), (3, 12)]
    assert {request.sampling.seed for request in running.engine.submitted} == {1}


def test_percentile() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.9) == 9.0
    assert percentile([4.0], 0.99) == 4.0


def test_options_that_would_have_no_effect_are_refused() -> None:
    with pytest.raises(SystemExit):
        parse(["--url", "http://x", "--", "--tree", "8"])
    with pytest.raises(SystemExit):
        parse(["--rate", "0"])
    assert parse(["--", "--tree", "8"])[1] == ["--tree", "8"]
