"""What the tree is worth to a client: a prompt file over HTTP, tree on against tree off, one stream.

    python -m benchmarks.tree_http --prompts benchmarks/data/code_editing.jsonl -- --tree auto --lookup on

Two servers stay loaded, one with these options of `serve` and one with the tree off, and answer every prompt
in turn, A B B A, streamed, at temperature 0. A ratio is a prompt's seconds without the tree over its seconds
with it; its interval is over prompts. Both must give the same text (float32); a difference is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Completion,
    Item,
    Server,
    chat,
    first_model,
    hardware,
    new_client,
    parse_with_engine_options,
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


def measure(args: argparse.Namespace, on: Server, off: Server) -> dict[str, Any]:
    """Rates of both sides, the ratio with its interval, and prompts whose texts differ."""
    model = asyncio.run(first_model(on.url))
    items = read_items(args.prompts, args.limit)
    for server in (on, off):  # allocator, lazy imports
        asyncio.run(answer(server, model, items[0], argparse.Namespace(max_tokens=8, prediction=False)))
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    tokens, different = 0, []
    for number, item in enumerate(items * args.rounds):
        texts = {}
        for side in ("on", "off") if number % 2 == 0 else ("off", "on"):
            spent, found = asyncio.run(answer(on if side == "on" else off, model, item, args))
            seconds[side].append(spent)
            texts[side] = found.text
        tokens += found.completion_tokens
        if texts["on"] != texts["off"]:
            different.append(number)
    return {
        "prompts": len(items),
        "on_tokens_per_s": round(tokens / sum(seconds["on"]), 2),
        "off_tokens_per_s": round(tokens / sum(seconds["off"]), 2),
        "ratio_of_totals": round(sum(seconds["off"]) / sum(seconds["on"]), 3),
        **ratio_interval(seconds["off"], seconds["on"]),
        "different_texts": different,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="embedded name or a local folder")
    parser.add_argument("--prompts", type=Path, required=True, help="MT-bench-shaped JSONL")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1, help="how often every prompt is asked")
    parser.add_argument("--prediction", action="store_true", help="send each item's `prediction`")
    args, options = parse_with_engine_options(parser)
    serve = [args.model, "--dtype", "float32", "--max-num-seqs", "4", "--prefix-caching", "false"]
    with (
        Server([*serve, *options]) as on,
        Server([*serve, *options, "--heads", "none", "--tree", "off", "--lookup", "off"]) as off,
    ):
        result = measure(args, on, off)
    print_result(
        {
            "benchmark": "tree_http",
            "model": args.model,
            "prompts_file": args.prompts.name,
            "max_tokens": args.max_tokens,
            "prediction": args.prediction,
            "serve": [*serve, *options],
            "order": "ABBA",
            **result,
            "hardware": hardware(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
