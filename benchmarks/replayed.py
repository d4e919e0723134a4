"""Tokens a step that two sets of heads bring, without decoding with either: minutes where that takes an hour.

    python -m benchmarks.replayed --prompts mt_bench.jsonl --against OLD -- --heads NEW --tree 64 --lookup 8

A greedy answer is the same whatever drafts it. So plain decoding answers once, one pass over the answers
tells which of the heads' guesses come true at each place, and the lookup's own search which of its chain
do; a step is then the longer of the two, as in `engine.medusa.accept`. It gives what `benchmarks.acceptance
--against` counts (but for ties: hidden states are kept in 16 bits), where verifying trees on a CPU takes an
hour. It cannot tell whether texts differ: the engine must show that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.acceptance import TREE_OFF
from benchmarks.common import (
    add_model,
    add_prompts,
    engine_config,
    hardware,
    new_parser,
    parse_with_engine_options,
    print_result,
    ratio_interval,
    read_items,
)
from engine.config import EngineConfig
from engine.medusa.calibrated import TREE_FILE
from engine.medusa.configured import head_nodes
from engine.medusa.lookup import Lookup
from engine.medusa.tree import Tree
from engine.types import Request, SamplingParams
from server.bench import settings_given
from training.data import Row
from training.evaluate import accepted_lengths
from training.measure import HeldOut

Counts = NDArray[np.int64]
"""[A] for each position of an answer: nodes below its root that come true."""


def answers(config: EngineConfig, texts: list[str], max_tokens: int) -> list[Row]:
    """Greedy answers of plain decoding, as rows that are numbered by their conversation."""
    from engine.llm import LLM

    llm = LLM(config)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    prompts = [tuple(llm.text.encode_chat([{"role": "user", "content": text}])) for text in texts]
    outputs = llm.generate([Request(f"{i}", prompt, sampling) for i, prompt in enumerate(prompts)])
    return [
        Row(i, 0, 0, 0.0, np.array(prompt), np.array(output.token_ids))
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def head_counts(heads: Path, rows: list[Row], nodes: int, *, model: str, cache_dir: Path) -> list[Counts]:
    """What the first `nodes` nodes of the tree beside these heads bring, root included in `nodes`.

    Raises:
        ValueError: two rows are the same.
    """
    held = HeldOut(str(heads), rows, model=model, cache_dir=cache_dir, device="cpu", dtype="float32")
    ranks = held.ranks(bigram=held.bigram_beside(str(heads)))
    folder = heads if heads.is_dir() else heads.parent
    found = accepted_lengths(ranks.ranks, Tree.load(folder / TREE_FILE).prefix(nodes))
    counts = np.split(found, np.unique(ranks.ends)[:-1])
    if [len(each) for each in counts] != [len(row.answer) for row in rows]:
        raise ValueError("a prompt occurs twice")
    return counts


def lookup_counts(rows: list[Row], size: int) -> list[Counts]:
    """What a chain of `size` brings that the engine's lookup proposes."""
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    lookup = Lookup(size=size, max_num_seqs=len(rows), max_tokens=longest, device=torch.device("cpu"))
    found = [np.zeros(len(row.answer), dtype=np.int64) for row in rows]
    if not size:
        return found
    for slot, row in enumerate(rows):  # what lies behind a root is not searched
        text = torch.from_numpy(np.concatenate((row.prompt, row.answer))).int()
        lookup.history[slot, : len(text)] = text
    for place in range(max(len(row.answer) for row in rows) - 1):
        slots = [slot for slot, row in enumerate(rows) if place + 1 < len(row.answer)]
        roots = torch.tensor([len(rows[slot].prompt) + place for slot in slots])
        proposal = lookup.propose(torch.tensor(slots), roots, max_length=int(roots.max()))
        for slot, chain, count in zip(slots, proposal.tokens.numpy(), proposal.count.tolist(), strict=True):
            follows = rows[slot].answer[place + 1 : place + 1 + count]
            found[slot][place] = np.cumprod(chain[: len(follows)] == follows).sum()
    return found


def steps(counts: Counts) -> int:
    """Decode steps of an answer whose first token comes from prefill."""
    place = found = 0
    while place + 1 < len(counts):
        place += 1 + int(counts[place])
        found += 1
    return found


def compare(categories: list[str], new: list[Counts], old: list[Counts]) -> dict[str, Any]:
    """A row per category and one for all, as of `benchmarks.acceptance --against`."""
    sides = {"new": new, "old": old}
    taken = {name: [max(1, steps(each)) for each in counts] for name, counts in sides.items()}
    rows: dict[str, Any] = {}
    for category in [*dict.fromkeys(categories), "all"]:
        chosen = [i for i, own in enumerate(categories) if category in ("all", own)]
        tokens = [len(new[i]) - 1 for i in chosen]
        row: dict[str, Any] = {}
        lengths = {}
        for name, counted in taken.items():
            row[name] = round(sum(tokens) / sum(counted[i] for i in chosen), 3)
            lengths[name] = [emitted / counted[i] for emitted, i in zip(tokens, chosen, strict=True)]
        rows[category] = row | ratio_interval(lengths["new"], lengths["old"])
        print(f"{category:16} {rows[category]}", flush=True)
    return rows


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, EngineConfig, EngineConfig]:
    """Arguments, what is replayed, and what answers."""
    parser = new_parser(__doc__)
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--against", type=Path, required=True, help="other heads, with the tree beside them")
    args, options = parse_with_engine_options(parser, argv)
    config = engine_config(options, model=args.model)
    if not isinstance(config.tree, int) or config.heads is None or config.lookup == "on":
        parser.error("give --heads, a number for --tree, and for --lookup a number or 'off', behind --")
    plain = engine_config(options, model=args.model, dtype="float32", device="cpu", **TREE_OFF)
    return args, config, plain


def main() -> int:
    args, config, plain = parse()
    items = read_items(args.prompts, args.limit)
    rows = answers(plain, [item.prompt for item in items], args.max_tokens)
    assert isinstance(config.tree, int)
    assert config.heads is not None
    nodes = head_nodes(config, config.tree)
    chains = lookup_counts(rows, config.tree - nodes)
    sides = []
    with tempfile.TemporaryDirectory(prefix="medusa-replayed-") as folder:
        for heads in (Path(config.heads), args.against):
            counts = head_counts(heads, rows, nodes, model=args.model, cache_dir=Path(folder))
            sides.append([np.maximum(a, b) for a, b in zip(counts, chains, strict=True)])
    print_result(
        {
            "benchmark": "replayed",
            "prompts": args.prompts.name,
            "max_tokens": args.max_tokens,
            "temperature": 0,
            "against": args.against.name,
            "tokens": sum(len(row.answer) for row in rows),
            "rows": compare([item.category for item in items], *sides),
            "settings": settings_given(config),
            "dtype": "float32",
            "hardware": hardware(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
