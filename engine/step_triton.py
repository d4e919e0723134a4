"""What lies around the forward pass of a captured step, in three Triton kernels. CUDA only.

The plain `CapturedRunner` says it in torch's operators: about 30 before the forward pass and 60 to 130 after
it, each a kernel of its own in the graph, which for a small model take longer than the model. Here a program
takes one sequence and does all of it: `prepare` before the pass, `accept` after the draws, `move` for the
accepted K/V. Contexts are read as far as they reach, not as far as they may.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.greedy_triton import LEAST_KEY, token_of
from engine.medusa.lookup import CONTEXT, MOST_MATCHED, Lookup
from engine.sampling_params import MAX_BAD_WORD_TOKENS
from engine.sampling_slots import SamplingSlots

__all__ = ["Carried", "Draws", "Nodes", "accept", "move", "prepare"]

_PLACES = 1024
"""Places of a history, entries of a block table or channels that a program looks at together."""

_PLACE_BITS: tl.constexpr = tl.constexpr(21)
"""Enough for every place in a history of two million tokens."""

_PLACE_MASK: tl.constexpr = tl.constexpr((1 << 21) - 1)


class Carried(NamedTuple):
    """What is carried from step to step, a row for each slot; see `Runner`.

    Args:
        root: [slots] int64.
        hidden: [slots, hidden].
        lengths: [slots] int64.
        tables: [slots, table_length] int64.
        spare: the slot that fills batches up; nothing is carried for it.
    """

    root: Tensor
    hidden: Tensor
    lengths: Tensor
    tables: Tensor
    spare: int


class Nodes(NamedTuple):
    """What a step's halves hand on, in buffers of at least so many entries, and how many there are.

    Args:
        tokens: [B * N] int64.
        valid: [B * N] bool.
        rows: [B * N] int64, flat pool rows.
        positions: [B * N] int64.
        lengths: [B] int64.
        tables: [B, table_length] int64; entries of blocks that the step does not reach mean nothing.
        batch: B.
        nodes: N.
        depth: D, bound on the depths.
    """

    tokens: Tensor
    valid: Tensor
    rows: Tensor
    positions: Tensor
    lengths: Tensor
    tables: Tensor
    batch: int
    nodes: int
    depth: int


@triton.jit(
    do_not_specialize=["nodes", "head_nodes", "chain_stride"],
    do_not_specialize_on_alignment=["inputs_ptr", "guess_ptr"],
)
def _prepare_kernel(
    inputs_ptr, root_ptr, length_ptr, table_ptr, guess_ptr, chain_ptr,
    token_ptr, valid_ptr, row_ptr, position_ptr, own_length_ptr, own_table_ptr,
    nodes, head_nodes, chain_stride, table_length,
    BLOCK_SIZE: tl.constexpr, NODES: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    sequence, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slot = tl.load(inputs_ptr + sequence)
    length = tl.load(length_ptr + slot)
    node = tl.arange(0, NODES)
    inside = node < nodes
    at = sequence * nodes + node
    plane = batch * nodes
    grid_ptr = inputs_ptr + batch
    pick = tl.load(grid_ptr + at, mask=inside, other=0)
    depth = tl.load(grid_ptr + 2 * plane + at, mask=inside, other=0)
    valid = tl.load(grid_ptr + 4 * plane + at, mask=inside, other=0) != 0

    # On offer are the root, the heads' nodes and the lookup's chain.
    token = tl.load(root_ptr + slot)
    guessed = inside & (pick > 0) & (pick <= head_nodes)
    guess = tl.load(guess_ptr + sequence * head_nodes + pick - 1, mask=guessed, other=0)
    chained = inside & (pick > head_nodes)
    chain = tl.load(chain_ptr + slot * chain_stride + pick - 1 - head_nodes, mask=chained, other=0)
    token = tl.where(guessed, guess, tl.where(chained, chain, token))
    tl.store(token_ptr + at, token, mask=inside)
    tl.store(valid_ptr + at, valid, mask=inside)
    tl.store(position_ptr + at, length + depth, mask=inside)

    # A node that is not valid repeats its root, and writes the same to the same row.
    place = length + tl.where(valid, node, 0)
    block = tl.load(table_ptr + slot * table_length + place // BLOCK_SIZE, mask=inside, other=0)
    tl.store(row_ptr + at, block * BLOCK_SIZE + place % BLOCK_SIZE, mask=inside)

    tl.store(own_length_ptr + sequence, length)
    reached = tl.minimum(tl.cdiv(length + nodes, BLOCK_SIZE), table_length).to(tl.int32)
    for start in range(0, reached, PLACES):
        entry = start + tl.arange(0, PLACES)
        listed = tl.load(table_ptr + slot * table_length + entry, mask=entry < reached, other=0)
        tl.store(own_table_ptr + sequence * table_length + entry, listed, mask=entry < reached)


def prepare(
    inputs: Tensor,
    carried: Carried,
    guesses: Tensor | None,
    chain: Tensor | None,
    block_size: int,
    out: Nodes,
) -> None:
    """The trees' tokens, and where they stand: what the forward pass is asked for.

    Args:
        inputs: [B + 5 * B * N] int64: slots, then `Drafter.grid`.
        carried: from the last step.
        guesses: [B, H] int64, the heads' nodes; None where they do not draft.
        chain: [slots, D] int64, the lookup's chains; None without.
        block_size: of the K/V pool.
        out: written to.
    """
    _prepare_kernel[(out.batch,)](
        inputs, carried.root, carried.lengths, carried.tables,
        carried.root if guesses is None else guesses, carried.root if chain is None else chain,
        out.tokens, out.valid, out.rows, out.positions, out.lengths, out.tables,
        out.nodes, 0 if guesses is None else guesses.shape[1],
        0 if chain is None else chain.shape[1], carried.tables.shape[1],
        BLOCK_SIZE=block_size, NODES=MAX_TREE_NODES, PLACES=_PLACES, num_warps=4,
    )  # fmt: skip


@triton.jit
def _match_order(text_ptr, place, end, root, history_ptr, MATCHED: tl.constexpr):
    """How many tokens up to index `root` of the history match backwards from each place before `end`."""
    inside = place < end
    wanted = tl.load(history_ptr + root)
    run = inside & (tl.load(text_ptr + place, mask=inside, other=-2) == wanted)
    order = run.to(tl.int64)
    for back in tl.static_range(1, MATCHED):
        wanted = tl.load(history_ptr + root - back, mask=root >= back, other=-1)
        there = inside & (place >= back)
        run = run & (tl.load(text_ptr + place - back, mask=there, other=-2) == wanted)
        order += run.to(tl.int64)
    return order


@triton.jit(
    do_not_specialize=["nodes", "num_parts", "depth_bound", "spare", "packed_stride", "chain_size"],
    do_not_specialize_on_alignment=["inputs_ptr", "best_ptr", "state_ptr", "packed_ptr"],
)
def _accept_kernel(
    inputs_ptr, token_ptr, valid_ptr, best_ptr, matched_ptr, log_p_ptr, state_ptr,
    root_ptr, hidden_ptr, length_ptr, position_ptr, packed_ptr, path_ptr,
    history_ptr, chain_ptr, prediction_ptr, prediction_length_ptr, num_prompt_ptr,
    penalizes_ptr, in_output_ptr, forbids_ptr, tail_ptr,
    nodes, num_parts, depth_bound, spare, packed_stride, hidden_size, history_size, chain_size, vocab,
    DRAWN: tl.constexpr, LOOKUP: tl.constexpr, NODES: tl.constexpr, PARTS: tl.constexpr,
    CHAIN: tl.constexpr, PLACES: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr,
    MATCHED: tl.constexpr, CONTEXT_TOKENS: tl.constexpr,
):  # fmt: skip
    """A program of the grid (batch) accepts one sequence's nodes and carries its state over."""
    sequence, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slot = tl.load(inputs_ptr + sequence)
    kept = slot != spare
    node = tl.arange(0, NODES)
    inside = node < nodes
    first = sequence * nodes
    plane = batch * nodes
    grid_ptr = inputs_ptr + batch + first
    parent = tl.load(grid_ptr + plane + node, mask=inside, other=0)
    depth = tl.load(grid_ptr + 2 * plane + node, mask=inside, other=0)
    ancestors = tl.load(grid_ptr + 3 * plane + node, mask=inside, other=0)
    token = tl.load(token_ptr + first + node, mask=inside, other=0)
    length = tl.load(length_ptr + slot)
    position = tl.load(position_ptr + slot)
    tl.debug_barrier()  # all threads have read what some will write

    # See `engine.medusa.accept.accept`.
    bit = tl.full([NODES], 1, tl.int64) << node
    if DRAWN:
        bits = tl.load(matched_ptr + sequence)
        matched = inside & ((bits & bit) != 0)
    else:
        valid = tl.load(valid_ptr + first + node, mask=inside, other=0) != 0
        part = tl.arange(0, PARTS)
        key_ptr = best_ptr + (first + parent[:, None]) * num_parts + part[None, :]
        there = inside[:, None] & (part < num_parts)[None, :]
        drawn = token_of(tl.max(tl.load(key_ptr, mask=there, other=LEAST_KEY), 1))
        matched = inside & ((valid & (token == drawn)) | (node == 0))
        bits = tl.sum(tl.where(matched, bit, 0), 0)
    accepted = matched & ((ancestors & ~bits) == 0)
    deepest = tl.max(tl.where(accepted, depth, -1), 0)
    ending = accepted & (depth == deepest)
    if DRAWN:
        other = tl.arange(0, NODES)
        log_p = tl.load(log_p_ptr + first + other, mask=other < nodes, other=0.0)
        visible = ((ancestors[:, None] >> other[None, :]) & 1) != 0
        summed = tl.where(ending, tl.sum(tl.where(visible, log_p[None, :], 0.0), 1), float("-inf"))
        ending = ending & (summed == tl.max(summed, 0))
    last = tl.min(tl.where(ending, node, NODES), 0)
    path_bits = tl.sum(tl.where(node == last, ancestors, 0), 0)
    on_path = inside & ((path_bits & bit) != 0)
    emits = on_path & (depth > 0)
    if DRAWN:
        next_root = tl.load(best_ptr + first + last)
    else:
        key_ptr = best_ptr + (first + last) * num_parts + part
        next_root = token_of(tl.max(tl.load(key_ptr, mask=part < num_parts, other=LEAST_KEY), 0))
    tl.store(path_ptr + first + depth, node, mask=on_path)

    packed_ptr += sequence * packed_stride
    tl.store(packed_ptr + 1, deepest)
    tl.store(packed_ptr + 2, last.to(tl.int64))
    tl.store(packed_ptr + 3, tl.sum(tl.where(accepted, bit, 0), 0))
    tl.store(packed_ptr + 3 + depth, token, mask=emits)
    column = tl.arange(0, NODES)
    tl.store(packed_ptr + 4 + column, next_root, mask=(column >= deepest) & (column <= depth_bound))

    finite = tl.full([], 1, tl.int32)
    for start in range(0, hidden_size, PLACES):
        channel = start + tl.arange(0, PLACES)
        within = channel < hidden_size
        state = tl.load(state_ptr + (first + last) * hidden_size + channel, mask=within, other=0.0)
        sound = tl.abs(state.to(tl.float32)) < float("inf")
        finite = tl.minimum(finite, tl.min(sound.to(tl.int32), 0))
        tl.store(hidden_ptr + slot * hidden_size + channel, state, mask=within & kept)
    tl.store(packed_ptr, finite.to(tl.int64))

    advance = deepest + 1
    tl.store(root_ptr + slot, next_root, mask=kept)
    tl.store(length_ptr + slot, length + advance, mask=kept)
    tl.store(position_ptr + slot, position + advance, mask=kept)

    if DRAWN:  # what adjusts logits follows what was emitted
        if tl.load(penalizes_ptr + slot) != 0:
            tl.atomic_add(in_output_ptr + slot * vocab + token, 1, mask=emits)
            tl.atomic_add(in_output_ptr + slot * vocab + next_root, 1)
        if tl.load(forbids_ptr + slot) != 0:
            back = tl.arange(0, TAIL_BLOCK)
            tl.debug_barrier()  # other threads wrote the emitted tokens
            from_tail = (back < TAIL) & (back + advance < TAIL)
            from_output = (back < TAIL) & (back + advance >= TAIL)
            old = tl.load(tail_ptr + slot * TAIL + back + advance, mask=from_tail, other=0)
            new = tl.load(packed_ptr + 4 + back + advance - TAIL, mask=from_output, other=0)
            tl.debug_barrier()
            tl.store(tail_ptr + slot * TAIL + back, tl.where(from_tail, old, new), mask=back < TAIL)

    if LOOKUP:  # see `engine.medusa.lookup.Lookup.advance`
        text_ptr = history_ptr + slot * history_size
        root = (length + advance).to(tl.int32)
        tl.store(text_ptr + length + depth, token.to(tl.int32), mask=emits & kept)
        tl.store(text_ptr + root, next_root.to(tl.int32), mask=kept)
        tl.debug_barrier()
        best = tl.zeros([PLACES], tl.int64)
        for start in range(0, root, PLACES):
            place = start + tl.arange(0, PLACES)
            order = _match_order(text_ptr, place, root, root, text_ptr, MATCHED)
            best = tl.maximum(best, tl.where(order > 0, (order << _PLACE_BITS) | place, 0))
        found = tl.max(best, 0)
        kind = found >> _PLACE_BITS
        match = found & _PLACE_MASK
        step = tl.arange(0, CHAIN)
        # From the match on, and round again from it where the root is reached.
        proposed = (kind > 0) & (step < chain_size)
        index = match + 1 + step % tl.maximum(root - match, 1)
        chain = tl.load(text_ptr + index, mask=proposed, other=0)
        count = tl.where(kind > 0, chain_size, 0).to(tl.int64)
        if DRAWN:
            predicted = tl.load(prediction_length_ptr + slot).to(tl.int32)
            if predicted > 0:
                expected_ptr = prediction_ptr + slot * history_size
                here = root - tl.load(num_prompt_ptr + slot).to(tl.int32) + CONTEXT_TOKENS
                best = tl.zeros([PLACES], tl.int64)
                for start in range(0, predicted - 1, PLACES):
                    place = start + tl.arange(0, PLACES)
                    order = _match_order(expected_ptr, place, predicted - 1, root, text_ptr, MATCHED)
                    # Of equally long matches the one nearest to where the output stands, the first of two.
                    near = (order << _PLACE_BITS) | (_PLACE_MASK - tl.abs(place - here))
                    near = (near << _PLACE_BITS) | (_PLACE_MASK - place)
                    best = tl.maximum(best, tl.where(order > 0, near, 0))
                found = tl.max(best, 0)
                order = found >> (2 * _PLACE_BITS)
                if (order >= 2) & (order >= tl.minimum(kind, 3)):
                    match = _PLACE_MASK - (found & _PLACE_MASK)
                    index = match + 1 + step
                    proposed = (step < chain_size) & (index < predicted)
                    chain = tl.load(expected_ptr + index, mask=proposed, other=0)
                    count = tl.minimum(predicted - 1 - match, chain_size).to(tl.int64)
                    kind = order + MATCHED
        chain = chain.to(tl.int64)
        tl.store(chain_ptr + slot * chain_size + step, chain, mask=(step < chain_size) & kept)
        tl.store(packed_ptr + 5 + depth_bound, kind)
        tl.store(packed_ptr + 6 + depth_bound, count)
        tl.store(packed_ptr + 7 + depth_bound + step, chain, mask=step < chain_size)


class Draws(NamedTuple):
    """What the model says of each node.

    Args:
        best: [B * N] int64, its own token at each reached node; without `matched` what `GreedySearch` finds
            of all nodes, [B * N, parts] int64.
        matched: [B] int64 bit masks of the nodes that may follow their parents; None: those whose token is
            their parent's best.
        log_p: [B * N] float32, what decides between equally long paths; None where nothing has to.
    """

    best: Tensor
    matched: Tensor | None = None
    log_p: Tensor | None = None


def accept(
    inputs: Tensor,
    nodes: Nodes,
    draws: Draws,
    states: Tensor,
    carried: Carried,
    sampling: SamplingSlots,
    lookup: Lookup | None,
    *,
    path: Tensor,
    packed: Tensor,
) -> None:
    """The accepted path of each sequence, what is carried over, and what the lookup proposes next.

    Args:
        inputs: see `prepare`.
        nodes: what `prepare` wrote.
        draws: with `matched` and `log_p`, its requests may have adjustments and predictions too.
        states: [B * N, hidden], of the nodes.
        carried: written to.
        sampling: follows what is emitted.
        lookup: likewise; None without.
        path: [B * N] int64, written to: row b's node at each depth up to its accepted length.
        packed: [B, K] int64, written to: see `Results`.
    """
    penalties, words = sampling.penalties, sampling.bad_words
    drawn = draws.matched is not None
    unused = carried.root
    tables = [unused] * 5
    if lookup is not None:
        prediction = lookup.history if lookup.prediction is None else lookup.prediction
        tables = [lookup.history, lookup.tokens, prediction, lookup.prediction_length, lookup.num_prompt]
    size = 0 if lookup is None else lookup.size
    parts = 1 if drawn else draws.best.shape[1]
    _accept_kernel[(nodes.batch,)](
        inputs, nodes.tokens, nodes.valid, draws.best,
        unused if draws.matched is None else draws.matched, unused if draws.log_p is None else draws.log_p,
        states, carried.root, carried.hidden, carried.lengths, sampling.position, packed, path, *tables,
        penalties.uses, penalties.in_output if drawn else unused,
        words.uses, words.tail if drawn else unused,
        nodes.nodes, parts, nodes.depth, carried.spare, packed.stride(0), states.shape[1],
        0 if lookup is None else lookup.history.shape[1], size, sampling.vocab_size,
        DRAWN=drawn, LOOKUP=lookup is not None, NODES=MAX_TREE_NODES, PARTS=triton.next_power_of_2(parts),
        CHAIN=MAX_TREE_NODES, PLACES=_PLACES,
        TAIL=MAX_BAD_WORD_TOKENS - 1, TAIL_BLOCK=triton.next_power_of_2(MAX_BAD_WORD_TOKENS - 1),
        MATCHED=MOST_MATCHED, CONTEXT_TOKENS=CONTEXT, num_warps=4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["nodes", "packed_stride"], do_not_specialize_on_alignment=["row_ptr", "packed_ptr"]
)
def _move_kernel(
    pool_ptr, row_ptr, path_ptr, packed_ptr, nodes, packed_stride, plane_size,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program of the grid (batch, 2 * layers) moves K or V of one sequence in one layer."""
    sequence = tl.program_id(0).to(tl.int64)
    first = sequence * nodes
    length = tl.load(packed_ptr + sequence * packed_stride + 1).to(tl.int32)
    plane = pool_ptr + tl.program_id(1).to(tl.int64) * plane_size
    # A path's node stands no earlier than its depth, so going down it nothing is overwritten before it is
    # read; and a channel is one thread's all the way.
    for depth in range(1, length + 1):
        node = tl.load(path_ptr + first + depth)
        if node != depth:
            source = plane + tl.load(row_ptr + first + node) * SIZE
            target = plane + tl.load(row_ptr + first + depth) * SIZE
            for start in range(0, SIZE, BLOCK):
                channel = start + tl.arange(0, BLOCK)
                value = tl.load(source + channel, mask=channel < SIZE, other=0.0)
                tl.store(target + channel, value, mask=channel < SIZE)


def move(pool: KVPool, nodes: Nodes, path: Tensor, packed: Tensor) -> None:
    """Put the K/V of the accepted paths into place, behind the prefixes.

    Args:
        pool: written to.
        nodes: what `prepare` wrote.
        path, packed: what `accept` wrote.
    """
    layers, _, blocks, block_size, kv_heads, head_dim = pool.data.shape
    size = kv_heads * head_dim
    _move_kernel[(nodes.batch, 2 * layers)](
        pool.data, nodes.rows, path, packed, nodes.nodes, packed.stride(0), blocks * block_size * size,
        SIZE=size, BLOCK=min(_PLACES, triton.next_power_of_2(size)), num_warps=4,
    )  # fmt: skip
