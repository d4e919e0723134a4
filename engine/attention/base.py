"""What an attention backend is given, and what it must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.cache.pool import KVPool

__all__ = [
    "AttentionBackend",
    "AttentionInput",
    "NoAttention",
    "Rotary",
    "RotatingAttention",
    "computed_rows",
    "is_ragged",
]


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Where the new rows of B sequences go and what each of their N query rows may see.

    A query row sees its sequence's cached prefix, rows 0 .. lengths-1, and among the N new rows its
    ancestors and itself in a tree, everything up to itself in a prefill chunk.

    Args:
        block_tables: [B, max_blocks] int64, pool blocks of each sequence; unused entries are any valid block.
        lengths: [B] int64, tokens already in the cache.
        rows: [B, N] int64, flat pool rows (block * block_size + offset) where the new K/V are written;
            new row j is row lengths + j of its sequence.
        max_length: host upper bound of lengths + N, so that shapes need no device read.
        ancestors: [B, N] int64 bit masks, N at most 64; bit j of entry i: query i sees new row j. None is a
            prefill chunk: query i sees new rows 0 .. i.
        index: [T] int64, ascending positions in the flattened [B, N] grid of the T rows that are really
            computed; None means all B * N. Where trees differ in size, only their nodes go through the
            linear layers. Rows that are left out are neither written nor visible to the others, so those of
            a prefill chunk are its sequence's last.
        depths: [B, N] int64, positions of the new rows less `lengths`, which layers with a window need;
            None: row j is at depth j, as in a prefill chunk. A cached row's position is its number.
    """

    block_tables: Tensor
    lengths: Tensor
    rows: Tensor
    max_length: int
    ancestors: Tensor | None = None
    index: Tensor | None = None
    depths: Tensor | None = None

    def positions(self) -> Tensor:
        """[B, N] int64, of the new rows."""
        num_rows = self.rows.shape[1]
        depths = torch.arange(num_rows, device=self.lengths.device) if self.depths is None else self.depths
        return self.lengths.unsqueeze(1) + depths

    def visible(self) -> Tensor:
        """[B, N, N] bool: query i sees new row j. Made anew by each call, for backends that need it."""
        batch, num_rows = self.rows.shape
        column = torch.arange(num_rows, device=self.lengths.device)
        if self.ancestors is None:
            return (column <= column[:, None]).expand(batch, -1, -1)
        return ((self.ancestors.unsqueeze(-1) >> column) & 1).bool()


def computed_rows(sizes: Sequence[int]) -> Tensor | None:
    """`AttentionInput.index` of prefill chunks of these sizes, on the CPU; None where all are equal."""
    longest = max(sizes)
    if min(sizes) == longest:
        return None
    return (torch.arange(longest) < torch.tensor(sizes).unsqueeze(1)).flatten().nonzero().flatten()


class AttentionBackend(Protocol):
    """Attention over the paged pool. `plan` runs once a step, `attend` once a layer.

    A backend is made with the model's query heads per K/V head, the factor on q k^T (None:
    head_dim ** -0.5) and each layer's window (None: no layer has one). A query at position p sees, of
    what it may see at all, positions p - window + 1 and later.
    """

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        """Prepare what all layers of this step share (gather indices, mask)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """Write k, v into the pool, then attend. T is B * N, or the length of `AttentionInput.index`.

        Args:
            layer: index of the layer.
            q: [T, heads, head_dim], rotated.
            k: [T, kv_heads, head_dim], rotated.
            v: [T, kv_heads, head_dim].
            sinks: [heads], contiguous: a logit of each query head, which stands in the softmax as a key that
                every query sees and whose value is 0 (gpt-oss); finite or -inf.

        Returns:
            [T, heads * head_dim].
        """


class Rotary(NamedTuple):
    """How a layer turns queries and keys.

    Args:
        cos, sin: [positions, 2 * frequencies], see `RotaryTable`; further channels of a head stay.
        norm: [(heads + kv_heads) * head_dim], weight of an RMSNorm of each head before that; None without.
        eps: added to its mean squares.
        offset: it multiplies by 1 + weight.
        after: it comes after the rotation, not before.
    """

    cos: Tensor
    sin: Tensor
    norm: Tensor | None = None
    eps: float = 0.0
    offset: bool = False
    after: bool = False

    @property
    def kind(self) -> int:
        """As kernels are told of the norm: 0 is none, 1 before the rotation, 2 after it."""
        return 0 if self.norm is None else 1 + self.after


@runtime_checkable
class RotatingAttention(AttentionBackend, Protocol):
    """A backend on a GPU: it can norm and rotate queries and keys while it loads them."""

    @property
    def rotates(self) -> bool:
        """Whether it does so in the step that was planned."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Rotary | None = None,
        ahead: tuple[Tensor | None, int] = (None, 0),
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.attend`.

        Args:
            rotary: q and k come as the layer's product gives them; None: they are rotated.
            ahead: a weight that is read next, and how many bytes of it may be brought nearer meanwhile.
        """


def is_ragged(attention: AttentionBackend) -> bool:
    """Whether rows that an index leaves out cost a backend next to nothing, in prefill chunks too: it says so
    by `ragged`. (`isinstance` would ask a protocol, which Python 3.12 remembers for each class.)"""
    return bool(getattr(attention, "ragged", False))


class NoAttention:
    """Stands for attention where what lies around it is measured.

    Args:
        mixed: [T, heads * head_dim], what each layer is given.
    """

    def __init__(self, mixed: Tensor) -> None:
        self._mixed = mixed

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        """Nothing is shared by its layers."""

    def attend(
        self,
        layer: int,  # noqa: ARG002
        q: Tensor,  # noqa: ARG002
        k: Tensor,  # noqa: ARG002
        v: Tensor,  # noqa: ARG002
        *,
        sinks: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """`mixed`."""
        return self._mixed
