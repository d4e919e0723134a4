"""Both backends against the formula, in float64, over contiguous, scattered and shared blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionInput
from engine.attention.cpu import CpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 16, 16
CPU = torch.device("cpu")


def contiguous_tables(sequences: int, blocks: int) -> Tensor:
    return (torch.arange(sequences * blocks) + 1).view(sequences, blocks)


def scattered_tables(sequences: int, blocks: int) -> Tensor:
    order = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(3)) + 1
    return order.view(sequences, blocks)


def shared_prefix_tables(sequences: int, blocks: int) -> Tensor:
    """All sequences begin with the same block; the rest is each one's own and contiguous."""
    tables = contiguous_tables(sequences, blocks) + 1
    tables[:, 0] = 1
    return tables


BACKENDS: dict[str, type[CpuAttention] | type[SdpaAttention]] = {"sdpa": SdpaAttention, "cpu": CpuAttention}
TABLES = {"contiguous": contiguous_tables, "scattered": scattered_tables, "shared": shared_prefix_tables}


@dataclass
class Step:
    """Random inputs of one layer: a pool with prefixes in it, and the new rows of B sequences."""

    pool: KVPool
    batch: AttentionInput
    q: Tensor
    k: Tensor
    v: Tensor

    def attend(self, backend: str, *, sinks: Tensor | None = None, **options: Any) -> Tensor:
        attention: AttentionBackend = BACKENDS[backend](HEADS // KV_HEADS, **options)
        attention.plan(self.batch, self.pool)
        index = self.batch.index
        if index is None:
            return attention.attend(0, self.q, self.k, self.v, sinks=sinks)
        return attention.attend(0, self.q[index], self.k[index], self.v[index], sinks=sinks)


def make_step(
    tables: Tensor,
    lengths: list[int],
    size: int,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    head_dim: int = HEAD_DIM,
) -> Step:
    """`size` new rows a sequence, a tree's or a chunk's: up to 64 see themselves and some of those before."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pool = KVPool(
        num_layers=1,
        num_blocks=int(tables.max()) + 1,
        block_size=BLOCK,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        dtype=torch.float32,
        device=CPU,
    )
    pool.write(
        0, torch.arange(pool.num_blocks * BLOCK), *random(2, pool.num_blocks * BLOCK, KV_HEADS, head_dim)
    )
    cached = torch.tensor(lengths)
    row = cached[:, None] + torch.arange(size)
    rows = tables.gather(1, row // BLOCK) * BLOCK + row % BLOCK
    ancestors = None
    if size <= MAX_TREE_NODES:
        visible = (random(batch, size, size) > 0).tril() | torch.eye(size, dtype=torch.bool)
        if index is not None:
            chosen = torch.zeros(batch * size, dtype=torch.bool)
            chosen[index] = True
            visible &= chosen.view(batch, 1, size)
        ancestors = (visible.long() << torch.arange(size)).sum(-1)
    return Step(
        pool,
        AttentionInput(tables, cached, rows, max(lengths) + size, ancestors, index),
        random(batch * size, HEADS, head_dim),
        random(batch * size, KV_HEADS, head_dim),
        random(batch * size, KV_HEADS, head_dim),
    )


def expected(
    step: Step, *, window: int | None = None, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale) v for every row that is computed, one at a time. Call before `attend`."""
    batch, size = step.batch.rows.shape
    head_dim = step.q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    keys, values = step.pool.data[0].double().flatten(1, 2)
    visible = step.batch.visible()
    index = range(batch * size) if step.batch.index is None else step.batch.index.tolist()
    outputs = []
    for position in index:
        b, node = divmod(position, size)
        length = int(step.batch.lengths[b])
        depths = torch.arange(size) if step.batch.depths is None else step.batch.depths[b]
        first = 0 if window is None else length + int(depths[node]) - window + 1
        row = torch.arange(max(0, min(length, first)), length)
        prefix = step.batch.block_tables[b, row // BLOCK] * BLOCK + row % BLOCK
        seen = (visible[b, node] & (length + depths >= first)).nonzero().flatten() + b * size
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            k = torch.cat((keys[prefix, group], step.k[seen, group].double()))
            v = torch.cat((values[prefix, group], step.v[seen, group].double()))
            scores = k @ step.q[position, head].double() * scale
            sink = scores[:0] if sinks is None else sinks[head : head + 1].double()
            outputs.append(torch.cat((sink, scores)).softmax(0)[len(sink) :] @ v)
    return torch.stack(outputs).view(len(list(index)), HEADS * head_dim)


LENGTHS = {"short": [18, 21, 16, 34], "long": [300, 401, 257, 620], "mixed": [31, 290, 700, 17], "one": [530]}
"""Cached rows of each sequence; the CPU's backend takes those of up to 256 together."""

blocks = pytest.mark.parametrize("layout", TABLES)
contexts = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@blocks
@contexts
@pytest.mark.parametrize("size", [1, 2, 24, 80])
def test_every_row_is_the_formula(backend: str, layout: str, lengths: list[int], size: int) -> None:
    step = make_step(TABLES[layout](len(lengths), 50), lengths, size)
    wanted = expected(step)
    torch.testing.assert_close(step.attend(backend).double(), wanted, atol=1e-5, rtol=1e-5)


@backends
@blocks
@pytest.mark.parametrize("lengths", [[33, 40, 36], [300, 290, 400], [290, 33, 400]], ids=str)
@pytest.mark.parametrize(
    "index", [[0, 1, 2, 6, 7, 9, 12, 17], [3], [6, 11], list(range(18))], ids=["ragged", "one", "ends", "all"]
)
def test_only_the_rows_of_the_index_are_computed_and_written(
    backend: str, layout: str, lengths: list[int], index: list[int]
) -> None:
    chosen = torch.tensor(index)
    step = make_step(TABLES[layout](3, 30), lengths, 6, index=chosen)
    wanted = expected(step)
    before = step.pool.data[0].clone().flatten(1, 2)
    torch.testing.assert_close(step.attend(backend).double(), wanted, atol=1e-5, rtol=1e-5)

    written = step.batch.rows.flatten()[chosen]
    keys, values = step.pool.data[0].flatten(1, 2)
    assert torch.equal(keys[written], step.k[chosen])
    assert torch.equal(values[written], step.v[chosen])
    untouched = torch.ones(step.pool.num_blocks * BLOCK, dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(keys[untouched], before[0][untouched])
    assert torch.equal(values[untouched], before[1][untouched])


@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
@pytest.mark.parametrize("size", [1, 8])
def test_neighbours_do_not_change_a_bit_on_the_cpu(layout: str, size: int) -> None:
    """Whatever they hold, however long they are, in whatever place the sequence stands, and without them."""
    lengths = [37, 230, 22, 480, 120]
    tables = TABLES[layout](5, 50)
    together = make_step(tables, lengths, size)
    outputs = together.attend("cpu").view(5, size, -1)

    def rerun(order: list[int], loud: list[int], lengths: dict[int, int]) -> Tensor:
        """Sequences in another order or company, the inputs of `loud` ones 30 times larger."""
        other = make_step(
            tables, [lengths.get(b, n) for b, n in enumerate(together.batch.lengths.tolist())], size
        )
        other.pool.data.copy_(together.pool.data)
        scale = torch.ones(5, 1, 1, 1)
        scale[loud] = 30.0
        q, k, v = (
            (x.view(5, size, *x.shape[1:]) * scale)[order].flatten(0, 1)
            for x in (together.q, together.k, together.v)
        )
        for b in loud:
            other.pool.data[:, :, tables[b]] *= 30
        batch = other.batch
        step = Step(
            other.pool,
            AttentionInput(
                tables[order],
                batch.lengths[order],
                batch.rows[order],
                600,  # an upper bound is enough
                together.batch.ancestors[order],
            ),
            q,
            k,
            v,
        )
        return step.attend("cpu").view(len(order), size, -1)

    for company in ([2, 0, 3], [4, 1], [0], [3], [1]):
        assert torch.equal(rerun(company, [], {}), outputs[company])
    found = rerun([0, 1, 2, 3, 4], [1, 3], {1: 500, 3: 3})
    assert torch.equal(found[[0, 2, 4]], outputs[[0, 2, 4]])
    assert not torch.equal(found[[1, 3]], outputs[[1, 3]])


@backends
@pytest.mark.parametrize("head_dim", [8, 20, 80, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_any_head_size(backend: str, head_dim: int, size: int) -> None:
    """Those that are no multiple of the kernel's vectors too."""
    lengths = [31, 290, 17]
    step = make_step(scattered_tables(3, 50), lengths, size, head_dim=head_dim)
    torch.testing.assert_close(step.attend(backend).double(), expected(step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 24])
def test_scores_far_apart_and_values_that_are_not_finite_stay_in_their_sequence(size: int) -> None:
    step = make_step(scattered_tables(3, 50), [40, 290, 17], size)
    step.q.mul_(100)
    torch.testing.assert_close(step.attend("cpu").double(), expected(step), rtol=1e-4, atol=1e-4)
    step.q[size] = float("nan")
    found = step.attend("cpu").view(3, size, -1)
    assert found[1, 0].isnan().all()
    assert found[[0, 2]].isfinite().all()


@backends
@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
@contexts
@pytest.mark.parametrize(
    ("size", "index"), [(1, None), (24, [0, 1, 5, 9, 25, 26, 40, 73])], ids=["decode", "tree"]
)
def test_a_layer_with_a_window_sees_no_further_whatever_its_neighbours_do(
    backend: str, layout: str, lengths: list[int], size: int, index: list[int] | None
) -> None:
    """Windows count positions: of a tree's rows, depths. The layer asked about is the only one there is."""
    chosen = None if index is None else torch.tensor([i for i in index if i < size * len(lengths)])
    for window, windows in ((None, [None, 9]), (9, [9, 300, None]), (300, [300, 9])):
        step = make_step(TABLES[layout](len(lengths), 50), lengths, size, index=chosen)
        if size == 24:
            depths = (torch.arange(size) / 3).ceil().long().expand(len(lengths), size)
            step.batch = replace(step.batch, depths=depths)
        wanted = expected(step, window=window, scale=0.4)
        found = step.attend(backend, windows=windows, scale=0.4)
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


SINKS = torch.tensor([0.0, -3.0, 2.0, 5.0, 60.0, float("-inf")])
"""Of six heads: among their scores, some of little weight, one that leaves the keys none and one of none."""


@backends
@pytest.mark.parametrize("lengths", [[31, 290, 700, 17], [18, 0]], ids=["mixed", "short"])
@pytest.mark.parametrize(
    ("size", "index", "window", "head_dim"),
    [
        (1, None, None, 16),
        (24, [0, 1, 5, 9, 24, 25, 26], 9, 16),
        (24, None, 300, 20),
        (80, None, None, 16),
        (80, None, 40, 16),
    ],
    ids=["decode", "ragged", "tree", "chunk", "windowed chunk"],
)
def test_a_sink_takes_its_share_and_brings_no_value(
    backend: str, lengths: list[int], size: int, index: list[int] | None, window: int | None, head_dim: int
) -> None:
    chosen = None if index is None else torch.tensor(index)
    step = make_step(scattered_tables(len(lengths), 50), lengths, size, index=chosen, head_dim=head_dim)
    wanted = expected(step, window=window, sinks=SINKS)
    found = step.attend(backend, windows=None if window is None else [window], sinks=SINKS)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    assert not found.view(-1, HEADS, head_dim)[:, 4].abs().max() > 1e-20


@backends
@pytest.mark.parametrize(
    ("lengths", "size"), [([400, 30], 3), ([400, 30], 80), ([400], 3), ([30, 17], 3)], ids=str
)
def test_sinks_in_bfloat16(backend: str, lengths: list[int], size: int) -> None:
    """Long sequences and short ones, together and by themselves."""
    step = make_step(scattered_tables(len(lengths), 50), lengths, size)
    pool = KVPool(
        num_layers=1,
        num_blocks=step.pool.num_blocks,
        block_size=BLOCK,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device=CPU,
    )
    pool.data.copy_(step.pool.data)
    half = Step(pool, step.batch, *(x.bfloat16() for x in (step.q, step.k, step.v)))
    wanted = expected(half, sinks=SINKS)
    found = half.attend(backend, sinks=SINKS.bfloat16())
    assert found.dtype is torch.bfloat16
    assert (found.double() - wanted).norm() / wanted.norm() < 6e-3


@backends
def test_attend_without_a_plan_says_so(backend: str) -> None:
    step = make_step(contiguous_tables(1, 2), [3], 1)
    with pytest.raises(RuntimeError, match="plan"):
        BACKENDS[backend](HEADS // KV_HEADS).attend(0, step.q, step.k, step.v)
