"""Load on any OpenAI-compatible server: tokens/s, requests/s, TTFT, TPOT, latency, errors, per concurrency.

    python -m benchmarks.http_load --concurrency 1,4,16 --prompts mt_bench.jsonl      (starts our server)
    python -m benchmarks.http_load --url http://localhost:8000 --model name
    python -m benchmarks.http_load --concurrency 16 --rate 2.5 -- --tree auto

Streamed chat completions from so many clients, each sending its next request when the last has ended; with
--rate requests arrive at random (Poisson) instead and the concurrency is the most under way at once.
TTFT is the time from sending a request, or from its arrival at random while all clients are busy, to its
first text; TPOT the mean time per token after that; both in ms as p50 / p90 / p99. The usage a server
reports is held against the stream: a mismatch is counted and makes the exit code 1, as an error does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common import (
    Server,
    data_of,
    first_model,
    hardware,
    new_client,
    new_parser,
    numbers,
    parse_with_engine_options,
    print_result,
    word_prompt,
)
from server.bench import read_prompts


@dataclass(slots=True)
class Sample:
    """One request. Times are `time.monotonic()`.

    Args:
        arrived: when it wanted to start; later than that it was kept waiting by our own bound.
        first: first text; None where none came.
        last: last text.
        chunks: events that carried text.
        logprob_tokens: tokens with log-probabilities, where they were asked for.
        error: what went wrong, in a word or two.
    """

    arrived: float
    first: float | None = None
    last: float = 0.0
    ended: float = 0.0
    chunks: int = 0
    logprob_tokens: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    usage_seen: bool = False
    error: str | None = None
    mismatches: list[str] = field(default_factory=list)

    @property
    def tpot_s(self) -> float | None:
        if self.first is None or self.completion_tokens < 2:
            return None
        return (self.last - self.first) / (self.completion_tokens - 1)


async def timed_chat(
    client: aiohttp.ClientSession, body: dict[str, Any], arrived: float | None = None
) -> Sample:
    """One streamed chat completion; errors are told in the sample, not raised."""
    sample = Sample(time.monotonic() if arrived is None else arrived)
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    done = False
    try:
        async with client.post("v1/chat/completions", json=request) as answer:
            if answer.status != 200:
                await answer.read()
                sample.error = f"HTTP {answer.status}"
                return sample
            async for payload in data_of(answer):
                done = done or payload == "[DONE]"
                if payload != "[DONE]":
                    _take(sample, json.loads(payload))
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
        sample.error = type(error).__name__
    finally:
        sample.ended = time.monotonic()
    if sample.error is None and not done:
        sample.error = "no [DONE]"
    if sample.error is None:
        sample.mismatches = check_usage(sample, body.get("max_tokens"))
    return sample


def _take(sample: Sample, event: dict[str, Any]) -> None:
    """Book one event of the stream."""
    if "error" in event:
        sample.error = "error event"
        return
    for choice in event["choices"]:
        # A thought's text has both of the last names here, and in vLLM since 0.16 the last alone.
        if any(map(choice["delta"].get, ("content", "reasoning_content", "reasoning"))):
            sample.last = time.monotonic()
            sample.first = sample.last if sample.first is None else sample.first
            sample.chunks += 1
        if choice.get("logprobs"):
            sample.logprob_tokens = (sample.logprob_tokens or 0) + len(choice["logprobs"]["content"] or ())
        sample.finish_reason = choice.get("finish_reason") or sample.finish_reason
    if usage := event.get("usage"):
        sample.usage_seen = True
        sample.prompt_tokens = usage["prompt_tokens"]
        sample.completion_tokens = usage["completion_tokens"]


def check_usage(sample: Sample, max_tokens: int | None) -> list[str]:
    """What the reported usage contradicts in the stream; empty where it may be true.

    A chunk holds at least one token, a `length` ending exactly `max_tokens`, and where log-probabilities
    came, one entry stands for each token but one that ended the text.
    """
    tokens = sample.completion_tokens
    if not sample.usage_seen:
        return ["no usage"]
    found: list[str] = []
    if tokens < sample.chunks:
        found.append("fewer tokens than chunks")
    if sample.prompt_tokens < 1:
        found.append("no prompt tokens")
    if max_tokens is not None and (
        tokens > max_tokens or (sample.finish_reason == "length" and tokens != max_tokens)
    ):
        found.append("not max_tokens")
    if sample.logprob_tokens is not None and not 0 <= tokens - sample.logprob_tokens <= (
        sample.finish_reason == "stop"
    ):
        found.append("not as many as logprobs")
    return found


async def run_level(
    client: aiohttp.ClientSession,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    rate: float | None,
    rng: random.Random,
) -> tuple[list[Sample], float]:
    """All these requests, at most so many at once; the samples and the seconds they took in all."""
    gate = asyncio.Semaphore(concurrency)
    samples: list[Sample] = []

    async def one(body: dict[str, Any], delay: float) -> None:
        await asyncio.sleep(delay)
        # In a closed loop a request begins when a client is free; at random ones the queue counts.
        arrived = time.monotonic() if rate else None
        async with gate:
            samples.append(await timed_chat(client, body, arrived))

    delays, now = [], 0.0
    for _ in bodies:
        delays.append(now)
        now += rng.expovariate(rate) if rate else 0.0
    start = time.monotonic()
    await asyncio.gather(*(one(body, delay) for body, delay in zip(bodies, delays, strict=True)))
    return samples, time.monotonic() - start


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(concurrency: int, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """One row of the sweep; times are of the requests that ended well."""
    good = [sample for sample in samples if sample.error is None]
    tokens, chunks = sum(s.completion_tokens for s in good), sum(s.chunks for s in good)
    times = {
        "ttft_ms": [sample.first - sample.arrived for sample in good if sample.first is not None],
        "tpot_ms": [tpot for sample in good if (tpot := sample.tpot_s) is not None],
        "latency_ms": [sample.ended - sample.arrived for sample in good],
    }
    return {
        "concurrency": concurrency,
        "requests": len(samples),
        "completed": len(good),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "usage_mismatches": dict(Counter(text for sample in good for text in sample.mismatches)),
        "finish_reasons": dict(Counter(str(sample.finish_reason) for sample in good)),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 2),
        "requests_per_s": round(len(good) / seconds, 3),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "completion_tokens": tokens,
        "tokens_per_chunk": round(tokens / chunks, 3) if chunks else None,
        **{
            name: {f"p{q}": round(1000 * percentile(found, q / 100), 1) for q in (50, 90, 99)}
            if found
            else None
            for name, found in times.items()
        },
    }


async def sweep(args: argparse.Namespace, url: str) -> tuple[str, list[dict[str, Any]]]:
    """The model's name and one row per concurrency."""
    model = args.model or await first_model(url)
    texts = read_prompts(args.prompts) if args.prompts else None
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    async with new_client(url) as client:
        if args.api_key:
            client.headers["Authorization"] = f"Bearer {args.api_key}"
        for concurrency in args.concurrency:
            count = args.requests or 4 * concurrency
            options = {"model": model, "max_tokens": args.max_tokens, "temperature": args.temperature}
            options |= args.body
            contents = [
                texts[i % len(texts)] if texts else word_prompt(args.prompt_tokens, rng) for i in range(count)
            ]
            bodies = [{**options, "messages": [{"role": "user", "content": text}]} for text in contents]
            await run_level(client, [body | {"max_tokens": 4} for body in bodies[:1]], 1, None, rng)
            samples, seconds = await run_level(client, bodies, concurrency, args.rate, rng)
            rows.append(row := summary(concurrency, samples, seconds))
            _show(row)
    return model, rows


def _show(row: dict[str, Any]) -> None:
    def three(name: str) -> str:
        found = row[name]
        return " / ".join(f"{found[f'p{q}']:.0f}" for q in (50, 90, 99)) if found else "-"

    print(
        f"{row['concurrency']:3} at once: {row['tokens_per_s']:8.1f} tok/s  {row['requests_per_s']} req/s  "
        f"TTFT {three('ttft_ms')}  TPOT {three('tpot_ms')}  latency {three('latency_ms')} ms  "
        f"errors {sum(row['errors'].values())}",
        flush=True,
    )
    for text, count in {**row["errors"], **row["usage_mismatches"]}.items():
        print(f"  {count} × {text}", flush=True)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    parser.add_argument("--url", help="a running server; else ours is started")
    parser.add_argument("--model", help="name to ask for (the first one listed), or what our server loads")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--concurrency", type=numbers, default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, help="per concurrency; four times as many if not given")
    parser.add_argument("--rate", type=float, help="arrivals per second, at random")
    parser.add_argument("--prompts", type=Path, help="JSONL of 'turns' or 'prompt'; else words")
    parser.add_argument("--prompt-tokens", type=int, default=60, help="of a prompt of random words, about")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--body", type=json.loads, default={}, help="more fields, as JSON: '{\"ignore_eos\": true}'"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    args, options = parse_with_engine_options(parser, argv)
    if args.url and options:
        parser.error(f"--url names a running server, so {' '.join(options)} would have no effect")
    if args.url:
        args.url = args.url.rstrip("/").removesuffix("/v1")
    if args.rate is not None and args.rate <= 0:
        parser.error("--rate must be above 0")
    return args, options


def main() -> int:
    args, options = parse()
    if args.url:
        model, rows = asyncio.run(sweep(args, args.url))
    else:
        serve = [args.model or "smollm2-135m", "--max-num-seqs", str(max(args.concurrency)), *options]
        args.model = None  # under the name it lists
        with Server(serve) as server:
            model, rows = asyncio.run(sweep(args, server.url))
    ok = not any(row["errors"] or row["usage_mismatches"] for row in rows)
    print_result(
        {
            "benchmark": "http_load",
            "passed": ok,
            "model": model,
            "url": args.url,
            "serve": None if args.url else serve,
            "prompts": args.prompts.name if args.prompts else f"about {args.prompt_tokens} tokens of words",
            "max_tokens": args.max_tokens,
            "temperature": args.temperature,
            "body": args.body,
            "rate_per_s": args.rate,
            "streamed": True,
            "rows": rows,
            "hardware_of_the_client": hardware(),
        }
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
