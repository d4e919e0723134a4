"""Which shapes the kernels of products of few rows may have."""

from __future__ import annotations

from typing import NamedTuple

import triton

__all__ = ["MOST_ROWS", "MOST_TILES", "SHARED", "Around", "Shape", "shapes"]

MOST_ROWS = 64
"""More of them are torch's."""

_MOST_HELD = 768
"""Numbers that a thread may hold of its tiles; more spill."""

_AHEAD = 12 << 20
"""Bytes of weights between a program's and those it asks for: about what is under way at a time."""

_LONGEST = 2048
"""Channels that a program of several rows holds at once; of more, weights stream through shared memory."""

SHARED = 228 << 10
"""Bytes of shared memory of a Hopper's multiprocessor."""

_SPARED = 12 << 10
"""Of those, what programs may not take for their tiles."""

_MOST_SPLITS = 8
"""Programs that share the channels of a tile of outputs."""

_LEAST_HEIGHT = 40
"""Outputs of a program of a weight that streams: each reads the input, which of fewer would be most of it."""

_LEAST_SHARED = 60
"""The same where programs share the channels of a tile of outputs, which costs them a sum."""

MOST_TILES = 4096
"""Of outputs of a weight that streams: for each there is a count of the programs that are done."""

_MANY_ROWS = 32
"""With more of them a stream may beat holding all channels, which reads weights once per 16 or 32 rows."""


class Around(NamedTuple):
    """What a product does beside the product.

    Args:
        norm: the input passes through an RMSNorm; offset: by 1 + weight.
        activation: of a gate, whose outputs come first in the weight; "" without: then all are outputs.
        adds: the output is added to what is there.
    """

    norm: bool = False
    offset: bool = False
    activation: str = ""
    adds: bool = False


class Shape(NamedTuple):
    """A kernel's shape.

    Args:
        rows: of a program.
        outputs: of a program's tile, a power of two.
        channels: of one row, taken at once; of several rows, those that a warp takes, or of a tile that
            streams.
        warps: of a program.
        ahead: of one long row: before it waits, a program asks for the weights of the one so many behind it.
        splits: of a weight that streams: programs that share an output's channels; 0: it does not stream.
        stages: tiles under way, of a weight that streams.
        fewer: outputs of a tile that streams that are another program's.
    """

    rows: int
    outputs: int
    channels: int
    warps: int
    ahead: int = 0
    splits: int = 0
    stages: int = 0
    fewer: int = 0

    @property
    def height(self) -> int:
        """Outputs of a program."""
        return self.outputs - self.fewer

    @property
    def streams(self) -> bool:
        """Whether the weight streams through shared memory; the input's norm is then computed before."""
        return self.splits > 0

    @property
    def lines(self) -> int:
        """Of 128 bytes of an output's weights that stream, asked for before the kernel waits."""
        return 4 if self.channels == 64 else 8


def shapes(
    rows: int, size: int, width: int, gated: bool, processors: int, shared: int = SHARED
) -> list[Shape]:
    """Those worth measuring, the best guess first; none where torch's product is as good.

    Args:
        rows: of the input; size: channels of each.
        width: outputs of each.
        gated: the product has two weights of these outputs.
        processors: multiprocessors of the device.
        shared: bytes of shared memory of each.
    """
    if size % 16:
        return []  # rows of the weight would not begin where 16 bytes can be loaded at once
    whole = triton.next_power_of_2(size)
    if rows == 1 and size > _LONGEST:
        # Many small programs, each of which asks for all it reads at once, fill the time of those that end.
        chunk = min(whole, 4096)
        found = [Shape(1, 1, chunk, 4), Shape(1, 2, chunk, 8), Shape(1, 1, chunk, 2)]
        if not gated:
            found = [Shape(1, 2, chunk, 8), Shape(1, 8, 512, 4), Shape(1, 4, 1024, 4), Shape(1, 1, chunk, 2)]
        two = 2 if gated else 1
        return [
            *found,
            *(shape._replace(ahead=_AHEAD // (2 * two * shape.outputs * size)) for shape in found[:2]),
        ]
    if rows == 1:
        chunk = min(whole, 1024)
        return [Shape(1, 4, chunk, 8), Shape(1, 4, chunk, 4), Shape(1, 8, chunk, 8), Shape(1, 2, whole, 4)]
    if rows > MOST_ROWS:
        return []
    if size > _LONGEST:
        return _streamed(rows, width, gated, processors, shared - _SPARED)
    # Few warps, each with a long share: joining what they have summed up takes as long as summing it up.
    tokens = (8,) if rows <= 8 else (16,) if rows <= 16 else (16, 32)
    found = []
    for warps in (8, 4, 16) if size > 1024 else (4, 2, 8):
        channels = max(16, triton.next_power_of_2(triton.cdiv(size, warps)))
        for some in tokens:
            # Tiles of the rows and of the weights, and the rows in float32 for their norm.
            held = channels * (2 * some + 16 * (2 if gated else 1)) // 32
            if held <= _MOST_HELD:
                found.append(Shape(some, 16, channels, warps))
    if rows > _MANY_ROWS:
        found.append(_small(rows, size, width, gated, processors))
    return found


_TILES = {
    # By weights' rows of a tile: its channels, and warps.
    64: ((128, 4), (256, 4), (64, 4)),
    128: ((128, 8), (128, 4), (64, 4), (256, 8)),
    256: ((64, 4), (128, 8), (64, 8)),
}
"""The best guess first, by what an H100 takes for a 7B's products. Few tiles of many channels bring each
output's weights in long runs, which memory gives sooner, many of few channels more of them at a time."""


def _streamed(rows: int, width: int, gated: bool, processors: int, room: int) -> list[Shape]:
    two = 2 if gated else 1
    held = max(16, triton.next_power_of_2(rows))
    found: list[Shape] = []
    for height, splits, waves in _cuts(width, two, processors):
        # A Hopper's tensor cores take no fewer at their full rate.
        outputs = max(64, triton.next_power_of_2(height))
        tiles = _TILES[two * outputs]
        for channels, warps in tiles if splits == 1 else tiles[:2]:
            tile = (two * outputs + held) * channels * 2
            # Programs of a second wave may run beside those of the first, or behind them.
            for together in range(1, waves + 1):
                stages = min(room // together // tile, 8)
                if stages >= together + 1:
                    found.append(Shape(held, outputs, channels, warps, 0, splits, stages, outputs - height))
    return list(dict.fromkeys(found))


def _cuts(width: int, two: int, processors: int) -> list[tuple[int, int, int]]:
    """Outputs of a program, how many programs share their channels, and whether each multiprocessor gets one
    (1) or several (2): so that all multiprocessors end together, and nobody shares where outputs are enough.
    """
    most = 256 // two
    found: list[tuple[int, int, int]] = []
    for waves in range(1, triton.cdiv(width, processors) + 1):
        height = _even(width, processors * waves)
        if height < _LEAST_HEIGHT or len(found) == 2:
            break
        if height <= most:
            found.append((height, 1, min(waves, 2)))
    if found:
        return found
    least = next(
        (splits for splits in range(2, _MOST_SPLITS) if _even(width, processors // splits) >= _LEAST_SHARED),
        _MOST_SPLITS,
    )
    cuts = ((least, 1), (least + 1, 1), (2 * least, 1), (least + 1, 2))
    return [
        (min(_even(width, waves * processors // splits), most), splits, waves)
        for splits, waves in cuts
        if splits <= _MOST_SPLITS
    ]


def _even(width: int, programs: int) -> int:
    """Outputs of each of so many programs, a multiple of 4."""
    each: int = 4 * triton.cdiv(width, 4 * max(1, programs))
    return each


def _small(rows: int, size: int, width: int, gated: bool, processors: int) -> Shape:
    """Of a small weight, which may lie in L2: as many programs share its channels as there is room for."""
    held = triton.next_power_of_2(rows)
    outputs = 64 if gated else 128
    tiles, steps = triton.cdiv(width, outputs), triton.cdiv(size, 64)
    splits = max(1, min(_MOST_SPLITS, steps // 2, 2 * processors // tiles))
    return Shape(held, outputs, 64, 4, 0, splits, 4)
