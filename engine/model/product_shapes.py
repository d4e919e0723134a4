"""Which shapes the kernels of products of few rows may have."""

from __future__ import annotations

from typing import NamedTuple

import triton

__all__ = ["MOST_ROWS", "MOST_TILES", "Around", "Shape", "shapes"]

MOST_ROWS = 64
"""More of them are torch's."""

_MOST_HELD = 768
"""Numbers that a thread may hold of its tiles; more spill."""

_AHEAD = 12 << 20
"""Bytes of weights between a program's and those it asks for: about what is under way at a time."""

_LONGEST = 2048
"""Channels that a program of several rows holds at once; of more, weights stream through shared memory."""

_RUN = 4
"""Lines of 128 bytes of an output's weights that are asked for at once where tiles take single ones."""

_SHARED = 216 << 10
"""Bytes of shared memory that programs of one multiprocessor may take together."""

_MOST_SPLITS = 8
"""Programs that share the channels of a tile of outputs."""

_BEGINNING = 384
"""Channels in whose time a program begins and ends: what each split costs."""

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
        run: of a weight that streams in tiles of 64 channels: lines of 128 bytes of the same output that are
            asked for at once; 0: its tiles come as they are.
        fewer: outputs of such a tile that are another program's.
    """

    rows: int
    outputs: int
    channels: int
    warps: int
    ahead: int = 0
    splits: int = 0
    stages: int = 0
    run: int = 0
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
        """Of 128 bytes of an output's weights that stream, asked for before the kernel waits: where two
        programs share a multiprocessor, half as many each."""
        return 4 if self.channels == 64 and not self.run else 8


def shapes(rows: int, size: int, width: int, gated: bool, processors: int) -> list[Shape]:
    """Those worth measuring, the best guess first; none where torch's product is as good.

    Args:
        rows: of the input; size: channels of each.
        width: outputs of each.
        gated: the product has two weights of these outputs.
        processors: multiprocessors of the device.
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
        return _streamed(rows, size, width, gated, processors)
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
        found += _streamed(rows, size, width, gated, processors)[-1:]  # small weights may lie in L2
    return found


_STREAMS = (
    # Weights' rows and channels of a tile, warps, programs that run together, lines of a run.
    (128, 64, 4, 1, _RUN),
    (128, 256, 8, 1, 0),
    (128, 128, 4, 1, 0),
    (64, 256, 4, 1, 0),
    (128, 64, 4, 2, 0),
)
"""Torch's kernels take 128 bytes of each of many rows, and that at three quarters of memory's rate. If longer
runs are faster, a tile has many channels, which leaves room for few, or its next lines come to L2 in runs."""


def _streamed(rows: int, size: int, width: int, gated: bool, processors: int) -> list[Shape]:
    two = 2 if gated else 1
    held = max(16, triton.next_power_of_2(rows))
    found: list[Shape] = []
    for height, channels, warps, together, run in _STREAMS:
        outputs = height // two
        tiles, steps = triton.cdiv(width, outputs), triton.cdiv(size, channels)
        stages = min(_SHARED // together // ((height + held) * channels * 2), 8)
        if outputs < 64 or stages < 2 or tiles > MOST_TILES:
            continue  # a Hopper's tensor cores take no fewer outputs at their full rate
        by_time = sorted(
            range(1, min(_MOST_SPLITS, steps) + 1),
            key=lambda splits: _turns(tiles * splits, -(-steps // splits) * channels, processors, together),
        )
        # What memory's rate makes of it is not known: the fewest, which add nothing up, are tried as well.
        for splits in (by_time[0], 1) if not found else by_time[:1]:
            # Lines in runs come from L2, which takes a third of the time: few tiles are under way then.
            shape = Shape(held, outputs, channels, warps, 0, splits, min(stages, 4) if run else stages, run)
            if shape not in found:
                found.append(shape)
    return found + _in_one_wave(held, width, gated, processors)


_WAVES = (
    # Channels of a tile, lines of a run.
    (64, _RUN),
    (64, 2 * _RUN),
    (128, 0),
)


def _in_one_wave(held: int, width: int, gated: bool, processors: int) -> list[Shape]:
    """As many outputs a program as let all multiprocessors end together, without sharing any. Each reads the
    input: with few outputs a program that would be most of what is read."""
    waves = triton.cdiv(width, 128 * processors)
    height = 4 * triton.cdiv(width, 4 * processors * waves)
    outputs, found = max(64, triton.next_power_of_2(height)), []
    if height < 48:
        return []
    for channels, run in _WAVES:
        tile = ((2 if gated else 1) * outputs + held) * channels * 2
        stages, warps = min(_SHARED // tile, 8), 8 if gated and outputs > 64 else 4
        if stages >= 2:
            shape = Shape(held, outputs, channels, warps, 0, 1, stages, run, outputs - height)
            found.append(shape)
    return found


def _turns(programs: int, channels: int, processors: int, together: int) -> int:
    """Channels of a tile that the busiest multiprocessor loads one after the other.

    Args:
        programs: of the grid; channels: of each.
        together: programs that a multiprocessor runs at a time.
    """
    waves, rest = divmod(programs, processors * together)
    return (waves * together + -(-rest // processors)) * (channels + _BEGINNING)
