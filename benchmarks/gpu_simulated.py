"""What a 7B would gain with the published Vicuna heads: measured step times times published accuracies.

A simulation, and marked as one in the results. The heads are taken as independent, as the paper takes them
where it builds its trees (Cai et al. 2024, section 2.3.3): a node comes true with the product of the shares
with which its tokens were right on their own.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu_run import Run
from engine.medusa.tree import greedy_tree

__all__ = ["acceptance_lengths", "published", "simulated"]

FILE = ROOT / "benchmarks" / "data" / "vicuna_heads.json"


def published() -> list[list[float]]:
    """For each head, the share of positions at which its k-th best token was the right one."""
    within = json.loads(FILE.read_text(encoding="utf-8"))["vicuna-7b-v1.3"]
    return [[b - a for a, b in zip([0.0, *head], head, strict=False)] for head in within]


def acceptance_lengths(accuracies: list[list[float]], sizes: list[int]) -> dict[int, float]:
    """Expected tokens a step for the best tree of each size, root counted."""
    tree = greedy_tree(accuracies, max(sizes))
    chances = []
    for path in tree.paths:
        chance = 1.0
        for head, rank in enumerate(path):
            chance *= accuracies[head][rank]
        chances.append(chance)
    return {size: 1.0 + sum(chances[: size - 1]) for size in sizes}


def simulated(run: Run) -> dict[str, Any]:
    """Speed-up over plain decoding by batch, context and nodes, from the measured steps of the 7B shape."""
    name = "tiny" if run.tiny else "llama-2-7b"
    rows = run.parts.get("steps", {}).get(name, {}).get("rows", [])
    times = {
        (row["batch"], row["context"], row["nodes"], row["drafting"]): row["ms"]
        for row in rows
        if "ms" in row
    }
    if not times:
        return {"skipped": f"the steps of {name} were not measured"}
    lengths = acceptance_lengths(published(), sorted({nodes for _, _, nodes, _ in times}))
    found: dict[str, Any] = {
        "simulated": True,
        "about": "published top-k accuracies of Vicuna 7B's Medusa-1 heads, taken as independent, "
        "and measured steps of this shape with random weights, drafting included",
        "acceptance_length": {str(nodes): round(length, 3) for nodes, length in lengths.items()},
        "rows": [],
    }
    for batch, context in sorted({(batch, context) for batch, context, _, _ in times}):
        plain = times.get((batch, context, 1, False))
        if plain is None:
            continue
        gains = {
            nodes: length * plain / times[batch, context, nodes, True]
            for nodes, length in lengths.items()
            if (batch, context, nodes, True) in times
        }
        gains[1] = 1.0
        best = max(gains, key=lambda nodes: gains[nodes])
        row = {"batch": batch, "context": context, "best_nodes": best, "speed_up": round(gains[best], 3)}
        row["by_nodes"] = {str(nodes): round(gain, 3) for nodes, gain in sorted(gains.items())}
        found["rows"].append(row)
        print(row, flush=True)
    return found
