"""What the tree is worth to a client: a prompt file over HTTP, tree on against tree off, one stream.

    python -m benchmarks.tree_http --prompts benchmarks/data/code_editing.jsonl -- --tree auto --lookup on
    python -m benchmarks.tree_http --prompts mt_bench.jsonl --sizes 2,4,8,16,32,64 -- --lookup off

Servers stay loaded, one with these options of `serve`, one with the tree off and one for each of --sizes, and
answer every prompt in turn, A B B A, streamed, at temperature 0. A ratio is a prompt's seconds without the
tree over its seconds with it; its interval is over prompts. All must give the same text (float32); a
difference is reported. With --sizes the result also says what the cost model promised for each size.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import ExitStack
from typing import Any

from benchmarks.common import (
    Completion,
    Item,
    Server,
    add_model,
    add_prompts,
    chat,
    engine_config,
    first_model,
    hardware,
    new_client,
    new_parser,
    numbers,
    parse_with_engine_options,
    positive,
    print_result,
    ratio_interval,
    read_items,
)


async def answer(
    server: Server, model: str, item: Item, args: argparse.Namespace
) -> tuple[float, Completion]:
    """Seconds from sending to the last event, and the answer."""
    body: dict[str, Any] = {}
    if args.prediction:
        body["prediction"] = {"type": "content", "content": item.prediction}
    async with new_client(server.url) as client:
        start = time.perf_counter()
        found = await chat(
            client, model, item.prompt, stream=True, temperature=0, max_tokens=args.max_tokens, **body
        )
        return time.perf_counter() - start, found


def measure(args: argparse.Namespace, servers: dict[str, Server]) -> dict[str, Any]:
    """Every prompt on each side, forwards and backwards in turn; "off" is what the others are held to."""
    model = asyncio.run(first_model(servers["off"].url))
    items = read_items(args.prompts, args.limit)
    for server in servers.values():  # allocator, lazy imports
        asyncio.run(answer(server, model, items[0], argparse.Namespace(max_tokens=8, prediction=False)))
    seconds: dict[str, list[float]] = {side: [] for side in servers}
    tokens, different = 0, []
    for number, item in enumerate(items * args.rounds):
        texts = {}
        for side in servers if number % 2 == 0 else reversed(servers):
            spent, found = asyncio.run(answer(servers[side], model, item, args))
            seconds[side].append(spent)
            texts[side] = found.text
        tokens += found.completion_tokens
        if len(set(texts.values())) > 1:
            different.append(number)
    return {"prompts": len(items), **summary(seconds, tokens), "different_texts": different}


def summary(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Each side's rate, and its ratio to "off" with the interval over prompts."""
    off = seconds["off"]
    sides = {
        side: {
            "tokens_per_s": round(tokens / sum(spent), 2),
            "ratio_of_totals": round(sum(off) / sum(spent), 3),
            **(ratio_interval(off, spent) if side != "off" else {}),
        }
        for side, spent in seconds.items()
    }
    fixed = {side: found["tokens_per_s"] for side, found in sides.items() if side.isdigit() or side == "off"}
    best = max(fixed, key=lambda side: fixed[side])
    held = {"best_fixed": best, "on_to_best_fixed": ratio_interval(seconds[best], seconds["on"])}
    return {"sides": sides, **(held if len(fixed) > 1 else {})}


def promises(model: str, options: list[str]) -> dict[str, float]:
    """What the cost model thinks of each size on this machine: ratios to plain decoding, by nodes."""
    from engine.llm import LLM

    llm = LLM(engine_config(options, model=model, tree="auto", lookup="off"))
    found = llm.promised(1, _CONTEXT)
    return {str(size): round(rate / found[1], 3) for size, rate in found.items()}


def main() -> int:
    parser = new_parser(__doc__)
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=positive, default=1, help="how often every prompt is asked")
    parser.add_argument("--prediction", action="store_true", help="send each item's `prediction`")
    parser.add_argument("--sizes", type=numbers, default=[], help="also these fixed sizes, without lookup")
    args, options = parse_with_engine_options(parser)
    serve = [args.model, "--dtype", "float32", "--max-num-seqs", "4", "--prefix-caching", "false"]
    promised = promises(args.model, options) if args.sizes else {}
    with ExitStack() as stack:
        servers = {"on": [*serve, *options]}
        for size in args.sizes:
            servers[str(size)] = [*serve, *options, "--tree", str(size), "--lookup", "off"]
        servers["off"] = [*serve, *options, "--heads", "none", "--tree", "off", "--lookup", "off"]
        running = {side: stack.enter_context(Server(given)) for side, given in servers.items()}
        result = measure(args, running)
    print_result(
        {
            "benchmark": "tree_http",
            "model": args.model,
            "prompts_file": args.prompts.name,
            "max_tokens": args.max_tokens,
            "prediction": args.prediction,
            "serve": [*serve, *options],
            "order": "ABBA",
            **({"promised": promised} if promised else {}),
            **result,
            "hardware": hardware(),
        }
    )
    return 0


_CONTEXT = 128
"""Tokens in the cache that the cost model is asked about: those of a usual answer's middle."""

if __name__ == "__main__":
    sys.exit(main())
