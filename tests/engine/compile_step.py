"""Compile the kernels around a captured step's forward pass for GPUs that need not be there.

    python -m tests.engine.compile_step [CAPABILITY ...]

A line of JSON: for each compute capability (times ten) what each kernel takes of a processor: registers,
bytes spilled a thread, bytes of shared memory. Run without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine import greedy_triton, sampler_triton, step_triton
from engine.cache.pool import KVPool
from engine.greedy_triton import GreedySearch
from engine.medusa import bigram_triton, heads_triton
from engine.medusa.bigram import Bigram, BigramTable, Walk
from engine.medusa.heads_triton import add_silu, best_guesses
from engine.medusa.lookup import Lookup
from engine.medusa.tree import default_tree
from engine.sampler_triton import TreeSampler
from engine.sampling_slots import SamplingSlots
from engine.step_triton import Carried, Draws, Nodes, accept, move, prepare
from tests.engine.triton_compile import compile_only, resources, use

CPU = torch.device("cpu")
SLOTS, BLOCK_SIZE, DEPTH = 4, 16, 6


class Case(NamedTuple):
    """Sizes that a step has: to Triton an integer is 1, or a multiple of 16, or another one.

    Args:
        aligned: tensors of integers begin at multiples of 16 bytes, and not of 8 only.
    """

    batch: int
    nodes: int
    hidden: int = 576
    vocab: int = 49152
    table: int = 40
    heads: int = 4
    guesses: int = 10
    chain: int = 10
    aligned: bool = True


CASES = (
    Case(1, 1, table=1, chain=1),
    Case(1, 2, heads=1, guesses=1, chain=1, vocab=61, aligned=False),
    Case(2, 64),
    Case(16, 16, hidden=588, table=48, chain=16, vocab=50257, aligned=False),
)


def call_all(case: Case, dtype: torch.dtype) -> None:
    """Every kernel in every form that a step asks for."""

    def ids(*shape: int) -> Tensor:
        flat = torch.zeros(math.prod(shape) + 2, dtype=torch.int64)
        start = (0 if case.aligned else 8) + -flat.data_ptr() % 16
        return flat.view(torch.uint8)[start : start + 8 * math.prod(shape)].view(torch.int64).view(shape)

    def some(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    batch, nodes, hidden, vocab = case[:4]
    slots = SamplingSlots(max_num_seqs=SLOTS, vocab_size=vocab, eos_token_ids=[1], device=CPU)
    slots.allocate()
    rows = batch * nodes
    sampler = TreeSampler(slots, max_batch=batch, max_rows=rows, vocab_size=vocab, device=CPU)
    tokens, grid = ids(batch, nodes), ids(5, batch, nodes)
    logits = some(rows, vocab)
    best = GreedySearch(max_rows=rows, vocab_size=vocab, device=CPU).search(logits)
    sampler.draw(ids(batch), logits, tokens, grid, tokens.bool())

    carried = Carried(ids(SLOTS), some(SLOTS, hidden), ids(SLOTS), ids(SLOTS, case.table), SLOTS - 1)
    of = Nodes(
        ids(rows), ids(rows).bool(), ids(rows), ids(rows), ids(batch), ids(batch, case.table), batch, nodes,
        DEPTH,
    )  # fmt: skip
    inputs = ids(batch + 5 * rows)
    lookup = Lookup(size=case.chain, max_num_seqs=SLOTS, max_tokens=600, device=CPU)
    lookup.allocate_predictions()
    prepare(inputs, carried, None, None, BLOCK_SIZE, of)
    prepare(inputs, carried, ids(batch, case.heads * case.guesses), lookup.tokens, BLOCK_SIZE, of)
    if nodes > 1:
        add_silu(some(batch, hidden).expand(case.heads, -1, -1), some(case.heads, batch, hidden))
        for token_map in (None, ids(vocab)):
            best_guesses(some(case.heads, batch, vocab), case.guesses, ids(nodes - 1), token_map)
            tokens = torch.arange(50, dtype=torch.int32)
            pairs = BigramTable(tokens, tokens, torch.zeros(50), torch.zeros(case.heads))
            bigram = Bigram(pairs, None, vocab_size=vocab, device=CPU)
            walk = Walk.of(default_tree(case.heads).prefix(min(nodes, 5)), CPU)
            bigram_triton.follow(some(case.heads, batch, vocab), token_map, bigram, ids(batch), walk)
    states, path = some(rows, hidden), ids(rows)
    for own in (lookup, None):
        packed = ids(batch, 5 + DEPTH + (2 + case.chain if own is not None else 0))
        for draws in (Draws(best), Draws(sampler.drawn, sampler.matched, sampler.log_p)):
            accept(inputs, of, draws, states, carried, slots, own, path=path, packed=packed)
    for kv_heads, head_dim in ((1, 8), (3, 64), (8, 128), (32, 128)):
        pool = KVPool(
            num_layers=2, num_blocks=3, block_size=BLOCK_SIZE, kv_heads=kv_heads, head_dim=head_dim,
            dtype=dtype, device=CPU,
        )  # fmt: skip
        move(pool, of, path, packed)


def main() -> int:
    compiled = compile_only(
        sampler_triton._draw_kernel,
        greedy_triton._greedy_kernel,
        step_triton._prepare_kernel,
        step_triton._accept_kernel,
        step_triton._move_kernel,
        heads_triton._add_silu_kernel,
        heads_triton._best_kernel,
        heads_triton._choose_kernel,
        bigram_triton._merge_kernel,
        bigram_triton._walk_kernel,
    )
    found: dict[str, Any] = {}
    for capability in [int(word) for word in sys.argv[1:]] or [90]:
        use(capability)
        compiled.clear()
        for case in CASES:
            for dtype in (torch.bfloat16, torch.float32):
                call_all(case, dtype)
        found[str(capability)] = {}
        for kernel in compiled:
            taken = resources(kernel)
            forms = found[str(capability)].setdefault(kernel.name, [])
            if taken not in forms:
                forms.append(taken)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
