"""Plain numbers the engine counts while it runs; the server turns them into Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import MAX_TREE_NODES

__all__ = ["EngineStats"]


@dataclass(slots=True)
class EngineStats:
    """Totals since start-up, written by the engine thread only; readers may see them mid-step.

    Args:
        prompt_tokens: tokens of the prompts that were prefilled, once a request.
        generation_tokens: tokens emitted to requests.
        num_steps: engine steps.
        num_drafts: trees verified (one per sequence and step, plain decoding not counted).
        draft_tokens: tree nodes verified, root not counted.
        accepted_tokens: tree nodes accepted, root not counted.
        accepted_by_source: the same by what had drafted them (a `DraftSource` value).
        acceptance_counts: decode steps of a sequence by acceptance length (root counted, so plain
            decoding is 1); index 0 is unused.
        tree_size: nodes of the largest tree in the last decode step, root counted; 1 is plain decoding.
        head_nodes: nodes of the heads' branch in the last decode step.
        explored_steps: decode steps that tried another tree than the best known one.
        prefix_query_tokens: prompt tokens looked up for reuse.
        prefix_hit_tokens: of these, tokens whose K/V was reused.
        preemptions: sequences put back to waiting for want of K/V blocks.
        running: sequences that hold a slot now.
        waiting: sequences without one.
        kv_blocks_total: blocks in the pool.
        kv_blocks_free: blocks nobody owns.
        kv_blocks_cached: blocks kept only for prefix reuse.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_source: dict[str, int] = field(
        default_factory=lambda: {"head": 0, "lookup": 0, "prediction": 0}
    )
    acceptance_counts: list[int] = field(default_factory=lambda: [0] * (MAX_TREE_NODES + 1))
    tree_size: int = 1
    head_nodes: int = 0
    explored_steps: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per sequence and decode step; 1.0 for plain decoding, 0.0 before any."""
        steps = sum(self.acceptance_counts)
        return sum(n * c for n, c in enumerate(self.acceptance_counts)) / steps if steps else 0.0
