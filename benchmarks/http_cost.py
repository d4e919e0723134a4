"""What HTTP costs: the same prompts through our server and through the engine alone, in one run.

    python -m benchmarks.http_cost --streams 8 --rounds 10

The server is a process of its own; the offline engine lives in this one, as the client does. They take
turns, A B B A, with new prompts of equal length in every round. The share lost is
1 - (tokens/s over HTTP) / (tokens/s offline), the median over rounds with its interval. Beside it stands the
server's CPU time per token over all rounds, requests included: of its main thread, which is the event loop's,
and of all others and the engine's process, where it has one. Options of `serve` may follow and go to both.

With --step-ms the device is simulated, on both sides: what remains is what the host does beside a fast one.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import sys
import time
from typing import Any

from benchmarks.common import (
    Server,
    add_model,
    bootstrap_interval,
    children,
    cpu_seconds,
    engine_config,
    exact_prompt,
    first_model,
    hardware,
    new_parser,
    numbers,
    parse_with_engine_options,
    positive,
    print_result,
)
from benchmarks.side_by_side import IDLE_SHARE, ours
from benchmarks.simulated_device import OPTIONS, SimulatedDevice, install
from engine.limits import cpus
from engine.llm import LLM
from engine.types import Request, SamplingParams


def offline(llm: LLM, prompts: list[str], new_tokens: int, salt: str) -> float:
    """Seconds of the engine for these prompts; the chat template and the tokenizer are not its work.

    Raises:
        RuntimeError: an answer of another length than asked for.
    """
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    ids = [llm.text.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    requests = [Request(f"{salt}-{i}", tuple(row), sampling) for i, row in enumerate(ids)]
    start = time.perf_counter()
    outputs = llm.generate(requests)
    seconds = time.perf_counter() - start
    if wrong := [output for output in outputs if len(output.token_ids) != new_tokens]:
        raise RuntimeError(f"asked for {new_tokens} tokens: {wrong[0].finish_reason}, {wrong[0].error}")
    return seconds


def summary(streams: int, http: list[float], alone: list[float]) -> dict[str, Any]:
    """Rates, and the share lost in each round's pair with its interval."""
    lost = [1 - a / b for a, b in zip(http, alone, strict=True)]
    low, high = bootstrap_interval(lost)
    return {
        "streams": streams,
        "http_tokens_per_s": round(statistics.median(http), 2),
        "offline_tokens_per_s": round(statistics.median(alone), 2),
        "share_lost_median": round(statistics.median(lost), 4),
        "share_lost_interval_95": [round(low, 4), round(high, 4)],
        "rounds": len(lost),
    }


def measure(args: argparse.Namespace, server: Server, llm: LLM) -> tuple[list[dict[str, Any]], list[str]]:
    """One summary per number of streams, and warnings about a server that did not rest."""
    model = asyncio.run(first_model(server.url))
    rng = random.Random(args.seed)
    # As the server does. Offline a look through all that is loaded would fall into one round or another.
    gc.collect()
    gc.freeze()
    rows: list[dict[str, Any]] = []
    busy: list[str] = []
    for streams in args.streams:
        rates: dict[str, list[float]] = {"http": [], "offline": []}
        busy_s = {"event_loop": 0.0, "other_threads": 0.0}
        for number in range(-1, args.rounds):
            new_tokens = args.new_tokens if number >= 0 else min(8, args.new_tokens)
            prompts = [exact_prompt(llm.text.tokenizer, args.prompt_tokens, rng) for _ in range(streams)]
            for side in ("http", "offline") if number % 2 == 0 else ("offline", "http"):
                if side == "http":
                    earlier = _thread_seconds(server)
                    answer = ours(server.url, model, prompts, args.prompt_tokens, new_tokens)
                    seconds = asyncio.run(answer)
                    if number >= 0:
                        for name, used in _thread_seconds(server).items():
                            busy_s[name] += used - earlier[name]
                else:
                    before = _seconds(server)
                    seconds = offline(llm, prompts, new_tokens, str(number))
                    share = (_seconds(server) - before) / seconds
                    if number >= 0 and share > IDLE_SHARE:
                        busy.append(f"while the engine ran alone, the server used {share:.0%} of a core")
                if number >= 0:
                    rates[side].append(streams * new_tokens / seconds)
        row = summary(streams, rates["http"], rates["offline"])
        tokens = args.rounds * streams * args.new_tokens
        row["server_us_per_token"] = {name: round(1e6 * used / tokens, 2) for name, used in busy_s.items()}
        rows.append(row)
        print(
            f"{streams:3} streams: HTTP {row['http_tokens_per_s']:8.1f} tok/s  offline "
            f"{row['offline_tokens_per_s']:8.1f} tok/s  lost {row['share_lost_median']:.1%} "
            f"(95 % {row['share_lost_interval_95']})  CPU us/token {row['server_us_per_token']}",
            flush=True,
        )
    for line in busy:
        print(f"warning: {line}", flush=True)
    return rows, busy


def _seconds(server: Server) -> float:
    """CPU time the server and the processes it started have used; zero where /proc does not tell."""
    return sum(cpu_seconds(pid) or 0.0 for pid in (server.pid, *children(server.pid)))


def _thread_seconds(server: Server) -> dict[str, float]:
    """The same of its event loop's thread, and of all others."""
    event_loop, whole = cpu_seconds(server.pid, main_thread=True) or 0.0, _seconds(server)
    return {"event_loop": event_loop, "other_threads": max(0.0, whole - event_loop)}


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--streams", type=numbers, default=[8])
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, help="simulate a device that takes so long a decode step")
    parser.add_argument("--token-us", type=float, default=25.0, help="and so long for a token of a prompt")
    parser.add_argument("--accepted", type=int, default=0, help="and accepts so many nodes beside the root")
    parser.add_argument("--engine-process", default="auto", help="the server's: on, off or auto")
    parser.add_argument("--most", type=float, default=0.10, help="largest share lost that passes")
    parser.add_argument("--seed", type=int, default=0)
    args, options = parse_with_engine_options(parser, argv)
    return args, ["--max-num-seqs", str(max(args.streams)), *options]


def main() -> int:
    args, options = parse()
    command, threads, simulated = ["server.cli"], cpus(), None
    if args.step_ms is not None:
        simulated = {"step_ms": args.step_ms, "token_us": args.token_us, "accepted": args.accepted}
        install(SimulatedDevice(args.step_ms / 1e3, args.token_us / 1e6, args.accepted))
        command, threads = ["benchmarks.simulated_device", *map(str, simulated.values())], 1
        options = [*OPTIONS, *options]
    llm = LLM(engine_config(options, model=args.model))
    served = [args.model, *options, "--engine-process", args.engine_process]
    with Server(served, threads=threads, command=command) as server:
        rows, busy = measure(args, server, llm)
    ok = all(row["share_lost_median"] <= args.most for row in rows)
    print_result(
        {
            "benchmark": "http_cost",
            "passed": ok,
            "most": args.most,
            "model": args.model,
            "simulated": simulated,
            "serve": options,
            "engine_process": args.engine_process,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "order": "ABBA",
            "rows": rows,
            "warnings": busy,
            "hardware": hardware(),
        }
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
