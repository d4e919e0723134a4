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
    "join_shape",
    "joined_at_once",
    "others",
]

MOST_ROWS = 128
"""Query rows of a sequence and K/V head beyond which they come in several tiles."""

LEAST_ROWS = 16
"""Of a matrix product on tensor cores, and the least it can sum over."""

_FEW_ROWS = 8
"""Of a sequence and K/V head without a tree, or with a small one, which waits for latencies only."""

_MOST_SHORT = 64
"""Query rows of a short chunk: more of them fill a long one's tiles as well as a tree's."""

_MOST_JOINED = 32
"""Query rows of a tile that one program may join: of more, many of a second kernel do each their share."""


class Kind(NamedTuple):
    """Steps that share a tile.

    Args:
        rows: query rows of a sequence and K/V head, rounded up to a power of two from 8 to 128.
        chunk: of a prefill chunk of more than 64 query rows. A short one is like a tree of at least 16: each
            kind is another compilation, and a prompt waits for few rows less than a tree does.
    """

    rows: int
    chunk: bool

    @classmethod
    def of(cls, rows: int, *, tree: bool) -> Kind:
        """That of `rows` query rows."""
        if not tree and rows > _MOST_SHORT:
            return cls(MOST_ROWS, chunk=True)
        size = _FEW_ROWS if tree else LEAST_ROWS
        while size < min(rows, MOST_ROWS):
            size *= 2
        return cls(size, chunk=False)

    @classmethod
    def of_prompts(cls) -> list[Kind]:
        """All that a prefill chunk may be of."""
        return list(dict.fromkeys(cls.of(rows, tree=False) for rows in range(1, MOST_ROWS + 1)))


class Tile(NamedTuple):
    """A kernel's shape.

    Args:
        rows: query rows of a tile; keys: cached keys of it.
        warps: of a program; stages: of its loop's pipeline.
        joins: where keys are split, the last program to finish joins the parts, not a second kernel.
        rotates: whoever loads queries or keys of a tree norms and rotates them, not a kernel before.
        least_keys: cached keys that a part gets at least, where keys are split.
        together: keys are split until there are so many programs for each multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    joins: bool = False
    rotates: bool = True
    least_keys: int = 128
    together: int = 2


def block_channels(head_dim: int) -> int:
    """Channels of a tile: head_dim rounded up to a power of two, as many as a product takes at least."""
    return max(LEAST_ROWS, 1 << (head_dim - 1).bit_length())


def candidates(kind: Kind, channels: int, itemsize: int) -> list[Tile]:
    """Tiles worth measuring; the first is taken where nothing is measured.

    Args:
        channels: see `block_channels`.
        itemsize: bytes of an element of K and V.
    """
    # In a chunk the same key is loaded by many programs; for large tiles of many channels registers are few.
    rotates = not kind.chunk and (channels <= 128 or kind.rows <= 32 or itemsize > 2)
    return [tile._replace(rotates=rotates) for tile in _shapes(kind, channels, itemsize)]


def _shapes(kind: Kind, channels: int, itemsize: int) -> list[Tile]:
    if itemsize > 2:  # float32, with exact products: not on tensor cores, and registers are few
        return [Tile(16, 32 if channels <= 128 else 16, 8, 2), Tile(16, 16, 4, 2)]
    # A stage holds K and V of a tile's keys: 64 keys of 128 channels in 16 bits take 32 KiB.
    wide, narrow, warps = (64, 32, 4) if channels <= 128 else (32, 16, 8)
    if kind.rows <= 32:
        shapes = [(wide, warps, 3), (wide, warps, 4), (narrow, warps // 2, 4)]
        return [Tile(max(kind.rows, LEAST_ROWS), *shape) for shape in shapes]
    tiles = [Tile(64, wide, warps, 3), Tile(64, wide, warps, 4), Tile(64, narrow, warps, 4)]
    if kind.rows == MOST_ROWS:
        tiles = [Tile(128, wide, 8, 3), Tile(128, narrow, 8, 3), *tiles[:2]]
    if kind.chunk:
        # Of so many channels none of these fits the 99 KiB of shared memory that GPUs of workstations have.
        return tiles if channels <= 128 else [*tiles, Tile(64, narrow, warps, 4)]
    # A tree's work is short: more programs that load the same keys may end sooner than parts that are joined.
    return [*tiles, Tile(32, wide, warps, 3), Tile(LEAST_ROWS, wide, warps, 3)]


def others(kind: Kind, tile: Tile, *, rotary: bool) -> list[Tile]:
    """A tree's tile with queries and keys rotated by a kernel before, or the parts of few rows joined by the
    last program, or both: what else to measure when a shape is found; none for a chunk.

    Args:
        rotary: there is a rotation at all.
    """
    if kind.chunk:
        return []
    apart = [tile._replace(rotates=False)] if tile.rotates and rotary else []
    if tile.rows > _MOST_JOINED:
        return apart
    return [*apart, *(one._replace(joins=True) for one in (tile, *apart))]


def joined_at_once(tile: Tile, rows: int, channels: int) -> tuple[int, int]:
    """Rows and parts that a program loads at a time which joins a tile; a thread holds 64 of their numbers.

    Args:
        rows: query rows of a sequence and K/V head.
    """
    block: int = min(1 << (rows - 1).bit_length(), LEAST_ROWS)
    return block, max(1, min(32, 64 * 32 * tile.warps // (block * channels)))


def join_shape(channels: int, *, one: bool) -> tuple[int, int]:
    """Rows and parts that a program of the second kernel loads at a time, 32 numbers a thread of four warps.

    Args:
        one: programs take one row each, so that there are many.
    """
    rows = 1 if one else 4
    return rows, max(1, min(64, 4096 // (rows * channels)))
