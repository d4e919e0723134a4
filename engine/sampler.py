"""Drawing tokens: temperature, min-p, top-k, top-p, and seeds that do not depend on batch or tree.

A draw is a function of the seed, the choice, the output position and the adjusted distribution. A tree
node's is that of its path's, so what is drawn does not depend on what was drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.adjust import Adjustment, Place
from engine.medusa.accept import Targets
from engine.medusa.tree import Topology

__all__ = [
    "Adjusting",
    "SamplingRows",
    "Targets",
    "TypicalRows",
    "best_tokens",
    "draw",
    "exponential",
    "verify",
    "verify_all",
    "verify_greedy",
]

_NUCLEUS_CANDIDATES = 256
"""Tokens looked at before a whole row is sorted for top-p; sorting 49k floats costs 26 ms a row on a
CPU, the best 256 of them 0.1 ms, and the nucleus of a language model is nearly always inside."""

_ROWS = 128
"""Nodes drawn at a time where all are: a draw takes a dozen copies of its rows."""

_LEAST_TEMPERATURE = 1e-5

_SMALL = 2.0**-6

_BLOCK, _SMALLEST_BLOCK, _MANY_ROWS = 1024, 64, 8
"""Logits of a block in which `best_tokens` looks for the best, and the rows from which on it does."""


@dataclass(frozen=True, slots=True)
class TypicalRows:
    """Which of R rows accept typically, and their thresholds (see `MedusaParams`).

    Args:
        asked: [R] bool; a greedy row is exact all the same.
        epsilon: [R] float32.
        delta: [R] float32.
    """

    asked: Tensor
    epsilon: Tensor
    delta: Tensor

    def select(self, rows: Tensor) -> TypicalRows:
        return TypicalRows(self.asked[rows], self.epsilon[rows], self.delta[rows])


@dataclass(frozen=True, slots=True)
class Adjusting:
    """What adjusts the logits of R rows: their slots [R] int64, and what some of them use, in order."""

    slots: Tensor
    adjustments: tuple[Adjustment, ...]

    def select(self, rows: Tensor) -> Adjusting:
        return Adjusting(self.slots[rows], self.adjustments)


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
        typical: None where no row accepts typically.
        adjusting: None where no row's logits are adjusted.
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
    typical: TypicalRows | None = None
    adjusting: Adjusting | None = None

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
            typical=self.typical.select(rows) if self.typical else None,
            adjusting=self.adjusting.select(rows) if self.adjusting else None,
        )

    def adjust_(self, logits: Tensor, path: Tensor) -> None:
        """Adjust logits [R, vocab] in place; path [R, d] int64 is drafted and stands before the draw."""
        if self.adjusting is not None:
            for adjustment in self.adjusting.adjustments:
                adjustment.apply_(logits, Place(self.adjusting.slots, self.position, path))

    def adjust_all_(self, logits: Tensor, path: Tensor, drafted: Tensor) -> None:
        """The same where only the first `drafted` [R] of each path stand before the draw, and nothing is
        read by the host."""
        if self.adjusting is not None:
            place = Place(self.adjusting.slots, self.position, path, drafted)
            for adjustment in self.adjusting.adjustments:
                adjustment.apply_all_(logits, place)


def exponential(seed: Tensor, choice: Tensor, position: Tensor, vocab: int) -> Tensor:
    """[R, vocab] float32 above 0, of mean 1: of each token, a pure function of it and the three int64 [R].

    Counter-based: splitmix64's finaliser (Steele, Lea & Flood 2014) over each argument in turn makes a key,
    whose halves scramble the token before a 32-bit mixer (C. Wellons, hash-prospector, "lowbias32") does.
    Integers wrap, on the CPU and on CUDA alike.
    """
    key = _key(seed, choice, position)
    low, high = key.to(torch.int32).unsqueeze(1), ((key >> 32).to(torch.int32) | 1).unsqueeze(1)
    x = torch.arange(vocab, dtype=torch.int32, device=seed.device) * high
    x.bitwise_xor_(low)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(-0x7B935975)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    # All 32 bits, as if there were no sign: what little a token's chance may be, it is not none.
    u = (
        (x & 0x7FFFFFFF)
        .float()
        .add_(x < 0, alpha=2.0**31)
        .add_(0.5)
        .mul_(2.0**-32)
        .clamp_(max=1.0 - 2.0**-24)
    )
    # -log(1 - u); where u is small, by its first terms, which lose nothing.
    small = u * (1 / 4)
    small.add_(1 / 3).mul_(u).add_(1 / 2).mul_(u).add_(1.0).mul_(u)
    return torch.where(u < _SMALL, small, u.neg_().add_(1.0).log_().neg_())


def _key(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    key = _mix(seed)
    key = _mix(key ^ (choice * -7046029254386353131))
    return _mix(key ^ (position * -4658895280553007687))


def _mix(x: Tensor) -> Tensor:
    x = x - 7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def draw(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Draw one token per row.

    Each token has a random number of its own, and drawn is the one whose probability over it is greatest (the
    exponential race, or Gumbel's maximum). Rounding errors of logits then change a draw only where the first
    two of the race are as close together. One number put through the inverse distribution function meets one
    of a vocabulary's many borders far more often: at temperature 1 every 300th token or so was another with a
    tree than without.

    Args:
        logits: [R, vocab] float32, raw; left as they are.
        rows: their parameters.

    Returns:
        [R] int64.
    """
    if rows.adjusting is not None:
        logits = logits.clone()
        rows.adjust_(logits, rows.position.new_empty(len(logits), 0))
    greedy = best_tokens(logits)
    return greedy if rows.all_greedy else _pick(_probabilities(logits, rows), greedy, rows)


def best_tokens(logits: Tensor) -> Tensor:
    """[R] int64: argmax of [R, vocab], the first of equals.

    torch looks for the place of the largest element one by one, and for the largest itself with vectors:
    on a CPU the largest of each block, and then the place in the best block only, takes half as long at 64
    rows and longer at one.
    """
    block = min(logits.shape[-1] & -logits.shape[-1], _BLOCK)
    if logits.device.type != "cpu" or len(logits) < _MANY_ROWS or block < _SMALLEST_BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(len(logits), -1, block)
    where = blocks.amax(-1).argmax(-1)
    return where * block + blocks[torch.arange(len(logits)), where].argmax(-1)


def _probabilities(logits: Tensor, rows: SamplingRows) -> Tensor:
    """[R, vocab] float32: what adjusted logits leave after temperature and truncation."""
    scaled = _scaled(logits, rows)
    if rows.truncates:
        scaled = _truncate(scaled, rows)
    return scaled.softmax(-1)


def _scaled(logits: Tensor, rows: SamplingRows) -> Tensor:
    """[R, vocab]: after temperature, the best at 0."""
    # Greedy rows pass through the arithmetic and are replaced at the end. The best logit is moved to 0, so
    # that no temperature can overflow it; below the bound only the best tokens keep any mass.
    temperature = rows.temperature.clamp(min=_LEAST_TEMPERATURE).unsqueeze(1)
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def _pick(p: Tensor, greedy: Tensor, rows: SamplingRows) -> Tensor:
    """[R] int64: the token that each row's numbers choose of p [R, vocab], or `greedy` [R]."""
    # NaN logits give some token; the runner finds them, but an id must exist until then.
    if p.device.type == "cpu":
        from engine.race_cpu import winners  # compiled when it is imported

        drawn = winners(p, _key(rows.seed, rows.choice, rows.position))
    else:
        numbers = exponential(rows.seed, rows.choice, rows.position, p.shape[-1])
        drawn = torch.div(p, numbers, out=numbers).argmax(-1)
    return torch.where(rows.temperature > 0, drawn, greedy)


def _truncate(logits: Tensor, rows: SamplingRows) -> Tensor:
    """min_p, top_k, top_p in this order: logits [R, vocab], excluded tokens at -inf. Ties at a cut stay."""
    width = min(logits.shape[-1], max(_NUCLEUS_CANDIDATES, int(rows.top_k.max())))
    best = logits.topk(width, dim=-1).values
    truncated, short = _cut(logits, best, rows)
    if bool(short.any()):
        truncated, _ = _cut(logits, logits.sort(dim=-1, descending=True).values, rows)
    return truncated


def _cut(logits: Tensor, best: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Truncate logits [R, vocab] by what their best ones, [R, K] and falling, say.

    Returns:
        The truncated logits, and [R] bool, true where K candidates were too few to tell.
    """
    (_, vocab), width = logits.shape, best.shape[-1]
    floor = best[:, :1] + rows.min_p.log().unsqueeze(1)
    best = best.masked_fill(best < floor, float("-inf"))
    limited = (rows.top_k > 0).unsqueeze(1)
    rank = (torch.where(rows.top_k > 0, rows.top_k, vocab).clamp(max=width) - 1).unsqueeze(1)
    least = torch.maximum(floor, torch.where(limited, best.gather(1, rank), float("-inf")))
    logits = logits.masked_fill(logits < least, float("-inf"))

    log_total = logits.logsumexp(-1, keepdim=True)
    limit = rows.top_p.unsqueeze(1)
    p = (best.masked_fill(best < least, float("-inf")) - log_total).exp()
    before = p.cumsum(-1) - p  # mass of the better ones: a token stays while that is below top_p
    last = ((before < limit) & (p > 0)).sum(-1, keepdim=True) - 1
    cut = torch.where(limit < 1.0, best.gather(1, last.clamp(min=0)), float("-inf"))
    short = (best[:, -1:] >= least) & (limit < 1.0) & (p.sum(-1, keepdim=True) < limit)
    short |= limited & (rows.top_k.unsqueeze(1) > width)
    return logits.masked_fill(logits < cut, float("-inf")), short.squeeze(1) & (width < vocab)


def verify(logits: Tensor, row_of: Tensor, tokens: Tensor, topology: Topology, rows: SamplingRows) -> Targets:
    """Draw at the nodes, and say which of them may follow their parents.

    The draw at a node of depth d is that of output position `rows.position + d`, the same at every
    node of that depth. Nodes that nothing can reach are not drawn: a draw reads the whole vocabulary,
    and all but a few nodes of a tree are off the accepted path. Only rows of reached nodes are copied.

    An exact row's child may follow where it is the draw at its parent. A typical row's may follow where
    p(child) > min(epsilon, delta * exp(-H)) (Cai et al. 2024, section 2.3.1), with p and its entropy H
    those of the parent's adjusted, tempered, truncated and renormalised distribution.

    Args:
        logits: [T, vocab] of any floating type, raw, of the nodes that were computed; left as they are.
        row_of: [B, N] int64, the row of each valid node; any row for the others.
        tokens: [B, N] int64, node tokens.
        topology: the trees.
        rows: parameters of the B sequences; `position` is that of the draw at the root.
    """
    if rows.all_greedy and rows.adjusting is None:
        return verify_greedy(best_tokens(logits)[row_of], tokens, topology)

    parents, depths, valid = topology.parents, topology.depths, topology.valid
    size = tokens.shape[1]
    drawn = torch.full_like(tokens, -1)
    reached = torch.zeros_like(valid)
    reached[:, 0] = True
    log_p = tokens.new_zeros(tokens.shape, dtype=torch.float32) if rows.typical else None
    # Where a node stands among the reached ones of its depth; only read for those.
    place = torch.zeros_like(tokens)
    path = tokens.new_empty(len(tokens), 0)
    for depth in range(topology.max_depth + 1):
        frontier = (reached & (depths == depth)).view(-1).nonzero().squeeze(1)
        if not len(frontier):
            break
        if depth and rows.adjusting is not None:
            before = path[place.gather(1, parents).view(-1)[frontier]]
            path = torch.cat([before, tokens.view(-1)[frontier].unsqueeze(1)], dim=1)
        place.view(-1)[frontier] = torch.arange(len(frontier), device=frontier.device)

        at = rows.select(frontier // size)
        at = replace(at, position=at.position + depth)
        own = logits[row_of.reshape(-1)[frontier]].float()
        at.adjust_(own, path)
        greedy, p = best_tokens(own), None
        if not rows.all_greedy:
            p = _probabilities(own, at)
        drawn.view(-1)[frontier] = greedy if p is None else _pick(p, greedy, at)

        follows = tokens == drawn.gather(1, parents)
        children = valid & (depths == depth + 1) & reached.gather(1, parents)
        if log_p is not None and p is not None and at.typical is not None:
            parent = place.gather(1, parents) * children  # of no child: any row
            child_p = p[parent, tokens * children]
            typical = (at.typical.asked & (at.temperature > 0))[parent]
            follows = torch.where(typical, child_p > _threshold(p, at.typical)[parent], follows)
            log_p = torch.where(children & follows & typical, child_p.log(), log_p)
        reached |= children & follows
    return Targets(tokens=drawn, matched=reached, log_p=log_p)


def verify_greedy(best: Tensor, tokens: Tensor, topology: Topology) -> Targets:
    """`verify` where every row is greedy and nothing adjusts the logits; best [B, N] are their argmax."""
    drawn = torch.where(topology.valid, best, -1)
    matched = topology.valid & (tokens == drawn.gather(1, topology.parents))
    matched[:, 0].fill_(True)
    return Targets(tokens=drawn, matched=matched)


def verify_all(logits: Tensor, tokens: Tensor, topology: Topology, rows: SamplingRows) -> Targets:
    """`verify` without a look at the device: every node is drawn, so that a CUDA graph can hold it.

    A node draws what it draws in `verify`. One is left out: a node below the root whose truncation needs
    more than the best 256 tokens cannot be told without sorting its row. It is not descended into, so what
    its parent drew ends the path and is the next root, whose row is sorted. That changes no exact row's
    text; a typical row's path may end earlier.

    Args:
        logits: [B * N, vocab] of any floating type, raw, of all nodes in order; left as they are.
        tokens: [B, N] int64, node tokens.
        topology: the trees.
        rows: parameters of the B sequences; `position` is that of the draw at the root.
    """
    batch, size = tokens.shape
    place = torch.arange(batch * size, device=tokens.device).view(batch, size)
    path = _paths(tokens, topology)
    drawing = [(place[:, 0], True), (place[:, 1:].flatten(), False)][: 1 if size == 1 else 2]
    parts = [
        _draw_nodes(logits, part, tokens, path, topology, rows, whole=whole)
        for nodes, whole in drawing
        for part in torch.split(nodes, _ROWS)
    ]

    def grid(value: Callable[[_Drawn], Tensor]) -> Tensor:
        flat = torch.cat([value(part) for part in parts])  # all roots, then the others
        others = flat[batch:].view(batch, size - 1, *flat.shape[1:])
        return torch.cat((flat[:batch].unsqueeze(1), others), dim=1)

    short = grid(lambda part: part.short)
    drawn = torch.where(topology.valid & ~short, grid(lambda part: part.drawn), -1)
    follows = tokens == drawn.gather(1, topology.parents)
    log_p = None
    if rows.typical is not None:
        shares = grid(lambda part: part.shares)  # [B, N, N]
        child_p = shares.gather(1, topology.parents.unsqueeze(1)).squeeze(1)
        threshold = grid(lambda part: part.threshold).gather(1, topology.parents)
        typical = (rows.typical.asked & (rows.temperature > 0)).unsqueeze(1)
        follows = torch.where(typical, child_p > threshold, follows)
        log_p = torch.where(topology.valid & follows & typical, child_p.log(), 0.0)
        log_p[:, 0].zero_()
    matched = topology.valid & follows & ~short
    matched[:, 0].fill_(True)
    return Targets(tokens=drawn, matched=matched, log_p=log_p)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What `verify_all` makes of n nodes.

    Args:
        drawn: [n] int64.
        short: [n] bool; the candidates were too few, and `drawn` means nothing.
        shares: [n, N] float32, the probability of each node's token of the same tree.
        threshold: [n] float32, what a typical child must exceed.
    """

    drawn: Tensor
    short: Tensor
    shares: Tensor
    threshold: Tensor


def _draw_nodes(
    logits: Tensor,
    nodes: Tensor,
    tokens: Tensor,
    path: Tensor,
    topology: Topology,
    rows: SamplingRows,
    *,
    whole: bool,
) -> _Drawn:
    """Draw at nodes [n] (int64, in the flattened grid); `whole`: sort their rows."""
    owner, depth = nodes // tokens.shape[1], topology.depths.flatten()[nodes]
    at = rows.select(owner)
    at = replace(at, position=at.position + depth)
    own = logits[nodes].float()
    at.adjust_all_(own, path.flatten(0, 1)[nodes], depth)
    scaled = _scaled(own, at)
    if whole:
        best = scaled.sort(dim=-1, descending=True).values
    else:
        best = scaled.topk(min(scaled.shape[-1], _NUCLEUS_CANDIDATES), dim=-1).values
    scaled, short = _cut(scaled, best, at)
    p = scaled.softmax(-1)
    drawn = _pick(p, own.argmax(-1), at)
    # A greedy row draws its best token whatever its filters leave.
    short = short & (at.temperature > 0)
    threshold = p[:, 0] if at.typical is None else _threshold(p, at.typical)
    return _Drawn(drawn, short, p.gather(1, tokens[owner]), threshold)


def _paths(tokens: Tensor, topology: Topology) -> Tensor:
    """[B, N, D] int64: the drafted tokens from the root's child down to each node; then anything."""
    batch, size = tokens.shape
    bound = topology.max_depth
    # Each ancestor goes to the column of its depth; the root and the others to one that is cut off.
    column = torch.where(topology.visible(), topology.depths.unsqueeze(1), 0)
    path = tokens.new_zeros(batch, size, bound + 1)
    path.scatter_(2, column, tokens.unsqueeze(1).expand(-1, size, -1))
    return path[..., 1:]


def _threshold(p: Tensor, typical: TypicalRows) -> Tensor:
    """[R] float32: what a child must exceed to be typical of p [R, vocab]."""
    entropy = torch.special.entr(p).sum(-1)
    return torch.minimum(typical.epsilon, typical.delta * torch.exp(-entropy))
