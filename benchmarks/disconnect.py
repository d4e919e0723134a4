"""100 requests, 16 at a time, a third of which hang up at a random moment: the rest must not notice.

    python -m benchmarks.disconnect --tree 8 --heads FOLDER

Starts a server (or uses the one at --url, which must be idle), and checks that every request that
stayed got exactly the tokens it asked for, that nothing runs or waits afterwards, and that no K/V
block is lost: free + cached = total. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.common import (
    Server,
    add_model,
    chat,
    first_model,
    hardware,
    kv_blocks,
    metrics,
    new_client,
    new_parser,
    print_result,
)

SETTLE_S = 10.0
"""Longest wait, after the last answer, for the server to be idle."""

_TOPICS = ("rivers", "bread", "the moon", "old maps", "bees", "trains", "salt", "bridges")


@dataclass(frozen=True, slots=True)
class Plan:
    """One request: its length, whether it streams, and how long until it hangs up (None: it stays)."""

    number: int
    max_tokens: int
    stream: bool
    leave_after_s: float | None

    @property
    def prompt(self) -> str:
        return f"Request {self.number}: tell me about {_TOPICS[self.number % len(_TOPICS)]}."


def make_plans(count: int, typical_s: float, max_tokens: int, rng: random.Random) -> list[Plan]:
    """A third of the requests leave, between at once and half the time that one of full length takes."""
    leaving = set(rng.sample(range(count), count // 3))
    return [
        Plan(
            number,
            max_tokens=rng.randint(max(1, max_tokens // 4), max_tokens),
            stream=rng.random() < 0.5,
            leave_after_s=rng.uniform(0.0, typical_s / 2) if number in leaving else None,
        )
        for number in range(count)
    ]


async def run_plan(url: str, model: str, plan: Plan) -> tuple[str, str]:
    """("complete" | "left" | "finished first" | "failed", a detail when failed)."""
    # A client of its own: closing a pooled connection is up to the pool, and here it is the point.
    async with new_client(url) as client:
        options: dict[str, Any] = {"temperature": 0.7, "seed": plan.number, "ignore_eos": True}
        answer = asyncio.ensure_future(
            chat(client, model, plan.prompt, stream=plan.stream, max_tokens=plan.max_tokens, **options)
        )
        done, _ = await asyncio.wait({answer}, timeout=plan.leave_after_s)
        if not done:
            answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer
            return "left", ""
        try:
            got = answer.result()
        except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:
            return "failed", f"request {plan.number}: {type(error).__name__}: {error}"
    if (got.completion_tokens, got.finish_reason) != (plan.max_tokens, "length"):
        found = f"{got.completion_tokens} tokens, {got.finish_reason}"
        return "failed", f"request {plan.number}: asked for {plan.max_tokens} tokens, got {found}"
    return ("complete" if plan.leave_after_s is None else "finished first"), ""


async def page(url: str) -> dict[str, float]:
    async with new_client(url) as client, client.get("metrics") as answer:
        return metrics(await answer.text())


def is_idle(found: dict[str, float], total: int) -> bool:
    """Nothing runs, nothing waits, and every block is free or kept for reuse."""
    blocks = kv_blocks(found)
    return (
        found["medusa_num_requests_running"] == 0
        and found["medusa_num_requests_waiting"] == 0
        and blocks["used"] == 0
        and blocks["free"] + blocks["cached"] == total
    )


async def drive(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """Run the plans and wait for the server to come to rest; the result's measured part."""
    model = await first_model(url)
    total = sum(kv_blocks(await page(url)).values())

    # How long a request takes with all the others around it: a first wave that stays to its end.
    rng = random.Random(args.seed)
    start = time.monotonic()
    wave = [Plan(-n - 1, args.max_tokens, True, None) for n in range(args.concurrency)]
    await asyncio.gather(*(run_plan(url, model, plan) for plan in wave))
    typical_s = time.monotonic() - start

    plans = make_plans(args.requests, typical_s, args.max_tokens, rng)
    gate = asyncio.Semaphore(args.concurrency)

    async def gated(plan: Plan) -> tuple[str, str]:
        async with gate:
            return await run_plan(url, model, plan)

    start = time.monotonic()
    outcomes = await asyncio.gather(*(gated(plan) for plan in plans))
    seconds = time.monotonic() - start
    end = time.monotonic()
    while not is_idle(found := await page(url), total) and time.monotonic() - end < SETTLE_S:
        await asyncio.sleep(0.05)
    settled_s = time.monotonic() - end

    counts = Counter(kind for kind, _ in outcomes)
    for _, detail in outcomes:
        if detail:
            print(detail, flush=True)
    staying = sum(plan.leave_after_s is None for plan in plans)
    meant_to_leave = len(plans) - staying
    return {
        "passed": is_idle(found, total)
        and counts["failed"] == 0
        and counts["complete"] == staying
        and counts["left"] * 2 >= meant_to_leave,  # else too few left for this to have shown anything
        "requests": args.requests,
        "concurrency": args.concurrency,
        "meant_to_leave": meant_to_leave,
        **{kind.replace(" ", "_"): counts[kind] for kind in ("complete", "left", "finished first", "failed")},
        "running": int(found["medusa_num_requests_running"]),
        "waiting": int(found["medusa_num_requests_waiting"]),
        "kv_blocks": {"total": total, **kv_blocks(found)},
        "idle_after_s": round(settled_s, 2),
        "seconds": round(seconds, 1),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--url", help="a running, idle server; else one is started with the options below")
    add_model(parser)
    parser.add_argument("--heads", default="none")
    parser.add_argument("--tree", default="off")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="longest answer; each draws its own length"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    if args.url:
        settings: dict[str, Any] = {"url": args.url}
        result = asyncio.run(drive(args, args.url))
    else:
        settings = {name: getattr(args, name) for name in ("model", "heads", "tree", "dtype", "device")}
        # Fewer slots than clients, so that some leave while they wait.
        serve = [args.model, "--max-num-seqs", str(max(1, args.concurrency // 2))]
        for name in ("heads", "tree", "dtype", "device"):
            serve += [f"--{name}", str(settings[name])]
        with Server(serve) as server:
            result = asyncio.run(drive(args, server.url))
    print_result({"benchmark": "disconnect", **result, "settings": settings, "hardware": hardware()})
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
