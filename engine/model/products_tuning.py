"""Which products of few rows take in what is around them, measured once per device and model shape."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from engine import triton_dependent
from engine.attention.base import AttentionBackend, AttentionInput, NoAttention, RotatingAttention
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.model import fused_triton, product_shapes, triton_kernels, triton_products, triton_streamed
from engine.model.fused_triton import FusedLayers, Ways
from engine.model.product_shapes import MOST_ROWS, SHARED, Shape, shapes
from engine.triton_dependent import launched_early
from engine.triton_measuring import REFUSALS, Kept, milliseconds_in_graph, side_by_side

__all__ = ["ROWS", "tune_products"]

log = logging.getLogger(__name__)

_MODULES = (
    triton_kernels,
    triton_products,
    triton_streamed,
    product_shapes,
    triton_dependent,
    fused_triton,
)
"""The kernels' source, and what runs them."""

ROWS = (1, 8, 16, 32, MOST_ROWS, 256)
"""Steps of up to so many rows share their ways, and are measured by the largest of them."""

_AHEAD = (8 << 20, 24 << 20)
"""Bytes to ask for ahead that are tried, beside none."""

_DURING = (8 << 20, 16 << 20, 32 << 20)
"""Bytes that attention asks for that are tried, beside none; an H100's L2 has 50 MiB."""

_CACHED = 512
"""Rows in the cache of attention."""

_BOUND = 4608
"""On a sequence's length, as a captured step has it."""

_BLOCK_SIZE = 16

_LAYERS = 12
"""Layers that are measured: enough that their weights, or most of them, come from memory each time."""


def tune_products(
    layers: FusedLayers,
    folder: Path,
    attention: AttentionBackend | None = None,
    *,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> None:
    """Set `layers.ways`; nothing where the weights are not of 16 bits or the family's norms lie elsewhere.

    Each product that all layers have (with experts those around attention) is tried as each of its kernel's
    shapes and as torch's, in a pass without attention, with the others as good as known so far. What
    attention asks for ahead is tried in a pass with it.

    Args:
        folder: where results are kept.
        attention: a `RotatingAttention`; what others could ask for is not measured.
        clock: milliseconds of a function's run; None is `milliseconds_in_graph`.
    """
    linear = layers.layers[0].qkv_proj
    if linear.weight.element_size() != 2 or not layers.joinable:
        return
    device, first = linear.weight.device, layers.layers[0]
    key: dict[str, object] = {
        "products": [[*each.weight.shape, each.bias is not None] for each in layers.common],
        "layers": len(layers.layers),
        "dtype": str(linear.weight.dtype),
        "rows": list(ROWS),
        "attention": isinstance(attention, RotatingAttention) and [first.num_kv_heads, first.head_dim],
    }
    kept = Kept(folder, "products", key, device, _MODULES)
    known = kept.read()
    if known is None:
        started = time.monotonic()
        clock = clock or milliseconds_in_graph
        measured = {rows: _best(layers, rows, clock) for rows in ROWS}
        if isinstance(attention, RotatingAttention) and launched_early(device)[0]:
            for rows, ways in measured.items():
                measured[rows] = _asking(layers.some(_LAYERS), rows, ways, attention, clock)
        known = list(measured.items())
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the K/V pool is sized by what is free
        log.info("measured the products of few rows in %.1f s", time.monotonic() - started)
        kept.write(known)
    layers.ways = {
        rows: Ways._make([*(None if shape is None else Shape(*shape) for shape in found), ahead, during])
        for rows, (*found, ahead, during) in known
    }


@torch.inference_mode()
def _best(layers: FusedLayers, rows: int, clock: Callable[[Callable[[], object]], float]) -> Ways:
    first = layers.layers[0]
    device = first.qkv_proj.weight.device
    linears = dict(zip(Ways._fields, layers.common, strict=False))
    properties = torch.cuda.get_device_properties(device)
    processors = properties.multi_processor_count
    shared = getattr(properties, "shared_memory_per_multiprocessor", SHARED)  # not in every torch
    choices: dict[str, list[Shape]] = {}
    for name, linear in linears.items():
        width = len(linear.weight) // (2 if name == "gate_up" else 1)
        choices[name] = shapes(rows, linear.in_features, width, name == "gate_up", processors, shared)
    tokens = torch.arange(rows, device=device) % 7
    mixed = torch.randn(rows, first.o_proj.in_features, device=device).to(first.o_proj.weight.dtype)
    attention = NoAttention(mixed)

    def run(some: FusedLayers, ways: Ways) -> None:
        some.ways = {rows: ways}
        some(tokens, tokens, attention)

    here = partial(torch.cuda.device, device) if device.type == "cuda" else nullcontext
    if first.experts is not None:  # its kernels are compiled once, not by each of the threads
        side_by_side([partial(run, layers.some(1), Ways())], here)
    alone = [_with(Ways(), name, shape) for name, found in choices.items() for shape in found]
    side_by_side([partial(run, layers.some(1), ways) for ways in alone], here)
    measured = layers.some(_LAYERS)

    def timed(ways: Ways) -> float:
        try:
            found = clock(partial(run, measured, ways))
        except REFUSALS:
            return math.inf
        log.debug("%d rows: %.4f ms with %s", rows, found, ways)
        return found

    # A product of ours gains most between two others of ours, which begin early: so from all of them.
    best = Ways()
    for name, possible in choices.items():
        best = _with(best, name, possible[0] if possible else None)
    by_torch = timed(Ways())
    if (time_of_best := timed(best)) == math.inf:  # one of them does not run on this device
        best, time_of_best = Ways(), by_torch
    for name in ("gate_up", "down", "qkv", "o"):  # the largest first
        for shape in (*choices[name], None) if name in choices else ():
            trial = _with(best, name, shape)
            if trial != best and (found := timed(trial)) < time_of_best:
                best, time_of_best = trial, found
    if by_torch <= time_of_best:
        best, time_of_best = Ways(), by_torch
    if any(getattr(best, name) is None for name in choices):
        for ahead in _AHEAD:
            trial = best._replace(ahead=ahead)
            if (found := timed(trial)) < time_of_best:
                best, time_of_best = trial, found
    text = "%d rows: a pass of %d layers takes %.4f ms, %.4f with torch's products: %s"
    log.info(text, rows, len(measured.layers), time_of_best, by_torch, best)
    return best


@torch.inference_mode()
def _asking(
    layers: FusedLayers,
    rows: int,
    ways: Ways,
    attention: RotatingAttention,
    clock: Callable[[Callable[[], object]], float],
) -> Ways:
    """These ways, and how much attention shall ask for: of sequences with trees as large as there are."""
    first, device = layers.layers[0], layers.layers[0].qkv_proj.weight.device
    nodes = min(rows, MAX_TREE_NODES)
    cached = max(0, min(_CACHED, layers.positions - nodes))
    blocks = -(-(cached + nodes) // _BLOCK_SIZE)
    pool = KVPool(
        num_layers=len(layers.layers),
        num_blocks=1 + blocks,
        block_size=_BLOCK_SIZE,
        kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        dtype=first.qkv_proj.weight.dtype,
        device=device,
    )
    depths = torch.arange(nodes, device=device).expand(rows // nodes, -1)
    batch = AttentionInput(
        block_tables=torch.arange(1, 1 + blocks, device=device).expand(rows // nodes, -1),
        lengths=torch.full((rows // nodes,), cached, device=device),
        rows=torch.zeros_like(depths),  # of block 0, where nobody looks
        max_length=max(_BOUND, cached + nodes),
        ancestors=(torch.tensor(2, device=device) << depths) - 1,
        depths=depths.contiguous(),
    )
    attention.plan(batch, pool)
    positions = batch.positions().flatten()
    tokens = positions % 7

    def run(during: int) -> None:
        layers.ways = {rows: ways._replace(during=during)}
        layers(tokens, positions, attention)

    times = {during: clock(partial(run, during)) for during in (0, *_DURING)}
    best = min(times, key=lambda during: times[during])
    log.info("%d rows with attention: %s ms by the bytes that it asks for: %d", rows, times, best)
    return ways._replace(during=best)


def _with(ways: Ways, name: str, shape: Shape | None) -> Ways:
    return Ways._make(
        shape if field == name else value for field, value in zip(ways._fields, ways, strict=True)
    )
