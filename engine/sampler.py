"""Drawing tokens: temperature, min-p, top-k, top-p, and seeds that do not depend on batch or tree."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.medusa.tree import Topology

__all__ = ["SamplingRows", "draw", "draw_tree", "uniform"]

_NUCLEUS_CANDIDATES = 256
"""Tokens looked at before a whole row is sorted for top-p; sorting 49k floats costs 26 ms a row on a
CPU, the best 256 of them 0.1 ms, and the nucleus of a language model is nearly always inside."""


_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of R rows, each [R]; the flags are host knowledge that spares work.

    Args:
        temperature: float32; 0 is greedy.
        top_p: float32 in (0, 1].
        top_k: int64; 0 keeps all.
        min_p: float32 in [0, 1].
        seed: int64.
        choice: int64, index of the choice within its request.
        position: int64, output position of the draw, from 0.
        all_greedy: every row has temperature 0.
        truncates: some row has top_p, top_k or min_p set.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seed: Tensor
    choice: Tensor
    position: Tensor
    all_greedy: bool
    truncates: bool

    def select(self, rows: Tensor) -> SamplingRows:
        """Rows [n] (int64) of it."""
        return replace(
            self,
            temperature=self.temperature[rows],
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            choice=self.choice[rows],
            position=self.position[rows],
        )


def uniform(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """One float32 in [0, 1) per row, a pure function of its three int64 arguments.

    A counter-based generator: splitmix64's finaliser (Steele, Lea & Flood 2014) over each argument in
    turn. int64 arithmetic wraps, on the CPU and on CUDA alike.
    """
    state = _mix(seed)
    state = _mix(state ^ (choice * -7046029254386353131))
    state = _mix(state ^ (position * -4658895280553007687))
    return ((state >> 40) & 0xFFFFFF).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = x - 7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def draw(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Draw one token per row.

    The draw inverts the distribution function in vocabulary order, so that a rounding error in the
    logits moves a boundary by as little and does not reorder the tokens.

    Args:
        logits: [R, vocab] float32.
        rows: their parameters.

    Returns:
        [R] int64.
    """
    greedy = logits.argmax(-1)
    if rows.all_greedy:
        return greedy
    # Greedy rows pass through the arithmetic and are replaced at the end. The best logit is moved to 0, so
    # that no temperature can overflow it; below the bound only the best tokens keep any mass.
    temperature = rows.temperature.clamp(min=_LEAST_TEMPERATURE).unsqueeze(1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if rows.truncates:
        scaled = _truncate(scaled, rows)
    cumulative = scaled.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    point = uniform(rows.seed, rows.choice, rows.position).unsqueeze(1) * total
    # Rounding may lift the point to the total itself, past every token.
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    # NaN logits compare as past the end; the runner finds them, but an id must exist until then.
    drawn = torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return torch.where(rows.temperature > 0, drawn, greedy)


def _truncate(logits: Tensor, rows: SamplingRows) -> Tensor:
    """min_p, top_k, top_p in this order: logits [R, vocab], excluded tokens at -inf. Ties at a cut stay."""
    floor = logits.amax(-1, keepdim=True) + rows.min_p.log().unsqueeze(1)
    logits = logits.masked_fill(logits < floor, float("-inf"))

    vocab = logits.shape[-1]
    widest = min(vocab, max(_NUCLEUS_CANDIDATES, int(rows.top_k.max())))
    best = logits.topk(widest, dim=-1).values  # falling
    rank = (torch.where(rows.top_k > 0, rows.top_k, vocab).clamp(max=widest) - 1).unsqueeze(1)
    kth = torch.where(rows.top_k.unsqueeze(1) > 0, best.gather(1, rank), float("-inf"))
    logits = logits.masked_fill(logits < kth, float("-inf"))

    log_total = logits.logsumexp(-1, keepdim=True)
    limit = rows.top_p.unsqueeze(1)
    p = (best.masked_fill(best < kth, float("-inf")) - log_total).exp()
    more_follow = best[:, -1:] >= torch.maximum(kth, floor)
    if bool((more_follow & (limit < 1.0) & (p.sum(-1, keepdim=True) < limit)).any()):
        best = logits.sort(dim=-1, descending=True).values
        p = (best.masked_fill(best < kth, float("-inf")) - log_total).exp()
    before = p.cumsum(-1) - p  # mass of the better ones: a token stays while that is below top_p
    last = ((before < limit) & (p > 0)).sum(-1, keepdim=True) - 1
    cut = torch.where(limit < 1.0, best.gather(1, last.clamp(min=0)), float("-inf"))
    return logits.masked_fill(logits < cut, float("-inf"))


def draw_tree(logits: Tensor, tokens: Tensor, topology: Topology, rows: SamplingRows) -> Tensor:
    """The target of each node: one draw per node from the model's distribution there.

    The draw at a node of depth d is that of output position `rows.position + d`, the same at every
    node of that depth. Nodes that no draw can reach are not drawn (their target is -1): a draw reads
    the whole vocabulary, and all but a few nodes of a tree are off the accepted path.

    Args:
        logits: [B, N, vocab] float32.
        tokens: [B, N] int64, node tokens.
        topology: the trees.
        rows: parameters of the B sequences; `position` is the root's.

    Returns:
        [B, N] int64.
    """
    if rows.all_greedy:
        return logits.argmax(-1)
    batch, size = tokens.shape
    targets = torch.full_like(tokens, -1)
    flat_logits, flat_targets = logits.view(batch * size, -1), targets.view(-1)
    reached = torch.zeros_like(tokens, dtype=torch.bool)
    reached[:, 0] = True
    for depth in range(topology.max_depth + 1):
        frontier = (reached & (topology.depths == depth)).view(-1).nonzero().squeeze(1)
        if not len(frontier):
            break
        node_rows = rows.select(frontier // size)
        node_rows = replace(node_rows, position=node_rows.position + depth)
        flat_targets[frontier] = draw(flat_logits[frontier], node_rows)
        matches = tokens == targets.gather(1, topology.parents)
        reached |= topology.valid & matches & reached.gather(1, topology.parents)
    return targets
