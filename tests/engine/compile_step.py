"""Compile the kernels around a captured step's forward pass for GPUs that need not be there.

    python -m tests.engine.compile_step [CAPABILITY ...]

A line of JSON: for each compute capability (times ten) what each kernel takes of a processor: registers,
bytes spilled a thread, bytes of shared memory. Run without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from engine import sampler_triton, step_triton
from engine.cache.pool import KVPool
from engine.medusa import heads_triton
from engine.medusa.heads_triton import add_silu, best_guesses
from engine.medusa.lookup import Lookup
from engine.sampler_triton import TreeSampler
from engine.sampling_slots import SamplingSlots
from engine.step_triton import Carried, Draws, Nodes, accept, move, prepare
from tests.engine.triton_compile import compile_only, resources, use

CPU = torch.device("cpu")
BATCH, SLOTS, VOCAB, HIDDEN, BLOCK_SIZE, TABLE, DEPTH = 2, 4, 49152, 576, 16, 40, 6


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def call_all(nodes: int, dtype: torch.dtype) -> None:
    """Every kernel in every form that a step asks for."""
    slots = SamplingSlots(max_num_seqs=SLOTS, vocab_size=VOCAB, eos_token_ids=[1], device=CPU)
    slots.allocate()
    rows = BATCH * nodes
    sampler = TreeSampler(slots, max_batch=BATCH, max_rows=rows, vocab_size=VOCAB, device=CPU)
    tokens, grid = ids(BATCH, nodes), ids(5, BATCH, nodes)
    sampler.draw(ids(BATCH), torch.zeros(rows, VOCAB), tokens, grid, tokens.bool())

    hidden = torch.zeros(SLOTS, HIDDEN, dtype=dtype)
    carried = Carried(ids(SLOTS), hidden, ids(SLOTS), ids(SLOTS, TABLE), SLOTS - 1)
    of = Nodes(
        ids(rows), ids(rows).bool(), ids(rows), ids(rows), ids(BATCH), ids(BATCH, TABLE), BATCH, nodes, DEPTH
    )
    inputs = ids(BATCH + 5 * rows)
    lookup = Lookup(size=10, max_num_seqs=SLOTS, max_tokens=600, device=CPU)
    lookup.allocate_predictions()
    prepare(inputs, carried, None, None, BLOCK_SIZE, of)
    prepare(inputs, carried, ids(BATCH, 9), lookup.tokens, BLOCK_SIZE, of)
    if nodes > 1:
        add_silu(
            torch.zeros(BATCH, HIDDEN, dtype=dtype).expand(4, -1, -1),
            torch.zeros(4, BATCH, HIDDEN, dtype=dtype),
        )
        for token_map in (None, ids(VOCAB)):
            best_guesses(torch.zeros(4, BATCH, VOCAB, dtype=dtype), 10, ids(nodes - 1), token_map)
    states, path = torch.zeros(rows, HIDDEN, dtype=dtype), ids(rows)
    for own in (lookup, None):
        packed = ids(BATCH, 5 + DEPTH + (12 if own is not None else 0))
        for draws in (Draws(ids(rows)), Draws(sampler.drawn, sampler.matched, sampler.log_p)):
            accept(inputs, of, draws, states, carried, slots, own, path=path, packed=packed)
    for kv_heads, head_dim in ((3, 64), (8, 128), (32, 128)):
        pool = KVPool(
            num_layers=2, num_blocks=3, block_size=BLOCK_SIZE, kv_heads=kv_heads, head_dim=head_dim,
            dtype=dtype, device=CPU,
        )  # fmt: skip
        move(pool, of, path, packed)


def main() -> int:
    compiled = compile_only(
        sampler_triton._draw_kernel,
        step_triton._prepare_kernel,
        step_triton._accept_kernel,
        step_triton._move_kernel,
        heads_triton._add_silu_kernel,
        heads_triton._best_kernel,
        heads_triton._choose_kernel,
    )
    found: dict[str, Any] = {}
    for capability in [int(word) for word in sys.argv[1:]] or [90]:
        use(capability)
        compiled.clear()
        for nodes in (1, 64):
            for dtype in (torch.bfloat16, torch.float32):
                call_all(nodes, dtype)
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
