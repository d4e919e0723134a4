"""How the Triton kernels cut up their work: tiles by kind of query rows."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "LEAST_ROWS",
    "MOST_ROWS",
    "Kind",
    "Tile",
    "block_channels",
    "candidates",
    "joining",
    "parts_at_once",
]

MOST_ROWS = 128
"""Query rows of a sequence and K/V head beyond which they come in several tiles."""

LEAST_ROWS = 16
"""Of a matrix product on tensor cores, and the least it can sum over."""


class Kind(NamedTuple):
    """Steps that share a tile.

    Args:
        rows: query rows of a sequence and K/V head, rounded up to a power of two from 16 to 128.
        chunk: more than that, of a prefill chunk. A short chunk is like a tree.
    """

    rows: int
    chunk: bool

    @classmethod
    def of(cls, rows: int, *, tree: bool) -> Kind:
        """That of `rows` query rows."""
        size = LEAST_ROWS
        while size < min(rows, MOST_ROWS):
            size *= 2
        return cls(size, chunk=not tree and rows > MOST_ROWS)


class Tile(NamedTuple):
    """A kernel's shape.

    Args:
        rows: query rows of a tile; keys: cached keys of it.
        warps: of a program; stages: of its loop's pipeline.
        joins: where keys are split, the last program to finish joins the parts, not a second kernel.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    joins: bool = False


def block_channels(head_dim: int) -> int:
    """Channels of a tile: head_dim rounded up to a power of two, as many as a product takes at least."""
    return max(LEAST_ROWS, 1 << (head_dim - 1).bit_length())


def candidates(kind: Kind, channels: int, itemsize: int) -> list[Tile]:
    """Tiles worth measuring; the first is taken where nothing is measured.

    Args:
        channels: see `block_channels`.
        itemsize: bytes of an element of K and V.
    """
    if itemsize > 2:  # float32, with exact products: not on tensor cores, and registers are few
        return [Tile(16, 32 if channels <= 128 else 16, 8, 2), Tile(16, 16, 4, 2)]
    # A stage holds K and V of a tile's keys: 64 keys of 128 channels in 16 bits take 32 KiB.
    wide, narrow, warps = (64, 32, 4) if channels <= 128 else (32, 16, 8)
    if kind.rows <= 32:
        shapes = [(wide, warps, 3), (wide, warps, 4), (narrow, warps // 2, 4)]
        return [Tile(kind.rows, *shape) for shape in shapes]
    tiles = [Tile(64, wide, warps, 3), Tile(64, wide, warps, 4), Tile(64, narrow, warps, 4)]
    if kind.rows == MOST_ROWS:
        tiles = [Tile(128, wide, 8, 3), Tile(128, narrow, 8, 3), *tiles[:2]]
    return tiles


def joining(kind: Kind, tile: Tile, channels: int) -> Tile | None:
    """The same tile with parts joined by the last program; None where registers are too few for it."""
    fits = not kind.chunk and tile.rows * channels <= 64 * 32 * tile.warps
    return tile._replace(joins=True) if fits else None


def parts_at_once(tile: Tile, channels: int) -> int:
    """How many parts a program that joins them loads at a time: a thread holds 32 of their numbers, or 64."""
    numbers = (64 if tile.rows == LEAST_ROWS else 32) * 32 * tile.warps
    return max(1, min(16, numbers // (tile.rows * channels)))
