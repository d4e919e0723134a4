"""Random steps for the Triton kernels, and the formula in float64 that they are held against."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionInput, Rotary, RotatingAttention
from engine.cache.pool import KVPool
from engine.model.families import RopeConfig
from engine.model.layers import RotaryTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ERROR = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""A relative error, measured as a norm, that roundings of the dtype do not reach."""


@dataclass(frozen=True)
class Shape:
    """One case.

    Args:
        lengths: cached rows of each sequence.
        size: new rows N of each.
        tree: they are a random tree, not a chunk of a prompt.
        computed: of each sequence, how many of its N rows are computed; None for all, without an index.
        rotary: what the backend does to queries and keys: nothing (they come rotated), rotates them "whole"
            or in "part", or norms each head before that, by its weight ("norm") or 1 + weight ("offset"), or
            after it ("after").
        sinks: each head has one.
    """

    lengths: tuple[int, ...]
    size: int
    tree: bool
    computed: tuple[int, ...] | None = None
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    scale: float | None = None
    rotary: str = ""
    sinks: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shown = [f"{'tree' if self.tree else 'chunk'}{self.size}", "+".join(map(str, self.lengths))]
        if self.computed is not None:
            shown.append("of" + "+".join(map(str, self.computed)))
        shown.append(f"{self.kv_heads}x{self.group}x{self.head_dim}")
        if self.block_size != 16:
            shown.append(f"block{self.block_size}")
        if self.window is not None:
            shown.append(f"window{self.window}")
        if self.rotary:
            shown.append(self.rotary)
        if self.sinks:
            shown.append("sinks")
        if self.dtype is not torch.float32:
            shown.append(str(self.dtype).removeprefix("torch."))
        return "-".join(shown)


@dataclass
class Step:
    """What a layer is given, T rows each of q, k and v."""

    shape: Shape
    pool: KVPool
    batch: AttentionInput
    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Rotary | None = None
    sinks: Tensor | None = None

    def attend(self, backend: AttentionBackend, layer: int = 1) -> Tensor:
        backend.plan(self.batch, self.pool)
        if DEVICE.type == "cuda":  # in a pass, products part attention from whoever writes the plan
            torch.cuda.synchronize()
        plan = getattr(backend, "_plan", None)
        for parts in () if plan is None else (plan.mixed, plan.weight):
            parts.fill_(float("nan"))  # who reads more than was written shows it
        if self.rotary is not None:
            assert isinstance(backend, RotatingAttention)
            return backend.attend(layer, self.q, self.k, self.v, self.rotary, sinks=self.sinks)
        return backend.attend(layer, self.q, self.k, self.v, sinks=self.sinks)

    def options(self) -> dict[str, Any]:
        """Of a backend whose layer 1 has the window."""
        windows = None if self.shape.window is None else [None, self.shape.window]
        return {"scale": self.shape.scale, "windows": windows}


def make_step(shape: Shape, seed: int = 0) -> Step:
    """Blocks in random order; what nobody may see is NaN: rows behind each sequence, and blocks of nobody."""
    generator = torch.Generator().manual_seed(seed)
    sequences, size, block = len(shape.lengths), shape.size, shape.block_size
    per_sequence = -(-(max(shape.lengths) + size) // block)
    order = torch.randperm(sequences * per_sequence, generator=generator)
    tables = (order + 1).view(sequences, per_sequence)
    pool = KVPool(
        num_layers=2,
        num_blocks=1 + sequences * per_sequence,
        block_size=block,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        device=DEVICE,
    )
    pool.data.fill_(float("nan"))
    cached = torch.tensor(shape.lengths)
    for b, length in enumerate(shape.lengths):
        row = torch.arange(length)
        rows = tables[b, row // block] * block + row % block
        values = torch.randn(2, length, shape.kv_heads, shape.head_dim, generator=generator)
        pool.write(1, rows.to(DEVICE), *values.to(DEVICE, shape.dtype))

    row = cached[:, None] + torch.arange(size)
    rows = tables.gather(1, row // block) * block + row % block
    counts = shape.computed or (size,) * sequences
    index = torch.cat([b * size + torch.arange(count) for b, count in enumerate(counts)])
    ancestors, depths = random_trees(sequences, size, generator) if shape.tree else (None, None)
    batch = AttentionInput(
        block_tables=tables.to(DEVICE),
        lengths=cached.to(DEVICE),
        rows=rows.to(DEVICE),
        max_length=max(shape.lengths) + size,
        ancestors=None if ancestors is None else ancestors.to(DEVICE),
        index=None if shape.computed is None else index.to(DEVICE),
        depths=None if depths is None else depths.to(DEVICE),
    )
    heads = shape.kv_heads * shape.group
    qkv = torch.randn(len(index), heads + 2 * shape.kv_heads, shape.head_dim, generator=generator)
    q, k, v = qkv.to(DEVICE, shape.dtype).split([heads, shape.kv_heads, shape.kv_heads], dim=1)
    rotary = make_rotary(shape, generator)
    return Step(shape, pool, batch, q, k, v, rotary, make_sinks(shape, generator))


def make_rotary(shape: Shape, generator: torch.Generator) -> Rotary | None:
    """Tables and weights that the shape asks for."""
    if not shape.rotary:
        return None
    half = shape.head_dim // (4 if shape.rotary == "part" else 2)
    positions = max(shape.lengths) + shape.size
    table = RotaryTable(RopeConfig(torch.rand(half, generator=generator), 1.1), positions, shape.dtype)
    cos, sin = table.cos.to(DEVICE), table.sin.to(DEVICE)
    if shape.rotary not in ("norm", "offset", "after"):
        return Rotary(cos, sin)
    channels = (shape.kv_heads * shape.group + shape.kv_heads) * shape.head_dim
    weight = torch.randn(channels, generator=generator).to(DEVICE, shape.dtype)
    return Rotary(cos, sin, weight, 1e-3, shape.rotary == "offset", shape.rotary == "after")


def make_sinks(shape: Shape, generator: torch.Generator) -> Tensor | None:
    """Among the scores, the first above all of them, and the last of no weight; in the model's dtype."""
    if not shape.sinks:
        return None
    sinks = torch.randn(shape.kv_heads * shape.group, generator=generator) * 3.0
    sinks[0], sinks[-1] = 90.0, float("-inf")
    return sinks.to(DEVICE, shape.dtype)


def turned(step: Step) -> tuple[Tensor, Tensor]:
    """q and k as they enter the products: norm and rotation in float64, each rounded to the dtype."""
    if step.rotary is None:
        return step.q, step.k
    rotary, dtype = step.rotary, step.shape.dtype
    qk = torch.cat((step.q, step.k), 1).double()

    def normed(qk: Tensor, norm: Tensor) -> Tensor:
        weight = norm.double().view(1, *qk.shape[1:]) + rotary.offset
        qk = qk / (qk.square().mean(-1, keepdim=True) + rotary.eps).sqrt() * weight
        return qk.to(dtype).double()

    if rotary.norm is not None and not rotary.after:
        qk = normed(qk, rotary.norm)
    positions = step.batch.positions().flatten()
    if step.batch.index is not None:
        positions = positions[step.batch.index]
    cos, sin = (table.double()[positions].unsqueeze(1) for table in (rotary.cos, rotary.sin))
    size = cos.shape[-1]
    whole = qk[..., :size]
    qk = torch.cat((whole * cos + whole.roll(size // 2, -1) * sin, qk[..., size:]), -1).to(dtype)
    if rotary.norm is not None and rotary.after:
        qk = normed(qk.double(), rotary.norm).to(dtype)
    q, k = qk.split([step.q.shape[1], step.k.shape[1]], 1)
    return q, k


def random_trees(sequences: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks and depths [B, N] of trees in which any earlier node may be a node's parent."""
    ancestors = torch.ones(sequences, size, dtype=torch.int64)
    depths = torch.zeros(sequences, size, dtype=torch.int64)
    for b in range(sequences):
        for node in range(1, size):
            parent = int(torch.randint(max(0, node - 6), node, (), generator=generator))
            ancestors[b, node] = ancestors[b, parent] | torch.tensor(1) << node
            depths[b, node] = depths[b, parent] + 1
    return ancestors, depths


def formula(step: Step) -> Tensor:
    """softmax(q k^T * scale) v in float64, [T, heads * head_dim]. To be called before the step is run.

    A sink is a key of its own, without a value.
    """
    shape, batch = step.shape, step.batch
    scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale
    q, k, v = (x.double().cpu() for x in (*turned(step), step.v))
    pool = step.pool.data[1].double().cpu().flatten(1, 2)
    host = replace(
        batch,
        **{
            name: value.cpu()
            for name in ("block_tables", "lengths", "rows", "ancestors", "index", "depths")
            if (value := getattr(batch, name)) is not None
        },
    )
    visible, positions = host.visible(), host.positions()
    outputs, first = [], 0
    for b, length in enumerate(shape.lengths):
        count = shape.size if shape.computed is None else shape.computed[b]
        mine = slice(first, first + count)
        row = torch.arange(length)
        rows = host.block_tables[b, row // shape.block_size] * shape.block_size + row % shape.block_size
        keys = torch.cat((pool[0, rows], k[mine]))
        values = torch.cat((pool[1, rows], v[mine]))
        seen = torch.cat((torch.ones(count, length, dtype=torch.bool), visible[b, :count, :count]), 1)
        if shape.window is not None:
            at = torch.cat((row, positions[b, :count]))
            seen &= at[None, :] > positions[b, :count, None] - shape.window
        query = q[mine].view(count, shape.kv_heads, shape.group, shape.head_dim)
        scores = torch.einsum("nhgd,khd->hgnk", query, keys) * scale
        scores = scores.masked_fill(~seen, float("-inf"))
        if step.sinks is not None:
            sinks = step.sinks.double().cpu().view(shape.kv_heads, shape.group, 1, 1)
            scores = torch.cat((scores, sinks.expand(-1, -1, count, -1)), -1)
        weights = scores.softmax(-1)[..., : length + count]
        outputs.append(torch.einsum("hgnk,khd->nhgd", weights, values).flatten(1))
        first += count
    return torch.cat(outputs)


def check(step: Step, backend: AttentionBackend) -> None:
    """The output is the formula's, K/V of the computed rows are in the pool, and nothing else has changed."""
    wanted, before = formula(step), step.pool.data.clone()
    found = step.attend(backend)
    assert found.dtype == step.shape.dtype
    error = (found.double().cpu() - wanted).norm() / wanted.norm()
    assert error < ERROR[step.shape.dtype], float(error)
    rows = step.batch.rows.flatten()
    if step.batch.index is not None:
        rows = rows[step.batch.index]
    written = before.flatten(2, 3)[1]
    k = turned(step)[1].contiguous()
    if step.rotary is not None:  # rounded as float32 is, before it is rounded to the dtype
        got = step.pool.data.flatten(2, 3)[1, 0][rows]
        torch.testing.assert_close(got, k, rtol=torch.finfo(k.dtype).eps, atol=2e-6)
        k = got
    written[0].index_copy_(0, rows, k)
    written[1].index_copy_(0, rows, step.v.contiguous())
    torch.testing.assert_close(step.pool.data, before, rtol=0.0, atol=0.0, equal_nan=True)


def compile_kernels(*arguments: str, cache: Path | None = None) -> str:
    """The output of compile_triton.py in a process of its own, where Triton is not the interpreter.

    Args:
        cache: folder for what is compiled; None is Triton's own.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "tests.engine.attention.compile_triton", *arguments]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.stdout
