"""The Triton kernels' tiles, measured once per device and model shape and kept on disk."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from engine import triton_dependent
from engine.attention import triton as backend, triton_join, triton_kernels, triton_rotary, triton_tiles
from engine.attention.base import AttentionInput, Rotary
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import (
    LEAST_ROWS,
    MOST_ROWS,
    Kind,
    Tile,
    block_channels,
    candidates,
    others,
)
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.errors import ConfigError
from engine.model import triton_kernels as model_kernels
from engine.triton_measuring import REFUSALS, Kept, milliseconds_in_graph, side_by_side

__all__ = ["ModelShape", "tuned_tiles"]

log = logging.getLogger(__name__)

_CACHED = 2048
"""Cached rows of the sequence that is measured."""

_SHORT = 512
"""Fewer of them: what concerns all that is not reading is measured with these too."""

_BOUND = 4608
"""On its length, as a captured step has it: how many parts may be, with keys or without, follows from it."""

_COLD = 512 << 20
"""Bytes of K and V that are read in turn, so that few are in the cache, as in a model of many layers."""

_MOST_LAYERS = 256
"""That share these bytes."""

_LEAST_KEYS = (64, 256, 512)
"""Of a part, beside a tile's own."""

_CHUNK = 512
"""New rows of the prefill chunk that is measured."""

_MODULES = (
    triton_kernels,
    triton_join,
    triton_rotary,
    triton_tiles,
    triton_dependent,
    backend,
    model_kernels,
)
"""The kernels' source, what a tile's fields are, and what is launched for them."""

_TRIES = 8
"""How often joining in the same kernel is held against a second kernel."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model the best tiles depend on.

    Args:
        group: query heads per K/V head.
        frequencies: of the rotation; 0: q and k come rotated.
        head_norm: each head is normed before it; norm_offset: by 1 + weight.
        sinks: each query head has one.
    """

    group: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    frequencies: int = 0
    head_norm: bool = False
    norm_offset: bool = False
    sinks: bool = False


def tuned_tiles(
    shape: ModelShape,
    device: torch.device,
    folder: Path,
    *,
    most_nodes: int = MAX_TREE_NODES,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[Kind, Tile]:
    """The fastest candidate for each kind of query rows.

    Args:
        shape: of the model.
        device: to measure on.
        folder: where results are kept; made if there is none. One that cannot be written is only logged.
        most_nodes: nodes of the largest tree.
        clock: milliseconds of a function's run; None is Triton's do_bench, and for what a graph makes cheaper
            `milliseconds_in_graph`.

    Raises:
        ConfigError: no candidate of a kind fits the device.
    """
    kinds = sorted({Kind.of(nodes * shape.group, tree=True) for nodes in range(1, most_nodes + 1)})
    kinds.append(Kind(MOST_ROWS, chunk=True))
    key = {**asdict(shape), "dtype": str(shape.dtype)}
    kept = Kept(folder, "attention", key, device, _MODULES)
    known = {Kind(*kind): Tile(*tile) for kind, tile in kept.read() or []}
    missing = [kind for kind in kinds if kind not in known]
    if missing:
        started = time.monotonic()
        step = _Step(shape, device)
        clocks = (clock or _milliseconds, clock or milliseconds_in_graph)
        known |= _measured(missing, shape, step, most_nodes, *clocks)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the K/V pool is sized by what is free
        log.info("measured the attention kernels' tiles in %.1f s", time.monotonic() - started)
        kept.write(list(known.items()))
    return known


class _Step:
    """One made-up sequence whose new rows all go to block 0, so that what is cached stays as it is.

    The layers hold the same, and each run takes the next one.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        blocks = -(-_CACHED // shape.block_size)
        layer = 2 * _CACHED * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        layers = min(_MOST_LAYERS, -(-_COLD // layer)) if device.type == "cuda" else 1
        self._pool = KVPool(
            num_layers=layers,
            num_blocks=1 + blocks,
            block_size=shape.block_size,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=device,
        )
        self._pool.data[0].normal_()
        self._pool.data[1:] = self._pool.data[0]
        self._qkv: dict[int, Tensor] = {}
        heads = shape.kv_heads * shape.group
        self._sinks = torch.zeros(heads, dtype=shape.dtype, device=device) if shape.sinks else None
        self._tables = 1 + torch.randperm(blocks, device=device).unsqueeze(0)

    def run(self, kind: Kind, tile: Tile, nodes: int, cached: int) -> Callable[[], Tensor]:
        """Attention of one layer with `nodes` new rows, the same for all tiles.

        Where a tree's queries and keys are not rotated as they are loaded, this is done before.
        """
        shape, device = self._shape, self._device
        chain = (torch.tensor(2) << torch.arange(nodes, device=device)) - 1
        attention = TritonAttention(shape.group, tiles={kind: tile})
        batch = AttentionInput(
            block_tables=self._tables,
            lengths=torch.tensor([cached], device=device),
            rows=torch.zeros(1, nodes, dtype=torch.int64, device=device),
            max_length=_BOUND,
            ancestors=None if kind.chunk else chain.unsqueeze(0),
            depths=None if kind.chunk else torch.arange(nodes, device=device).unsqueeze(0),
        )
        attention.plan(batch, self._pool)
        heads = shape.kv_heads * shape.group
        if nodes not in self._qkv:
            size = (nodes, heads + 2 * shape.kv_heads, shape.head_dim)
            self._qkv[nodes] = torch.randn(size, dtype=shape.dtype, device=device)
        q, k, v = torch.split(self._qkv[nodes], [heads, shape.kv_heads, shape.kv_heads], dim=1)
        layers, sinks = itertools.cycle(range(len(self._pool.data))), self._sinks
        if kind.chunk or not shape.frequencies:
            return lambda: attention.attend(next(layers), q, k, v, sinks=sinks)
        rotary = self._rotary(cached + nodes)
        if attention.rotates:
            return lambda: attention.attend(next(layers), q, k, v, rotary, sinks=sinks)
        # Of others, since a norm of what it has given rounds anew.
        qk, positions = self._qkv[nodes][:, : heads + shape.kv_heads].clone(), batch.positions().flatten()

        def apart() -> Tensor:
            model_kernels.rotate(qk, positions, rotary)
            return attention.attend(next(layers), q, k, v, sinks=sinks)

        return apart

    def compile(self, ways: Iterable[Callable[[], object]]) -> None:
        """Compile what these steps run, several at a time; the interpreter has nothing to compile."""
        if self._device.type == "cuda":
            driver.active.get_current_device()  # makes the driver, before threads do
            torch.cuda.synchronize(self._device)  # what these steps read early has then been written
            side_by_side(ways, lambda: torch.cuda.device(self._device))

    def _rotary(self, positions: int) -> Rotary:
        """No rotation at all, which takes as long as any."""
        shape = self._shape

        def filled(value: float, *size: int) -> Tensor:
            return torch.full(size, value, dtype=shape.dtype, device=self._device)

        channels = (shape.kv_heads * shape.group + shape.kv_heads) * shape.head_dim
        norm = filled(1.0, channels) if shape.head_norm else None
        cos, sin = (filled(value, positions, 2 * shape.frequencies) for value in (1.0, 0.0))
        return Rotary(cos, sin, norm, 1e-6, shape.norm_offset)


def _measured(
    kinds: list[Kind],
    shape: ModelShape,
    step: _Step,
    most_nodes: int,
    clock: Callable[[Callable[[], object]], float],
    in_graph: Callable[[Callable[[], object]], float],
) -> dict[Kind, Tile]:
    """The best shape of each kind, and then what else is said of a tree's tile."""
    channels = block_channels(shape.head_dim)

    def ways(kind: Kind, tile: Tile) -> list[Callable[[], Tensor]]:
        most = _CHUNK if kind.chunk else most_nodes
        # The largest kind has no upper end: the largest tree stands for it.
        nodes = most if kind.rows == MOST_ROWS else max(1, min(most, kind.rows // shape.group))
        contexts = [_CACHED] if kind.chunk else [min(_SHORT, _CACHED), _CACHED]
        return [step.run(kind, tile, nodes, cached) for cached in contexts]

    shapes = {
        kind: {tile: ways(kind, tile) for tile in candidates(kind, channels, shape.dtype.itemsize)}
        for kind in kinds
    }
    # The fewest rows run the next kind's kernels, but threads would compile them side by side.
    next_kind = Kind(LEAST_ROWS, chunk=False)
    compiled = [kind for kind in kinds if kind.rows >= LEAST_ROWS or next_kind not in kinds]
    step.compile([runs[-1] for kind in compiled for runs in shapes[kind].values()])
    # A chunk's pass is not captured.
    best = {kind: _fastest(kind, tiles, clock if kind.chunk else in_graph) for kind, tiles in shapes.items()}
    variants = {
        kind: {tile: ways(kind, tile) for tile in others(kind, best[kind], rotary=shape.frequencies > 0)}
        for kind in kinds
        if not kind.chunk
    }
    step.compile([runs[0] for tiles in variants.values() for runs in tiles.values()])
    for kind, tiles in variants.items():
        tile = _fastest_in_graph({best[kind]: ways(kind, best[kind]), **tiles}, in_graph)
        # Nothing that is compiled depends on how many parts there are.
        tries = [tile, *(tile._replace(least_keys=keys) for keys in _LEAST_KEYS)]
        tries += [one._replace(together=1) for one in tries]
        best[kind] = _fastest_in_graph({one: ways(kind, one) for one in tries}, in_graph)
    return best


def _fastest_in_graph(
    ways: Mapping[Tile, Sequence[Callable[[], Tensor]]], in_graph: Callable[[Callable[[], object]], float]
) -> Tile:
    """That whose ways take least together; the first has run before."""
    times: dict[Tile, float] = {}
    for tile, runs in ways.items():
        try:
            apart = ways.get(tile._replace(joins=False))
            if tile.joins and apart is not None and not all(map(_agree, apart, runs)):
                log.warning("attention's kernel joins its parts wrongly on this device: a second one does it")
                continue
            times[tile] = sum(map(in_graph, runs))
            log.debug("attention takes %.4f ms as %s", times[tile], tile)
        except REFUSALS as error:
            log.info("attention's kernel does not run as %s: %s", tile, str(error).splitlines()[0])
    return min(times, key=lambda tile: times[tile], default=next(iter(ways)))


def _fastest(
    kind: Kind,
    ways: Mapping[Tile, Sequence[Callable[[], object]]],
    clock: Callable[[Callable[[], object]], float],
) -> Tile:
    times: dict[Tile, float] = {}
    refused = ""
    for tile, runs in ways.items():
        try:
            times[tile] = sum(map(clock, runs))
            log.debug("attention for %s takes %.4f ms as %s", kind, times[tile], tile)
        except REFUSALS as error:
            refused = str(error).splitlines()[0]
    if not times:
        raise ConfigError(
            f"no shape of the attention kernel for {kind.rows} rows runs on this GPU ({refused}); "
            "set attention to sdpa"
        )
    return min(times, key=lambda tile: times[tile])


def _agree(by_two: Callable[[], Tensor], by_one: Callable[[], Tensor]) -> bool:
    """Whether parts joined by the last program are what a second kernel makes of them, time and again.

    On a GPU the program that is last is another each time, and reads what the others have just written.
    """
    wanted = by_two().float()
    bound = 4.0 * torch.finfo(by_one().dtype).eps * float(wanted.abs().max())
    found = torch.stack([by_one() for _ in range(_TRIES)])
    return bool((found == found[0]).all()) and bool(((found[0].float() - wanted).abs() <= bound).all())


def _milliseconds(run: Callable[[], object]) -> float:
    found: float = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    return found
