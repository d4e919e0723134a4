"""Medusa heads: small residual blocks on the last hidden state, each guessing one later token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import TreeError
from engine.medusa.bigram import CANDIDATES, Bigram, Walk, follow
from engine.medusa.head_files import HeadTensors
from engine.medusa.tree import Tree
from engine.model.layers import Linear

__all__ = ["HeadDrafter", "MedusaHeads"]


class MedusaHeads(nn.Module):
    """Head i (from 0) at position t predicts token t + i + 2.

    It computes lm_head_i(R_L(… R_1(x))) with R(x) = x + SiLU(W x + b), where x is the
    hidden state after the final norm (Cai et al. 2024, section 2.1.1).

    Args:
        weights: [layers, heads, hidden, hidden].
        biases: [layers, heads, hidden].
        lm_heads: one per head, or one for all; none: the base model's.
        token_map: [draft_vocab] int64, the token that each row of an lm_head stands for; None: row r is
            token r. Heads that share the base model's lm_head then need its rows: `prepare`.
    """

    weights: Tensor
    biases: Tensor
    token_map: Tensor | None

    def __init__(
        self,
        weights: Tensor,
        biases: Tensor,
        lm_heads: Sequence[Linear] = (),
        token_map: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = weights.shape[1]
        self.register_buffer("weights", weights.transpose(-1, -2).contiguous(), persistent=False)
        self.register_buffer("biases", biases.unsqueeze(2), persistent=False)
        self.register_buffer("token_map", token_map, persistent=False)
        self.lm_heads = nn.ModuleList(lm_heads)
        self.residual: Callable[[Tensor, Tensor], Tensor] = _add_silu

    @classmethod
    def from_tensors(
        cls, tensors: HeadTensors, *, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> MedusaHeads:
        """Heads on `device` from what their files hold; `prepare` them before the first use."""

        def stacked(layers: list[list[Tensor]], *shape: int) -> Tensor:
            if not layers:
                return torch.empty(0, tensors.num_heads, *shape, dtype=dtype, device=device)
            return torch.stack([torch.stack(layer) for layer in layers]).to(device=device, dtype=dtype)

        weights = stacked(tensors.weights, hidden_size, hidden_size)
        biases = (
            weights.new_zeros(weights.shape[:-1])
            if tensors.biases is None
            else stacked(tensors.biases, hidden_size)
        )
        lm_heads = [_linear(weight.to(dtype=dtype, device=device)) for weight in tensors.lm_heads]
        token_map = None if tensors.token_map is None else tensors.token_map.to(device)
        return cls(weights, biases, lm_heads, token_map)

    def prepare(self, lm_head: Tensor, *, quantize: Literal["none", "int8", "fp8"] = "none") -> None:
        """Make the lm_heads ready for this device, once, before the base model's own is packed.

        With a draft vocabulary and the base model's lm_head, the rows of these tokens are copied: drafting
        then reads [draft_vocab, hidden] instead of the whole matrix.

        Args:
            lm_head: [vocab, hidden], the base model's.
            quantize: lm_heads to 8 bits, as the base model's (see `Linear.quantize`).
        """
        if self.token_map is not None and not self.lm_heads:
            self.lm_heads.append(_linear(lm_head.detach()[self.token_map]))
        for linear in self.lm_heads:
            assert isinstance(linear, Linear)
            if quantize != "none":
                linear.quantize(quantize, rotate=True)
            linear.pack()

    def forward(self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor], num_heads: int) -> Tensor:
        """Logits of the first `num_heads` heads.

        Args:
            hidden: [B, hidden].
            lm_head: the base model's, for heads that have none of their own.

        Returns:
            [num_heads, B, vocab], or [num_heads, B, draft_vocab] where there is a token map.
        """
        x = hidden.expand(num_heads, -1, -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = self.residual(x, torch.baddbmm(bias[:num_heads], x, weight[:num_heads]))
        if not self.lm_heads:
            if self.token_map is not None:
                raise RuntimeError("heads with a draft vocabulary need `prepare` before their first use")
            return lm_head(x)
        if len(self.lm_heads) == 1:
            logits: Tensor = self.lm_heads[0](x)
            return logits
        return torch.stack([self.lm_heads[i](x[i]) for i in range(num_heads)])


class HeadDrafter:
    """Fills the first nodes of a fixed tree with the heads' best guesses, in the order of a bigram if any.

    Raises:
        TreeError: the tree is deeper than the heads, or wider than the vocabulary they draft from or than the
            guesses that a bigram orders.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        lm_head: Callable[[Tensor], Tensor],
        tree: Tree,
        *,
        vocab_size: int,
        device: torch.device,
        accepted: Sequence[float] | None = None,
        bigram: Bigram | None = None,
    ) -> None:
        if tree.depth > heads.num_heads:
            raise TreeError(f"the tree is {tree.depth} deep and there are {heads.num_heads} heads")
        offered = vocab_size if heads.token_map is None else len(heads.token_map)
        if bigram is not None:
            offered = min(offered, CANDIDATES)
        if tree.width > offered:
            raise TreeError(f"the tree takes a head's {tree.width} best of {offered} tokens")
        self.tree = tree
        self.accepted = accepted
        """For each node below the root, how often it came true on held-out text; None: nobody counted."""
        self._heads, self._lm_head, self._device, self._bigram = heads, lm_head, device, bigram
        self._prefixes: dict[int, tuple[Tree, Tensor]] = {}
        self._walks: dict[int, Walk] = {}
        self._best: Callable[[Tensor, int, Tensor, Tensor | None], Tensor] = _best_guesses
        self._follow: Callable[[Tensor, Tensor | None, Bigram, Tensor, Walk], Tensor] = follow
        if bigram is not None and device.type == "cpu":
            from engine.medusa import bigram_cpu  # compiled when it is imported

            self._follow = bigram_cpu.follow

    @property
    def needs_root(self) -> bool:
        """Whether guesses depend on the token that they come behind."""
        return self._bigram is not None

    def fuse_triton(self) -> None:
        """From here on Triton kernels do what is not a product, where they can run (on CUDA)."""
        from engine.medusa import bigram_triton, heads_triton  # only CUDA needs Triton

        self._best, self._heads.residual = heads_triton.best_guesses, heads_triton.add_silu
        self._follow = bigram_triton.follow

    def guess(self, root: Tensor | None, hidden: Tensor, nodes: int) -> Tensor:
        """Tokens of the tree's first nodes.

        Args:
            root: [B] int64, the token that they come behind; may be None unless it is needed (`needs_root`).
            hidden: [B, hidden], the state the root was drawn from.
            nodes: how many, the root not counted.

        Returns:
            [B, nodes] int64.

        Raises:
            TreeError: the tree holds fewer.
            ValueError: the root is needed.
        """
        tree, choices = self._prefix(nodes)
        if tree.depth == 0:
            return torch.empty(len(hidden), 0, dtype=torch.int64, device=self._device)
        logits = self._heads(hidden, self._lm_head, tree.depth)
        if self._bigram is not None:
            if root is None:
                raise ValueError("a bigram orders the guesses by the root, which was not given")
            if nodes not in self._walks:
                self._walks[nodes] = Walk.of(tree, self._device)
            return self._follow(logits, self._heads.token_map, self._bigram, root, self._walks[nodes])
        return self._best(logits, tree.width, choices, self._heads.token_map)

    def _prefix(self, nodes: int) -> tuple[Tree, Tensor]:
        if nodes not in self._prefixes:
            tree = self.tree.prefix(nodes + 1)
            self._prefixes[nodes] = (tree, tree.choices(self._device))
        return self._prefixes[nodes]


def _add_silu(x: Tensor, y: Tensor) -> Tensor:
    """x + SiLU(y)."""
    return x + F.silu(y)


def _best_guesses(logits: Tensor, width: int, choices: Tensor, token_map: Tensor | None) -> Tensor:
    """[B, nodes] int64: of the `width` best of logits [heads, B, vocab], those that a tree takes.

    Args:
        choices: [nodes] int64, places in [heads, width] flattened.
        token_map: see `MedusaHeads`.
    """
    guesses = logits.topk(width, dim=-1).indices  # [heads, B, width]
    if token_map is not None:
        guesses = token_map[guesses]
    table: Tensor = guesses.transpose(0, 1).reshape(logits.shape[1], -1)
    tokens: Tensor = table.index_select(1, choices)
    return tokens


def _linear(weight: Tensor) -> Linear:
    linear = Linear(weight.shape[1], 0, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
