"""Medusa heads: small residual blocks on the last hidden state, each guessing one later token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import HeadsError, TreeError
from engine.medusa.tree import Tree
from engine.model.layers import Linear

__all__ = ["HeadDrafter", "MedusaHeads", "load_heads"]

_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


class MedusaHeads(nn.Module):
    """Head i (from 0) at position t predicts token t + i + 2.

    It computes lm_head_i(R_L(… R_1(x))) with R(x) = x + SiLU(W x + b), where x is the
    hidden state after the final norm (Cai et al. 2024, section 2.1.1).

    Args:
        weights: [layers, heads, hidden, hidden].
        biases: [layers, heads, hidden].
        lm_heads: one per head, or None where the heads share the base model's.
    """

    weights: Tensor
    biases: Tensor

    def __init__(self, weights: Tensor, biases: Tensor, lm_heads: list[Linear] | None) -> None:
        super().__init__()
        self.num_heads = weights.shape[1]
        self.register_buffer("weights", weights.transpose(-1, -2).contiguous(), persistent=False)
        self.register_buffer("biases", biases.unsqueeze(2), persistent=False)
        self.lm_heads = nn.ModuleList(lm_heads) if lm_heads is not None else None

    def forward(self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor], num_heads: int) -> Tensor:
        """Logits [num_heads, B, vocab] of the first `num_heads` heads for hidden states [B, hidden]."""
        x = hidden.expand(num_heads, -1, -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x + F.silu(torch.baddbmm(bias[:num_heads], x, weight[:num_heads]))
        if self.lm_heads is None:
            return lm_head(x)
        return torch.stack([self.lm_heads[i](x[i]) for i in range(num_heads)])


class HeadDrafter:
    """Fills the first nodes of a fixed tree with the heads' best guesses.

    Raises:
        TreeError: the tree is deeper than the heads or wider than the vocabulary.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        lm_head: Callable[[Tensor], Tensor],
        tree: Tree,
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        if tree.depth > heads.num_heads:
            raise TreeError(f"the tree is {tree.depth} deep and there are {heads.num_heads} heads")
        if tree.width > vocab_size:
            raise TreeError(f"the tree takes a head's {tree.width} best of {vocab_size} tokens")
        self.tree = tree
        self._heads, self._lm_head, self._device = heads, lm_head, device
        self._prefixes: dict[int, tuple[Tree, Tensor]] = {}

    def guess(self, hidden: Tensor, nodes: int) -> Tensor:
        """Tokens of the tree's first nodes.

        Args:
            hidden: [B, hidden], the state the root was drawn from.
            nodes: how many, the root not counted.

        Returns:
            [B, nodes] int64.

        Raises:
            TreeError: the tree holds fewer.
        """
        tree, choices = self._prefix(nodes)
        if tree.depth == 0:
            return torch.empty(len(hidden), 0, dtype=torch.int64, device=self._device)
        logits = self._heads(hidden, self._lm_head, tree.depth)
        guesses = logits.topk(tree.width, dim=-1).indices  # [heads, B, width]
        table: Tensor = guesses.transpose(0, 1).reshape(len(hidden), -1)
        tokens: Tensor = table.index_select(1, choices)
        return tokens

    def _prefix(self, nodes: int) -> tuple[Tree, Tensor]:
        if nodes not in self._prefixes:
            tree = self.tree.prefix(nodes + 1)
            self._prefixes[nodes] = (tree, tree.choices(self._device))
        return self._prefixes[nodes]


def load_heads(
    source: str, *, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> MedusaHeads:
    """Read heads in the official format.

    Args:
        source: a `.safetensors` or `.pt` file, or a folder or hub id that holds `medusa_lm_head` as one.

    Returns:
        Heads on `device`; their number is that of the tensors, never the config's (the official config
        says 2 where the file holds 5).

    Raises:
        HeadsError: not found, unreadable, or not matching the base model; the text names the tensor.
    """
    file = _find(source)
    tensors = _read(file)
    layers = _layers(tensors, file)
    num_heads = len(layers)
    num_layers = len(layers[0])

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in tensors:
            raise HeadsError(f"{file}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise HeadsError(
                f"{file}: {name} has shape {list(tensors[name].shape)}, the model needs {list(shape)}"
            )
        return tensors[name].to(dtype=dtype, device=device)

    square = (hidden_size, hidden_size)
    weights = [[take(f"{i}.{j}.linear.weight", square) for i in range(num_heads)] for j in range(num_layers)]
    biases = [
        [take(f"{i}.{j}.linear.bias", (hidden_size,)) for i in range(num_heads)] for j in range(num_layers)
    ]
    own = [f"{i}.{num_layers}.weight" for i in range(num_heads)]
    present = [name for name in own if name in tensors]
    if present and len(present) != num_heads:
        missing = sorted(set(own) - set(present))
        raise HeadsError(f"{file}: some heads have their own lm_head and these do not: {', '.join(missing)}")
    lm_heads = [_lm_head(take(name, (vocab_size, hidden_size))) for name in present] or None
    known = {
        f"{i}.{j}.linear.{part}"
        for i in range(num_heads)
        for j in range(num_layers)
        for part in ("weight", "bias")
    }
    unexpected = sorted(tensors.keys() - known - set(own))
    if unexpected:
        raise HeadsError(f"{file}: unexpected tensors {', '.join(unexpected[:8])} ({len(unexpected)} in all)")
    empty = (0, num_heads, hidden_size)
    if not num_layers:
        return MedusaHeads(
            torch.empty(*empty, hidden_size, dtype=dtype, device=device),
            torch.empty(empty, dtype=dtype, device=device),
            lm_heads,
        )
    return MedusaHeads(
        torch.stack([torch.stack(w) for w in weights]),
        torch.stack([torch.stack(b) for b in biases]),
        lm_heads,
    )


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        raise HeadsError(f"{path} holds neither {' nor '.join(_FILES)}")
    if path.is_file():
        return path
    if path.suffix in (".safetensors", ".pt", ".bin") or source.count("/") != 1:
        raise HeadsError(f"head file {source} does not exist")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    last: Exception | None = None
    for name in _FILES:
        try:
            return Path(hf_hub_download(source, name))
        except (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OSError,
        ) as error:
            last = error
    raise HeadsError(
        f"no head file {' or '.join(_FILES)} at {source}, locally or on the hub: {last}"
    ) from last


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the loaders raise a dozen types; all mean a file nobody can use
        raise HeadsError(f"cannot read the head file {file}: {error}; is it complete?") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise HeadsError(f"{file} does not hold a dictionary of tensors")
    return loaded


def _layers(tensors: Mapping[str, Tensor], file: Path) -> dict[int, set[int]]:
    """Residual layers by head, {head: {layer, …}}, checked to be 0 … n and equally deep."""
    layers: dict[int, set[int]] = {}
    for name in tensors:
        if found := re.fullmatch(r"(\d+)\.(\d+)\.linear\.weight", name):
            layers.setdefault(int(found[1]), set()).add(int(found[2]))
        elif found := re.fullmatch(r"(\d+)\.(\d+)\.weight", name):
            layers.setdefault(int(found[1]), set())
    if not layers:
        raise HeadsError(f"{file} holds no tensor of the form '0.0.linear.weight'; is it a Medusa head file?")
    depth = len(layers.get(0, ()))
    for head in range(max(layers) + 1):
        if layers.get(head) != set(range(depth)):
            raise HeadsError(
                f"{file}: head {head} has layers {sorted(layers.get(head, ()))}, head 0 has {depth}"
            )
    return layers


def _lm_head(weight: Tensor) -> Linear:
    linear = Linear(0, 0, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.pack()
    return linear
