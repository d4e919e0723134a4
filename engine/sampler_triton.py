"""Drawing along a tree as one Triton kernel: what `engine.sampler.verify` does, without the host. CUDA only.

A program takes one sequence. It goes through the nodes in order, parents first, and draws at those that
acceptance has reached: of a tree's nodes that is the accepted path and little more, so a row of the
vocabulary is read a few times for each emitted token and never for the others. What a request did not ask
for is skipped.

Nothing is sorted. Logits after temperature, the best at 0, are at most 0, and the bits of such a float
without its sign order as an integer: the best has the least key. top-k and top-p are each the least key
whose better ones weigh enough, which a few passes over the row find. They are spared the whole row where
few tokens come into question, which are put together first.

With TRITON_INTERPRET=1 in the environment before Triton is imported it runs on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.adjust import ANY_TOKEN, NO_TOKEN
from engine.config import MAX_TREE_NODES
from engine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from engine.sampling_slots import SamplingSlots

__all__ = ["TreeSampler"]

_BLOCK = 4096
"""Logits looked at together."""

_CANDIDATES = 2048
"""Tokens that are put together before they are searched for a cut."""

_STAGES: tl.constexpr = tl.constexpr(3)
"""Blocks on their way from memory while one is looked at: a program has nothing else to do meanwhile."""

_WIDTH: tl.constexpr = tl.constexpr(16)
"""Candidates come in multiples of so many, so that they are loaded as wide as a whole row."""

_INFINITE: tl.constexpr = tl.constexpr(0x7F800000)
"""The key of -inf: the largest there is."""

_ANY_TOKEN: tl.constexpr = tl.constexpr(ANY_TOKEN)
_NO_TOKEN: tl.constexpr = tl.constexpr(NO_TOKEN)
_FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _mix(x):
    x = x - 7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _key_of(seed, choice, position):
    """The key of a draw's numbers, see `engine.sampler.exponential`; of int64 scalars."""
    key = _mix(seed)
    key = _mix(key ^ (choice * -7046029254386353131))
    return _mix(key ^ (position * -4658895280553007687))


@triton.jit
def _exponential(token, low, high):
    """The numbers of tokens (int32) for a key's halves, of which the upper one is odd."""
    x = (token * high) ^ low
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    x = x ^ ((x >> 16) & 0xFFFF)
    u = (x & 0x7FFFFFFF).to(tl.float32) + tl.where(x < 0, 2147483648.0, 0.0)
    u = tl.minimum((u + 0.5) * 2.3283064365386963e-10, 0.99999994)
    small = (((u * 0.25 + 0.3333333333333333) * u + 0.5) * u + 1.0) * u
    return tl.where(u < 0.015625, small, -tl.log(1.0 - u))


@triton.jit
def _adjusted(
    value, column, inside, more, slot, vocab, early,
    penalizes, presence, frequency, repetition, biases,
    in_output_ptr, in_prompt_ptr, bias_ptr, ends_ptr,
):  # fmt: skip
    """Logits `value` of tokens `column` as `engine.adjust` changes them, but for bad words.

    Args:
        more: how often each was drafted on the way to the node.
        early: the output may not end yet.
    """
    at = slot * vocab + column
    if penalizes:
        count = tl.load(in_output_ptr + at, mask=inside, other=0) + more
        seen = tl.load(in_prompt_ptr + at, mask=inside, other=0) != 0
        seen = seen | (count > 0)
        penalized = tl.where(value > 0, value / repetition, value * repetition)
        penalized = tl.minimum(tl.maximum(penalized, -_FLOAT_MAX), _FLOAT_MAX)
        value = tl.where(seen, penalized, value)
        value -= frequency * count.to(tl.float32)
        value -= tl.where(count > 0, presence, 0.0)
    if biases:
        value += tl.load(bias_ptr + at, mask=inside, other=0.0)
    if early:
        ends = tl.load(ends_ptr + at, mask=inside, other=0) != 0
        value = tl.where(ends, float("-inf"), value)
    return value


@triton.jit
def _key(value, best, temperature):
    """The key of logits `value`, and what e is raised to for their weights."""
    scaled = (value - best) / temperature
    return scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF, scaled


@triton.jit
def _best(row_ptr, size, copy_ptr, copies, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of `size` values and its first place; with COPIES they are copied unless `copies` is 0."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = lane
    for start in tl.range(0, size, BLOCK, num_stages=_STAGES):
        column = start + lane
        value = tl.load(row_ptr + column, mask=column < size, other=float("-inf")).to(tl.float32)
        if COPIES:
            tl.store(copy_ptr + column, value, mask=(column < size) & (copies != 0))
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, column, where)
    largest = tl.max(best, 0)
    first = tl.min(tl.where(best == largest, where, size - 1), 0)
    return largest, tl.minimum(first, size - 1)


@triton.jit
def _least_key(row_ptr, size, best, temperature, high, target, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """The least key whose tokens, together with all better ones, weigh at least `target`.

    Args:
        high: the answer where there is none, and its bound.
        target: float32, of weights relative to the best one's with WEIGH, else of tokens.
    """
    way = tl.arange(0, 4)[:, None]
    low = tl.full([], 0, tl.int32)
    while low < high:
        step = (high - low) // 4 + 1
        bound = tl.minimum(low + step * (way + 1) - 1, high)
        weights = tl.zeros([4, BLOCK], tl.float32)
        for start in tl.range(0, size, BLOCK, num_stages=_STAGES):
            column = start + tl.arange(0, BLOCK)[None, :]
            value = tl.load(row_ptr + column, mask=column < size, other=float("-inf"))
            key, scaled = _key(value, best, temperature)
            weight = tl.exp(scaled) if WEIGH else tl.where(column < size, 1.0, 0.0)
            weights += tl.where(key <= bound, weight, 0.0)
        enough = tl.sum(weights, 1)[:, None] >= target
        # The first bound that is enough is at or above the answer, the one before it below.
        found = tl.min(tl.where(enough, way, 3))
        high = tl.minimum(low + step * (found + 1) - 1, high)
        low = tl.minimum(low + step * found, high)
    return high


@triton.jit
def _collect(
    row_ptr, size, best, temperature, floor, top_k, top_p, kept_ptr, token_ptr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Put the tokens together that a cut has to be looked for among, where they are few.

    Returns:
        How many they are, rounded up, or 0 where they are not few; and the weight of all up to key `floor`.
    """
    way = tl.arange(0, 4)[:, None]
    # Logits 3, 7 and 12 below the best, and all of them.
    bound = tl.where(way == 0, 0x40400000, tl.where(way == 1, 0x40E00000, 0x41400000))
    bound = tl.where(way == 3, floor, tl.minimum(bound, floor))
    counts = tl.zeros([4, BLOCK], tl.int32)
    weights = tl.zeros([4, BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=_STAGES):
        column = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(row_ptr + column, mask=column < size, other=float("-inf"))
        key, scaled = _key(value, best, temperature)
        below = (key <= bound) & (column < size)
        counts += below.to(tl.int32)
        weights += tl.where(below, tl.exp(scaled), 0.0)
    count = tl.sum(counts, 1)[:, None]
    weight = tl.sum(weights, 1)[:, None]
    all_counts = tl.sum(tl.where(way == 3, count, 0))
    all_weights = tl.sum(tl.where(way == 3, weight, 0.0))
    enough = count == all_counts
    if top_k > 0:
        enough = enough | (count >= top_k)
    elif top_p < 1.0:
        enough = enough | (weight >= top_p * all_weights)
    chosen = tl.min(tl.where(enough & (count <= CANDIDATES), way, 4))
    number = tl.full([], 0, tl.int32)
    if chosen < 4:
        limit = tl.sum(tl.where(way == chosen, bound, 0))
        for start in tl.range(0, size, BLOCK, num_stages=_STAGES):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(row_ptr + column, mask=column < size, other=float("-inf"))
            key, scaled = _key(value, best, temperature)
            keep = ((key <= limit) & (column < size)).to(tl.int32)
            place = number + tl.cumsum(keep, 0) - 1
            tl.store(kept_ptr + place, value, mask=keep != 0)
            tl.store(token_ptr + place, column, mask=keep != 0)
            number += tl.sum(keep, 0)
        # Up to a multiple of 16, for loads of that width: tokens that are never drawn.
        rest = tl.arange(0, _WIDTH)
        tl.store(kept_ptr + number + rest, tl.full([_WIDTH], float("-inf"), tl.float32))
        number = tl.cdiv(number, _WIDTH) * _WIDTH
        tl.debug_barrier()  # other threads read what these have written
    return number, all_weights


@triton.jit
def _weights(row_ptr, column, size, best, temperature, cut):
    """Weights of tokens `column` up to key `cut`, the best one's 1; and what e is raised to for them."""
    value = tl.load(row_ptr + column, mask=column < size, other=float("-inf"))
    key, scaled = _key(value, best, temperature)
    return tl.where((key <= cut) & (column < size), tl.exp(scaled), 0.0), scaled


@triton.jit
def _sums(row_ptr, size, best, temperature, cut, BLOCK: tl.constexpr):
    """The sum of the weights of the tokens up to key `cut`, and of weights times what e is raised to."""
    total = tl.full([], 0.0, tl.float32)
    moment = tl.full([], 0.0, tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=_STAGES):
        weight, scaled = _weights(row_ptr, start + tl.arange(0, BLOCK), size, best, temperature, cut)
        total += tl.sum(weight, 0)
        moment += tl.sum(weight * tl.where(weight > 0.0, scaled, 0.0), 0)
    return total, moment


@triton.jit
def _pick(
    row_ptr, token_ptr, collected, size, best, temperature, cut, key, BLOCK: tl.constexpr
):  # fmt: skip
    """The place of the token that wins the race of those up to key `cut`.

    Args:
        token_ptr: the tokens of the places, unless `collected` is 0 and they are the places.
        key: of the draw's numbers.
    """
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32) | 1
    lane = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -1.0, tl.float32)
    where = lane
    for start in tl.range(0, size, BLOCK, num_stages=_STAGES):
        column = start + lane
        weight, _ = _weights(row_ptr, column, size, best, temperature, cut)
        token = tl.load(token_ptr + column, mask=(column < size) & (collected != 0), other=0)
        token = tl.where(collected != 0, token.to(tl.int32), column)
        value = weight / _exponential(token, low, high)
        better = value > most
        most = tl.where(better, value, most)
        where = tl.where(better, column, where)
    largest = tl.max(most, 0)
    return tl.minimum(tl.min(tl.where(most == largest, where, size - 1), 0), size - 1)


@triton.jit
def _forbid(
    row_ptr, words_ptr, tail_ptr, slot, token, depth, on_path, node_depth,
    WORDS: tl.constexpr, WORD_TOKENS: tl.constexpr,
):  # fmt: skip
    """Write -inf where a bad word would end whose other tokens stand before the draw."""
    word = words_ptr + slot * WORDS * WORD_TOKENS + tl.arange(0, WORDS) * WORD_TOKENS
    last = tl.load(word + WORD_TOKENS - 1)
    begun = last != _NO_TOKEN
    for back in tl.static_range(1, WORD_TOKENS):
        drafted = tl.sum(tl.where(on_path & (depth == node_depth - back + 1), token, 0), 0)
        emitted_at = slot * (WORD_TOKENS - 1) + WORD_TOKENS - 1 - back + node_depth
        emitted = tl.load(tail_ptr + emitted_at, mask=node_depth < back, other=0)
        before = tl.where(node_depth < back, emitted, drafted)
        wanted = tl.load(word + WORD_TOKENS - 1 - back)
        begun = begun & ((wanted == before) | (wanted == _ANY_TOKEN))
    tl.store(row_ptr + last, tl.full([WORDS], float("-inf"), tl.float32), mask=begun)


@triton.jit(do_not_specialize=["nodes"], do_not_specialize_on_alignment=["grid_ptr"])
def _draw_kernel(
    slots_ptr, logits_ptr, tokens_ptr, grid_ptr, valid_ptr,
    temperature_ptr, top_p_ptr, top_k_ptr, min_p_ptr, seed_ptr, choice_ptr, position_ptr,
    typical_ptr, epsilon_ptr, delta_ptr,
    penalizes_ptr, presence_ptr, frequency_ptr, repetition_ptr, in_output_ptr, in_prompt_ptr,
    biases_ptr, bias_ptr, waits_ptr, min_tokens_ptr, ends_ptr, forbids_ptr, words_ptr, tail_ptr,
    adjusted_ptr, kept_ptr, kept_token_ptr, drawn_ptr, matched_ptr, log_p_ptr,
    nodes, vocab,
    NODES: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr, WORD_TOKENS: tl.constexpr,
):  # fmt: skip
    """A program of the grid (batch) draws along the tree of one sequence; see `TreeSampler.draw`."""
    sequence, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    slot = tl.load(slots_ptr + sequence)
    lane = tl.arange(0, NODES)
    inside = lane < nodes
    at = sequence * nodes + lane
    plane = batch * nodes
    token = tl.load(tokens_ptr + at, mask=inside, other=-1)
    parent = tl.load(grid_ptr + plane + at, mask=inside, other=-1).to(tl.int32)
    depth = tl.load(grid_ptr + 2 * plane + at, mask=inside, other=0).to(tl.int32)
    ancestors = tl.load(grid_ptr + 3 * plane + at, mask=inside, other=0)
    valid = tl.load(valid_ptr + at, mask=inside, other=0) != 0

    temperature = tl.load(temperature_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    first_position = tl.load(position_ptr + slot)
    typical = (tl.load(typical_ptr + slot) != 0) & (temperature > 0.0)
    penalizes = tl.load(penalizes_ptr + slot) != 0
    biases = tl.load(biases_ptr + slot) != 0
    waits = tl.load(waits_ptr + slot) != 0
    forbids = tl.load(forbids_ptr + slot) != 0
    presence = tl.load(presence_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    repetition = tl.load(repetition_ptr + slot)
    ROOM: tl.constexpr = CANDIDATES + _WIDTH
    NARROW: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32
    own_ptr = adjusted_ptr + sequence * vocab
    # As torch's: below it only the best tokens keep any mass.
    heat = tl.maximum(temperature, 1e-5)

    reached = tl.full([], 1, tl.int64)
    drawn = tl.full([NODES], -1, tl.int64)
    log_p = tl.zeros([NODES], tl.float32)
    for node in range(nodes):
        if ((reached >> node) & 1) != 0:
            here = lane == node
            node_depth = tl.sum(tl.where(here, depth, 0), 0)
            position = first_position + node_depth
            raw_ptr = logits_ptr + (sequence * nodes + node) * vocab
            row_ptr = own_ptr if NARROW else raw_ptr
            early = waits & (position < tl.load(min_tokens_ptr + slot))
            if penalizes | biases | early | forbids:
                row_ptr = own_ptr
                tl.debug_barrier()  # nobody reads the last node's any more
                for start in tl.range(0, vocab, BLOCK, num_stages=_STAGES):
                    column = start + tl.arange(0, BLOCK)
                    within = column < vocab
                    value = tl.load(raw_ptr + column, mask=within, other=0.0).to(tl.float32)
                    value = _adjusted(
                        value, column, within, 0, slot, vocab, early, penalizes, presence, frequency,
                        repetition, biases, in_output_ptr, in_prompt_ptr, bias_ptr, ends_ptr,
                    )  # fmt: skip
                    tl.store(row_ptr + column, value, mask=within)
                tl.debug_barrier()
                path = tl.sum(tl.where(here, ancestors, 0), 0)
                on_path = (((path >> lane) & 1) != 0) & (depth > 0)
                if penalizes:
                    same = (token[:, None] == token[None, :]) & on_path[None, :]
                    more = tl.sum(same.to(tl.int32), 1)
                    value = tl.load(raw_ptr + token, mask=on_path, other=0.0).to(tl.float32)
                    value = _adjusted(
                        value, token, on_path, more, slot, vocab, early, penalizes, presence, frequency,
                        repetition, biases, in_output_ptr, in_prompt_ptr, bias_ptr, ends_ptr,
                    )  # fmt: skip
                    tl.store(row_ptr + token, value, mask=on_path)
                    tl.debug_barrier()
                if forbids:
                    _forbid(
                        row_ptr, words_ptr, tail_ptr, slot, token, depth, on_path, node_depth,
                        WORDS, WORD_TOKENS,
                    )  # fmt: skip
                    tl.debug_barrier()

                best, greedy = _best(row_ptr, vocab, own_ptr, 0, False, BLOCK)
            else:
                if NARROW:
                    tl.debug_barrier()  # nobody reads the last node's any more
                # A draw goes over them several times; a greedy one never again.
                best, greedy = _best(raw_ptr, vocab, own_ptr, (temperature > 0.0).to(tl.int32), NARROW, BLOCK)
                if NARROW:
                    tl.debug_barrier()
            target = greedy.to(tl.int64)
            children = (parent == node) & (lane > 0) & valid
            follows = children & (token == target)
            if temperature > 0.0:
                floor = tl.full([], _INFINITE, tl.int32)
                if min_p > 0.0:
                    floor = (-tl.log(min_p)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                cut = floor
                source_ptr = row_ptr
                size = tl.cast(vocab, tl.int32)
                number = tl.full([], 0, tl.int32)
                if (min_p > 0.0) | (top_k > 0) | (top_p < 1.0):
                    tl.debug_barrier()  # nobody reads the last node's candidates any more
                    number, weight = _collect(
                        row_ptr, vocab, best, heat, floor, top_k, top_p,
                        kept_ptr + sequence * ROOM, kept_token_ptr + sequence * ROOM,
                        BLOCK // 2, CANDIDATES,
                    )  # fmt: skip
                    if number > 0:
                        source_ptr = kept_ptr + sequence * ROOM
                        size = number
                    if WIDE:  # which is forgotten where two branches meet
                        source_ptr = tl.multiple_of(source_ptr, _WIDTH)
                        size = tl.multiple_of(size, _WIDTH)
                    if top_k > 0:
                        wanted = top_k.to(tl.float32)
                        cut = _least_key(source_ptr, size, best, heat, cut, wanted, False, BLOCK // 2)
                    if top_p < 1.0:
                        if top_k > 0:
                            weight, _ = _sums(source_ptr, size, best, heat, cut, BLOCK)
                        cut = _least_key(source_ptr, size, best, heat, cut, top_p * weight, True, BLOCK // 2)
                key = _key_of(tl.load(seed_ptr + slot), tl.load(choice_ptr + slot), position)
                tokens_at = kept_token_ptr + sequence * ROOM
                place = _pick(source_ptr, tokens_at, number, size, best, heat, cut, key, BLOCK)
                target = place.to(tl.int64)
                if number > 0:
                    target = tl.load(tokens_at + place).to(tl.int64)
                follows = children & (token == target)
                if typical:
                    total, moment = _sums(source_ptr, size, best, heat, cut, BLOCK)
                    entropy = tl.log(total) - moment / total
                    bound = tl.load(delta_ptr + slot) * tl.exp(-entropy)
                    bound = tl.minimum(tl.load(epsilon_ptr + slot), bound)
                    value = tl.load(row_ptr + token, mask=children, other=float("-inf"))
                    order, scaled = _key(value, best, heat)
                    p = tl.where(order <= cut, tl.exp(scaled) / total, 0.0)
                    follows = children & (p > bound)
                    log_p = tl.where(follows, tl.log(tl.where(follows, p, 1.0)), log_p)
            drawn = tl.where(here, target, drawn)
            reached = reached | tl.sum(tl.where(follows, tl.full([], 1, tl.int64) << lane, 0), 0)
    tl.store(drawn_ptr + at, drawn, mask=inside)
    tl.store(log_p_ptr + at, log_p, mask=inside)
    tl.store(matched_ptr + sequence, reached)


class TreeSampler:
    """Draws along the trees of a captured step, with whatever its requests ask for.

    Args:
        slots: the sampling state, its tables allocated.
        max_batch: most sequences of a step.
        max_rows: most nodes of a step.
        vocab_size: of the logits.
        device: where everything is.
    """

    def __init__(
        self, slots: SamplingSlots, *, max_batch: int, max_rows: int, vocab_size: int, device: torch.device
    ) -> None:
        self._slots, self._vocab_size = slots, vocab_size

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._adjusted = buffer(torch.float32, max_batch, vocab_size)
        self._kept = buffer(torch.float32, max_batch, _CANDIDATES + _WIDTH.value)
        self._kept_tokens = buffer(torch.int32, max_batch, _CANDIDATES + _WIDTH.value)
        self.drawn = buffer(torch.int64, max_rows)
        """[B * N]: the model's own draw at each reached node, -1 at the others."""
        self.matched = buffer(torch.int64, max_batch)
        """[B] bit masks of the reached nodes, the root bit 0."""
        self.log_p = buffer(torch.float32, max_rows)
        """[B * N]: log p(node | parent) of the reached nodes of typical sequences, else 0."""

    def draw(self, slots: Tensor, logits: Tensor, tokens: Tensor, grid: Tensor, valid: Tensor) -> None:
        """Draw; see `engine.sampler.verify` for what, and the attributes for the results.

        Args:
            slots: [B] int64.
            logits: [B * N, vocab] of any floating type, raw, contiguous, of all nodes in order; left as
                they are.
            tokens: [B, N] int64, contiguous: node tokens.
            grid: [5, B, N] int64, contiguous: see `Drafter.grid`.
            valid: [B, N] bool, contiguous.
        """
        batch, nodes = tokens.shape
        state = self._slots
        penalties, bias = state.penalties, state.logit_bias
        ends, words = state.min_tokens, state.bad_words
        _draw_kernel[(batch,)](
            slots, logits, tokens, grid, valid,
            state.temperature, state.top_p, state.top_k, state.min_p, state.seed, state.choice,
            state.position, state.typical, state.epsilon, state.delta,
            penalties.uses, penalties.presence, penalties.frequency, penalties.repetition,
            penalties.in_output, penalties.in_prompt, bias.uses, bias.bias,
            ends.uses, ends.min_tokens, ends.ends, words.uses, words.words, words.tail,
            self._adjusted, self._kept, self._kept_tokens, self.drawn, self.matched, self.log_p,
            nodes, self._vocab_size,
            NODES=MAX_TREE_NODES,
            BLOCK=_BLOCK,
            CANDIDATES=_CANDIDATES,
            WIDE=self._vocab_size % _WIDTH.value == 0,
            WORDS=MAX_BAD_WORDS,
            WORD_TOKENS=MAX_BAD_WORD_TOKENS,
            num_warps=16,
        )  # fmt: skip
