"""The Triton kernels against the formula in float64, on a GPU or on Triton's interpreter.

The interpreter multiplies bfloat16 as if its bits were integers, so that dtype is held against the formula on
a GPU only; `make kernels` runs many more shapes and compiles the kernels.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.attention.triton_cases import (
    DEVICE,
    ERROR,
    Shape,
    Step,
    check,
    compile_kernels,
    formula,
    make_step,
)
from tests.engine.conftest import compiles
from tests.support import greedy, make_engine, run_all, save_model, save_random_heads, tiny_model

pytest.importorskip("triton")

from triton.runtime.interpreter import interpreter_builder

from engine.attention.sdpa import SdpaAttention
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, Tile, candidates

FEW, MANY = 1, 132
"""Multiprocessors: with so few no keys are split, with so many they are wherever a test has keys enough."""

pytestmark = pytest.mark.cuda

SMALL = {
    Kind(rows, chunk): Tile(max(16, min(rows, 32)), 16, 4, 2)
    for rows in (8, 16, 32, 64, 128)
    for chunk in (False, True)
}
"""Small tiles, so that small cases have edges of all sorts."""


def backend(step: Step, processors: int = MANY, **fields: Any) -> TritonAttention:
    """With small tiles, of which some `fields` are given."""
    tiles = {kind: tile._replace(**fields) for kind, tile in SMALL.items()}
    return TritonAttention(step.shape.group, tiles=tiles, processors=processors, **step.options())


TREES = [
    Shape((5,), 1, tree=True),
    Shape((0, 129, 300), 2, tree=True, group=3, head_dim=80),
    Shape((256, 127), 8, tree=True, kv_heads=1, group=4, head_dim=96, block_size=32),
    Shape((130, 17), 33, tree=True, kv_heads=1, group=1, head_dim=256, block_size=8),
    Shape((260,), 64, tree=True, kv_heads=1, group=1, scale=0.3),
    Shape((300, 140), 1, tree=True, group=3),
    Shape((300, 270), 2, tree=True, computed=(1, 2), kv_heads=1, group=3),
    Shape((140,), 5, tree=True, kv_heads=1, group=8),
    Shape((400, 20, 0), 9, tree=True, computed=(9, 1, 4), group=3, block_size=64),
    Shape((140, 300), 8, tree=True, computed=(8, 0), kv_heads=1, head_dim=128, block_size=1),
    Shape((300, 3, 31), 20, tree=True, window=30, group=1),
    Shape((30,), 20, tree=True, window=3),
    Shape((300, 3, 31), 20, tree=True, computed=(20, 5, 1), window=200, kv_heads=1),
]
CHUNKS = [
    Shape((0,), 70, tree=False, kv_heads=1, group=3),
    Shape((130,), 40, tree=False, kv_heads=1, group=1, head_dim=80),
    Shape((37,), 1, tree=False),
    Shape((0,), 30, tree=False, kv_heads=1, group=9),
    Shape((0, 0), 40, tree=False, computed=(40, 23), kv_heads=1, group=4),
    Shape((200,), 50, tree=False, window=20, kv_heads=1),
    Shape((150,), 50, tree=False, window=120, kv_heads=1, group=3),
]


@pytest.mark.parametrize("processors", [FEW, MANY], ids=["whole", "split"])
@pytest.mark.parametrize("shape", TREES, ids=str)
def test_trees(shape: Shape, processors: int) -> None:
    step = make_step(shape)
    check(step, backend(step, processors))


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        *zip(
            [*TREES, Shape((270,), 20, tree=False, kv_heads=1)],
            cycle(["backwards", "at random"]),
            strict=False,
        )
    ],
    ids=str,
)
def test_the_last_program_joins_the_parts(shape: Shape, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever that is: the outputs have the same bits, and all counts are zero again."""
    step = make_step(shape)
    attention = backend(step, joins=True)
    if DEVICE.type == "cpu":
        run_programs(order, monkeypatch)
    check(step, attention)
    assert attention._counts is not None
    assert not attention._counts.any()
    found = make_step(shape).attend(attention)
    monkeypatch.undo()
    assert torch.equal(make_step(shape).attend(attention), found)


def run_programs(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter take a kernel's programs in another order."""
    place = interpreter_builder.set_grid_idx

    def elsewhere(x: int, y: int, z: int) -> None:
        dims = interpreter_builder.grid_dim
        count = dims[0] * dims[1] * dims[2]
        number = (x * dims[1] + y) * dims[2] + z
        if order == "backwards":
            number = count - 1 - number
        elif order == "at random":
            number = random.Random(count).sample(range(count), count)[number]
        place(number // (dims[1] * dims[2]), number // dims[2] % dims[1], number % dims[2])

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", elsewhere)


ROTATED = [
    Shape((140, 3), 1, tree=True, kv_heads=1, group=3, rotary="whole"),
    Shape((130,), 33, tree=True, kv_heads=1, group=1, rotary="part"),
    Shape((140, 20), 9, tree=True, computed=(9, 4), head_dim=80, rotary="norm"),
    Shape((30, 160), 8, tree=True, computed=(0, 8), kv_heads=1, head_dim=96, rotary="part"),
    Shape((300, 0), 20, tree=True, window=30, kv_heads=1, group=4, rotary="offset"),
    Shape((140,), 6, tree=True, rotary="whole", dtype=torch.float16),
    Shape((37,), 20, tree=False, kv_heads=1, rotary="norm"),
    Shape((37, 130), 9, tree=True, head_dim=80, rotary="after"),
    Shape((140,), 6, tree=True, computed=(4,), rotary="after", dtype=torch.float16),
]


@pytest.mark.parametrize("processors", [FEW, MANY], ids=["whole", "split"])
@pytest.mark.parametrize("shape", ROTATED, ids=str)
def test_queries_and_keys_are_rotated_as_they_are_loaded(shape: Shape, processors: int) -> None:
    step = make_step(shape)
    before = [x.clone() for x in (step.q, step.k, step.v)]
    check(step, backend(step, processors))
    for x, was in zip((step.q, step.k, step.v), before, strict=True):
        assert torch.equal(x, was)


SINKS = [
    Shape((0, 129, 300), 2, tree=True, group=3, sinks=True),
    Shape((300, 3, 31), 20, tree=True, computed=(20, 5, 1), window=200, kv_heads=1, sinks=True),
    Shape((30, 270), 20, tree=True, window=3, kv_heads=1, group=4, rotary="whole", sinks=True),
    Shape((140,), 6, tree=True, group=8, kv_heads=1, sinks=True, dtype=torch.float16),
    Shape((200, 0), 50, tree=False, computed=(20, 50), window=20, kv_heads=1, sinks=True),
    Shape((270,), 20, tree=False, group=4, sinks=True),
]


@pytest.mark.parametrize(
    ("processors", "joins"), [(FEW, False), (MANY, False), (MANY, True)], ids=["whole", "split", "joined"]
)
@pytest.mark.parametrize("shape", SINKS, ids=str)
def test_a_sink_is_counted_once_however_keys_are_split(shape: Shape, processors: int, joins: bool) -> None:
    step = make_step(shape)
    check(step, backend(step, processors, joins=joins))


@pytest.mark.parametrize(
    ("shape", "rotates"),
    [
        (Shape((3,), 4, tree=True), True),
        (Shape((3,), 4, tree=False), False),
        (Shape((3,), 64, tree=True, head_dim=128), True),
        (Shape((3,), 16, tree=True, head_dim=256), True),
        (Shape((3,), 64, tree=True, head_dim=256), False),
        (Shape((3,), 64, tree=False, head_dim=64, group=4), False),
    ],
    ids=str,
)
def test_it_rotates_in_trees_where_registers_are_enough(shape: Shape, rotates: bool) -> None:
    step = make_step(replace(shape, dtype=torch.float16))
    attention = TritonAttention(shape.group, processors=FEW)
    assert not attention.rotates
    attention.plan(step.batch, step.pool)
    assert attention.rotates == rotates


def test_a_tile_may_have_queries_and_keys_rotated_before() -> None:
    """Then all of a tree's nodes are one tile of keys; they are few where they pass through registers."""
    step = make_step(Shape((140,), 64, tree=True, kv_heads=1, group=1))
    wide = {Kind(64, chunk=False): Tile(64, 64, 4, 2)}
    for rotates, nodes in ((True, 32), (False, 64)):
        tiles = {kind: tile._replace(rotates=rotates) for kind, tile in wide.items()}
        attention = TritonAttention(1, tiles=tiles, processors=MANY)
        check(make_step(step.shape), attention)
        assert attention.rotates == rotates
        assert attention._plan is not None
        assert attention._plan.new_keys == nodes


@pytest.mark.parametrize("shape", CHUNKS, ids=str)
def test_chunks_of_a_prompt(shape: Shape) -> None:
    step = make_step(shape)
    check(step, backend(step, FEW))


@pytest.mark.parametrize(
    "shape",
    [
        Shape((270,), 20, tree=False, kv_heads=1),
        Shape((270, 0, 140), 20, tree=False, computed=(3, 20, 0), kv_heads=1, group=3),
        Shape((270, 0), 20, tree=False, computed=(20, 3), kv_heads=1, window=200),
    ],
    ids=str,
)
@pytest.mark.parametrize("joins", [False, True])
def test_chunks_whose_prefix_is_split(shape: Shape, joins: bool) -> None:
    """Of one sequence, or of several that differ in length."""
    step = make_step(shape)
    check(step, backend(step, joins=joins))


@pytest.mark.parametrize(
    ("least", "window", "filled"),
    [(64, None, (5, 3, 0)), (128, None, (3, 2, 0)), (256, None, (2, 0, 0)), (300, None, (0, 0, 0)),
     (64, 200, (4, 3, 0))],
)  # fmt: skip
@pytest.mark.parametrize("joins", [False, True])
def test_a_part_has_its_least_keys_and_one_alone_is_not_joined(
    least: int, window: int | None, filled: tuple[int, ...], joins: bool
) -> None:
    """Cached keys of the window begin at a tile of 16 of them."""
    step = make_step(Shape((300, 130, 64), 3, tree=True, kv_heads=1, window=window))
    step.batch = replace(step.batch, max_length=5000)
    attention = backend(step, least_keys=least, joins=joins)
    check(step, attention)
    assert attention._plan is not None
    assert attention._plan.parts[window] > max(filled)
    weight = attention._plan.weight.fill_(float("nan"))
    attention.attend(1, step.q, step.k, step.v)
    wanted = torch.tensor([parts + (parts > 0) for parts in filled]).repeat_interleave(3)  # the new rows' too
    assert torch.equal((~weight.isnan()).sum(0).cpu(), wanted[:, None].expand(-1, 2))


def test_short_contexts_have_no_parts_that_nobody_fills() -> None:
    """As far as the bound on lengths says."""
    step = make_step(Shape((300,), 3, tree=True, kv_heads=1))
    attention = backend(step, least_keys=64)
    attention.plan(step.batch, step.pool)
    assert attention._plan is not None
    assert attention._plan.parts == {None: 6}  # and the new rows'


def test_keys_are_split_until_each_multiprocessor_has_its_programs() -> None:
    step = make_step(Shape((300,), 3, tree=True, kv_heads=2))
    for together, parts in ((2, 8), (1, 4)):
        attention = backend(step, 8, least_keys=16, together=together)
        check(step, attention)
        assert attention._plan is not None
        assert attention._plan.parts == {None: parts + 1}  # and the new rows'


@pytest.mark.parametrize(("shape", "processors"), [
    (Shape((300,), 33, tree=True, kv_heads=1, group=3), 8),
    (Shape((300, 20, 140), 5, tree=True, computed=(5, 1, 3), group=2, head_dim=96), 8),
    (Shape((300, 20, 140), 5, tree=True, computed=(5, 1, 3), kv_heads=1, group=3), 6),
])  # fmt: skip
def test_the_second_kernel_joins_several_rows_where_there_are_many(shape: Shape, processors: int) -> None:
    """Not a multiple of them, some of which have nothing to join."""
    step = make_step(shape)
    attention = backend(step, processors)
    check(step, attention)
    assert attention._plan is not None
    rows = attention._plan.weight[0].numel()
    assert rows > 4 * processors
    assert rows % 4 != 0 or shape.computed is not None


def test_a_tile_may_be_longer_than_a_mask() -> None:
    step = make_step(Shape((20,), 64, tree=True, kv_heads=1, group=1))
    check(step, TritonAttention(1, tiles={Kind(64, False): Tile(64, 128, 4, 2)}, processors=FEW))


HALVES = [torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "shape", [Shape((140, 20), 8, tree=True), Shape((40,), 30, tree=False, kv_heads=1)], ids=str
)
def test_sixteen_bits(shape: Shape, dtype: torch.dtype) -> None:
    step = make_step(replace(shape, dtype=dtype))
    check(step, TritonAttention(2, processors=MANY))


def test_the_bound_on_lengths_changes_how_keys_are_split_and_nothing_else() -> None:
    """A captured step has the largest bound; parts without keys are skipped, whatever lies in memory."""
    step = make_step(Shape((140, 0, 33), 3, tree=True, kv_heads=1))
    wanted = formula(step)
    for bound, processors in ((300, 12), (5000, 12), (100_000, 30)):
        step.batch = replace(step.batch, max_length=bound)
        found = step.attend(backend(step, processors)).double().cpu()
        assert (found - wanted).norm() / wanted.norm() < ERROR[torch.float32]


@pytest.mark.parametrize("processors", [FEW, MANY], ids=["whole", "split"])
def test_invalid_nodes_of_a_captured_step_disturb_nobody(processors: int) -> None:
    """Its grid has no index: invalid nodes are computed too, see themselves, and all go to block 0."""
    size, counts = 6, (4, 1)
    step = make_step(Shape((50, 140), size, tree=True, computed=counts))
    wanted = formula(step)
    index, ancestors = step.batch.index, step.batch.ancestors
    assert index is not None
    assert ancestors is not None
    column = torch.arange(size, device=DEVICE)
    valid = column < torch.tensor(counts, device=DEVICE)[:, None]
    for name in ("q", "k", "v"):
        rows = getattr(step, name)
        grid = rows.new_full((2 * size, *rows.shape[1:]), 1e4)
        grid[index] = rows
        setattr(step, name, grid)
    step.batch = replace(
        step.batch,
        index=None,
        ancestors=torch.where(valid, ancestors, torch.ones_like(column) << column),
        rows=step.batch.rows.masked_fill(~valid, 0),
    )
    before = step.pool.data.clone()
    found = step.attend(backend(step, processors))[index].double().cpu()
    assert (found - wanted).norm() / wanted.norm() < ERROR[torch.float32]
    written = step.batch.rows.flatten()[index]
    keys, old = (data[1, 0].flatten(0, 1) for data in (step.pool.data, before))
    old[written] = step.k[index]
    torch.testing.assert_close(keys[1 * 16 :], old[1 * 16 :], rtol=0.0, atol=0.0, equal_nan=True)


def test_masks_of_one_topology_for_a_whole_batch_need_no_copy() -> None:
    step = make_step(Shape((30, 9, 21), 5, tree=True, window=12))
    assert step.batch.ancestors is not None
    assert step.batch.depths is not None
    one = {name: getattr(step.batch, name)[:1] for name in ("ancestors", "depths")}
    step.batch = replace(step.batch, **{name: value.expand(3, -1) for name, value in one.items()})
    assert step.batch.ancestors.stride(0) == 0
    check(step, backend(step))


def test_heads_that_do_not_lie_in_a_row_are_copied() -> None:
    step = make_step(Shape((30,), 5, tree=True))
    step.q, step.k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (step.q, step.k))
    check(step, backend(step))


def test_layers_differ_in_window_only_where_it_binds() -> None:
    step = make_step(Shape((300,), 3, tree=True, window=40))
    attention = TritonAttention(2, windows=[None, 40], processors=MANY)
    attention.plan(step.batch, step.pool)
    step.pool.data[0] = step.pool.data[1]
    wide, narrow = (attention.attend(layer, step.q, step.k, step.v) for layer in (0, 1))
    reference = SdpaAttention(2)
    step.pool.data.nan_to_num_()
    wanted = step.attend(reference)
    torch.testing.assert_close(wide, wanted, atol=1e-5, rtol=1e-5)
    assert (narrow - wanted).norm() > 0.1 * wanted.norm()


def test_attend_without_a_plan_says_so() -> None:
    step = make_step(Shape((3,), 1, tree=True))
    with pytest.raises(RuntimeError, match="plan"):
        TritonAttention(2).attend(0, step.q, step.k, step.v)


def test_kinds_cover_every_number_of_rows() -> None:
    assert [Kind.of(rows, tree=True).rows for rows in (1, 8, 9, 16, 17, 64, 65, 512)] == [
        8, 8, 16, 16, 32, 64, 128, 128,
    ]  # fmt: skip
    assert Kind.of_prompts() == [*(Kind(rows, chunk=False) for rows in (16, 32, 64)), Kind(128, chunk=True)]
    for rows in (1, 16, 17, 64, 65, 999):
        assert Kind.of(rows, tree=False) in Kind.of_prompts()
    assert Kind.of(64, tree=False) == Kind.of(64, tree=True)
    assert Kind.of(65, tree=False) == Kind(128, chunk=True)
    for kind in (Kind(8, False), Kind(16, False), Kind(64, False), Kind(128, False), Kind(128, True)):
        for channels in (64, 128, 256):
            tiles = candidates(kind, channels, 2)
            assert len(set(tiles)) == len(tiles)
            # A large tree may come in several tiles, so that more programs share it.
            assert ({16, 32} <= {tile.rows for tile in tiles}) == (kind.rows > 32 and not kind.chunk)
            assert all(tile.stages * 2 * 2 * tile.keys * channels <= 160 << 10 for tile in tiles)


def test_a_whole_model_decodes_as_with_torchs_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy with heads and lookup, two prompts in one batch, one of them in two chunks."""
    model = tiny_model("gemma3_text", sliding_window=32)
    folder = save_model(model, tmp_path)
    heads = save_random_heads(tmp_path / "heads.safetensors", hidden=32, vocab=61, own_lm_head=False)
    settings = {"heads": str(heads), "tree": 8, "lookup": 2, "device": DEVICE.type, "max_step_tokens": 64}
    settings["kv_cache_tokens"] = 4096  # other tests run on the same GPU beside it
    requests = [greedy("short", [5, 9, 33], 9), greedy("long", [i % 50 for i in range(70)], 9)]
    wanted = run_all(make_engine(folder, attention="sdpa", **settings), requests)

    def triton_attention(config, model, dtype, device, windows, tree_size):
        return TritonAttention(model.group, scale=model.attention_scale, windows=windows, processors=FEW)

    monkeypatch.setattr("engine.loader._attention", triton_attention)
    found = run_all(make_engine(folder, **settings), requests)
    assert found == wanted


@compiles
def test_the_kernels_compile_for_a_gpu_without_spills(tmp_path: Path) -> None:
    """In bfloat16, for compute capability 9.0, which need not be at hand."""
    kernels = [json.loads(line) for line in compile_kernels("90", cache=tmp_path).splitlines()]
    names = [kernel["kernel"] for kernel in kernels]
    split = ["attend_kernel", "join_kernel"] * 2
    assert names == [*split, "attend_kernel", *split, *["attend_kernel"] * 7]
    assert [kernel["spilled"] for kernel in kernels[:5]] == [0] * 5
    # With few channels Triton keeps a number or two in memory though registers are free.
    assert all(kernel["spilled"] <= 8 for kernel in kernels)
