"""Which token follows which: an order of the heads' guesses that knows the path before them.

Heads know the hidden state alone, so each guesses its token whatever the others guessed: a tree then holds
paths that no text would take. Here a guess also counts how often it followed the token before it on its own
path, the root for the first head, in the model's own answers. Heads that depend on each other have to be
trained (Hydra, Ankner et al. 2024, arXiv 2402.05109); this is counted, fits any heads, and costs few lookups.

Head i's best guesses t behind token s come in the order of z_i[t] + w_i log(1 + c(s, t) / (k p(t))): z_i are
its logits, c counts the pair, p is t's share of all tokens. By counts that shrink towards p the chance of t
behind s goes with k p(t) + c(s, t), so w = 1 adds all that they say beyond p, as if the hidden state had said
nothing of it yet. Pairs that were not seen add nothing, and are not in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import HeadsError, WeightsError
from engine.medusa.tree import Tree
from engine.model.files import SafetensorsFile

__all__ = [
    "BIGRAM_FILE",
    "CANDIDATES",
    "FACTOR",
    "Bigram",
    "BigramTable",
    "Walk",
    "candidates",
    "find_bigram",
    "follow",
]

BIGRAM_FILE = "medusa_bigram.safetensors"
"""Beside the heads, as `calibrate` leaves it."""

CANDIDATES = 32
"""Best guesses of each head that are put into a new order; a tree takes the first of them."""

_WAYS = 4
"""Pairs that one bucket of the hash table holds; there are as many buckets as pairs."""

FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as an int64: products with it are spread over their upper bits (Knuth)."""


@dataclass(frozen=True, slots=True)
class BigramTable:
    """Pairs of tokens, on the CPU. A file has `counts`, how many pairs each token begins, for `tokens`.

    Args:
        tokens: [pairs] int32, the token before.
        followers: [pairs] int32, the token behind it.
        values: [pairs], of any floating type: what the pair adds to a logit, times a head's weight.
        weights: [heads] float32.
    """

    tokens: Tensor
    followers: Tensor
    values: Tensor
    weights: Tensor

    def save(self, folder: Path, *, vocab_size: int) -> Path:
        """Write it beside the heads in `folder`; `serve` finds it there."""
        file = folder / BIGRAM_FILE
        order = self.tokens.argsort(stable=True)
        tensors = {
            "counts": self.tokens.bincount(minlength=vocab_size).int(),
            "followers": self.followers[order],
            "values": self.values[order],
            "weights": self.weights.contiguous(),
        }
        save_file(tensors, file)
        file.chmod(0o644)  # safetensors makes it readable to its owner only
        return file

    @classmethod
    def load(cls, file: Path, *, num_heads: int, vocab_size: int) -> BigramTable:
        """Read a file.

        Raises:
            HeadsError: unreadable, or not of these heads and this vocabulary.
        """
        try:
            opened = SafetensorsFile(file)
            names = set(opened.names())
            if names != {"counts", "followers", "values", "weights"}:
                raise HeadsError(
                    f"{file} holds {', '.join(sorted(names)) or 'nothing'}: it is no bigram table"
                )
            counts, followers, values, weights = map(opened.get, ("counts", "followers", "values", "weights"))
        except WeightsError as error:
            raise HeadsError(f"cannot read the bigram table: {error}") from error
        if list(weights.shape) != [num_heads]:
            raise HeadsError(
                f"{file} is for {weights.numel()} heads, and there are {num_heads}; run calibrate again"
            )
        if list(counts.shape) != [vocab_size]:
            raise HeadsError(f"{file} is for {counts.numel()} tokens, and the model has {vocab_size}")
        for name, tensor in (("counts", counts), ("followers", followers)):
            if tensor.dtype != torch.int32 or (tensor.numel() and int(tensor.min()) < 0):
                raise HeadsError(f"{file}: {name} must be whole numbers from 0, as int32")
        pairs = int(counts.sum())
        if not list(followers.shape) == list(values.shape) == [pairs]:
            shapes = f"{list(followers.shape)} and {list(values.shape)}"
            raise HeadsError(f"{file}: followers and values have shapes {shapes}, and counts give {pairs}")
        if pairs and int(followers.max()) >= vocab_size:
            raise HeadsError(f"{file}: followers must be token ids below {vocab_size}")
        for tensor in (values, weights):
            if not (tensor.is_floating_point() and tensor.float().isfinite().all()):  # as a step has them
                raise HeadsError(f"{file} holds values that are not finite numbers of float32")
        tokens = torch.arange(vocab_size, dtype=torch.int32).repeat_interleave(counts.long())
        if len(set((tokens.long() * vocab_size + followers).tolist())) < pairs:
            raise HeadsError(f"{file} holds a pair twice")
        return cls(tokens, followers, values, weights)


def find_bigram(heads: str, *, num_heads: int, vocab_size: int) -> BigramTable | None:
    """What lies beside a local head file, or in its folder; None where nobody counted.

    Raises:
        HeadsError: what lies there cannot be used.
    """
    path = Path(heads).expanduser()
    file = (path if path.is_dir() else path.parent) / BIGRAM_FILE
    return BigramTable.load(file, num_heads=num_heads, vocab_size=vocab_size) if file.is_file() else None


class Bigram(nn.Module):
    """A table as a step reads it: a hash table of pairs, on the heads' device.

    Args:
        table: the pairs.
        token_map: [draft_vocab] int64, see `MedusaHeads`: pairs with other followers are left out.
        vocab_size: of the base model.
        device: of the tensors.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor

    def __init__(
        self, table: BigramTable, token_map: Tensor | None, *, vocab_size: int, device: torch.device
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        keys = table.tokens.long() * vocab_size + table.followers.long()
        values = table.values.float()
        if token_map is not None:
            kept = torch.isin(table.followers.long(), token_map.cpu())
            keys, values = keys[kept], values[kept]
        self._mask = (1 << max(1, (len(keys) - 1).bit_length())) - 1
        # The largest first: where more pairs than a bucket holds meet, the least are left out.
        order = values.argsort(descending=True, stable=True)
        order = order[self._bucket(keys[order]).argsort(stable=True)]
        keys, values = keys[order], values[order]
        bucket = self._bucket(keys)
        place = torch.arange(len(keys)) - torch.searchsorted(bucket, bucket)
        inside = place < _WAYS
        slot = (bucket * _WAYS + place)[inside]
        size = (self._mask + 1) * _WAYS
        held = torch.full((size,), -1, dtype=torch.int64).index_copy_(0, slot, keys[inside])
        worth = torch.zeros(size).index_copy_(0, slot, values[inside])
        self.register_buffer("keys", held.view(-1, _WAYS).to(device), persistent=False)
        self.register_buffer("values", worth.view(-1, _WAYS).to(device), persistent=False)
        self.register_buffer("weights", table.weights.float().to(device), persistent=False)

    def forward(self, before: Tensor, tokens: Tensor) -> Tensor:
        """What pairs are worth, not weighted yet.

        Args:
            before: [B, P] int64.
            tokens: [B, C] int64.

        Returns:
            [B, P, C] float32.
        """
        key = before.unsqueeze(2) * self.vocab_size + tokens.unsqueeze(1)
        bucket = self._bucket(key)
        return (self.values[bucket] * (self.keys[bucket] == key.unsqueeze(3))).sum(3)

    def _bucket(self, key: Tensor) -> Tensor:
        return (key * FACTOR >> 32) & self._mask


@dataclass(frozen=True, slots=True)
class Walk:
    """A tree level by level, for `follow`.

    Args:
        levels: for each depth from 1: which nodes of the level above have children, [P] int64; the most
            guesses that one of them takes; where each node of the level stands in [P, guesses] flattened,
            [n] int64.
        order: [nodes] int64, where each node of the tree, the root left out, stands in the levels joined.
        table: [parents, 1 + width] int64, the same for kernels. Of each node that has children, level by
            level: which of the tree's nodes it is, -1 for the root; then which one takes each guess behind
            it, -1 where none does.
        starts: [depth + 1] int64, the first row of each level in `table`, and how many rows there are.
    """

    levels: tuple[tuple[Tensor, int, Tensor], ...]
    order: Tensor
    table: Tensor
    starts: Tensor

    @classmethod
    def of(cls, tree: Tree, device: torch.device) -> Walk:
        """Of a tree, its tensors on `device`."""
        levels, order = [], [0] * len(tree.paths)
        table, starts = list[list[int]](), [0]
        index = {(): -1} | {path: node for node, path in enumerate(tree.paths)}
        above: list[tuple[int, ...]] = [()]
        count = 0
        for depth in range(1, tree.depth + 1):
            nodes = [path for path in tree.paths if len(path) == depth]
            parents = sorted({path[:-1] for path in nodes}, key=above.index)
            width = 1 + max(path[-1] for path in nodes)
            picks = [parents.index(path[:-1]) * width + path[-1] for path in nodes]
            levels.append((_ids([above.index(p) for p in parents], device), width, _ids(picks, device)))
            for at, path in enumerate(nodes):
                order[index[path]] = count + at
            table += [
                [index[path], *(index.get((*path, rank), -1) for rank in range(tree.width))]
                for path in parents
            ]
            starts.append(len(table))
            above, count = nodes, count + len(nodes)
        return cls(tuple(levels), _ids(order, device), _ids(table, device), _ids(starts, device))


def candidates(logits: Tensor, token_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each head's best tokens of logits [heads, B, draft_vocab], the best first.

    Returns:
        The tokens [heads, B, C] int64 and their logits; C is `CANDIDATES`, or draft_vocab where that is less.
    """
    best = logits.topk(min(CANDIDATES, logits.shape[2]), dim=-1)
    return best.indices if token_map is None else token_map[best.indices], best.values


def follow(logits: Tensor, token_map: Tensor | None, bigram: Bigram, root: Tensor, walk: Walk) -> Tensor:
    """The guesses that a tree takes, each in its order behind the token before it.

    Args:
        logits: [heads, B, draft_vocab], at least as many heads as the tree is deep.
        token_map: [draft_vocab] int64, see `MedusaHeads`; None: each column is its token.
        root: [B] int64, the token that the first head's guesses come behind.
        walk: of the tree.

    Returns:
        [B, nodes] int64.
    """
    tokens, values = candidates(logits, token_map)
    before, found = root.unsqueeze(1), []
    for depth, (parents, width, picks) in enumerate(walk.levels):
        worth = bigram(before.index_select(1, parents), tokens[depth])
        scores = worth.mul_(bigram.weights[depth]).add_(values[depth].unsqueeze(1))
        places = scores.topk(width, dim=-1).indices.flatten(1).index_select(1, picks)
        before = tokens[depth].gather(1, places)
        found.append(before)
    return torch.cat(found, dim=1).index_select(1, walk.order)


def _ids(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
