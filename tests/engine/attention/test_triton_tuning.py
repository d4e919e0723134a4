"""How tiles are chosen: the fastest that runs, once."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from engine import triton_dependent, triton_measuring
from engine.attention import triton as backend, triton_join, triton_tiles, triton_tuning
from engine.attention.base import AttentionInput
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, Tile, candidates
from engine.attention.triton_tuning import ModelShape, tuned_tiles
from engine.cache.pool import KVPool
from engine.errors import ConfigError
from engine.triton_measuring import side_by_side
from tests.engine.attention.triton_cases import DEVICE

SHAPE = ModelShape(group=4, kv_heads=1, head_dim=64, block_size=16, dtype=torch.float16)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's stands for a GPU where there is none, and contexts are as short as are split."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(triton_tuning, "_SHORT", 130)
    monkeypatch.setattr(triton_tuning, "_CACHED", 200)
    monkeypatch.setattr(triton_tuning, "_CHUNK", 140)
    properties = SimpleNamespace(name="interpreter", multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles of all steps that were made to be measured, none of which runs."""
    monkeypatch.setattr(triton_tuning, "_agree", lambda by_two, by_one: True)
    tiles: list[Tile] = []
    plan = TritonAttention.plan

    def note(self: TritonAttention, *args: object) -> None:
        plan(self, *args)  # type: ignore[arg-type]
        assert self._plan is not None
        tiles.append(self._plan.tile)

    monkeypatch.setattr(TritonAttention, "plan", note)
    return tiles


def slowest_first() -> Callable[[Callable[[], object]], float]:
    """A clock by which each candidate is faster than the one before."""
    calls = iter(range(1000, 0, -1))
    return lambda run: float(next(calls))


TREES = [Kind(rows, chunk=False) for rows in (8, 16, 32, 64, 128)]
CHUNK = Kind(128, chunk=True)


def last_of_all(kind: Kind) -> Tile:
    """What `slowest_first` chooses."""
    tile = candidates(kind, 64, 2)[-1]
    return tile if kind.chunk else tile._replace(joins=tile.rows <= 32, least_keys=512, together=1)


def tries(kind: Kind, best: Tile) -> list[Tile]:
    """Of a tree's best shape."""
    apart = best._replace(rotates=False)
    joined = [tile._replace(joins=True) for tile in (best, apart)]
    return [apart, *joined] if best.rows <= 32 else [apart]


def test_the_fastest_is_taken_and_kept_on_disk(tmp_path: Path, measured: list[Tile]) -> None:
    """The shape, then who rotates and who joins, then how many parts there are: each with two contexts."""
    shape = replace(SHAPE, group=1, frequencies=32)
    tiles = tuned_tiles(shape, DEVICE, tmp_path / "new", clock=slowest_first())
    kinds = [*TREES[:4], CHUNK]
    last = {kind: last_of_all(kind) for kind in kinds}
    assert tiles == {kind: tile._replace(rotates=False) for kind, tile in last.items()}
    best = {kind: candidates(kind, 64, 2)[-1] for kind in kinds}
    wanted = [
        tile for kind in kinds for tile in candidates(kind, 64, 2) for _ in ([1] if kind.chunk else [1, 2])
    ]
    wanted += [tile for kind in TREES[:4] for tile in tries(kind, best[kind]) for _ in range(2)]
    for kind in TREES[:4]:
        chosen = tries(kind, best[kind])[-1]
        keys = [chosen._replace(least_keys=keys) for keys in (128, 64, 256, 512)]
        parts = [*keys, *(tile._replace(together=1) for tile in keys)]
        wanted += [tile for tile in (best[kind], *parts) for _ in range(2)]
    assert measured == wanted
    measured.clear()
    assert tuned_tiles(shape, DEVICE, tmp_path / "new", clock=slowest_first()) == tiles
    assert not measured
    (file,) = (tmp_path / "new").iterdir()
    assert json.loads(file.read_text())["device"] == torch.cuda.get_device_properties(DEVICE).name


@pytest.mark.parametrize(
    "changed", [triton_tiles, triton_join, triton_dependent, backend], ids=lambda module: module.__name__
)
def test_files_of_other_kernels_or_another_way_to_launch_them_are_not_read(
    changed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[Tile]
) -> None:
    tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    source = triton_measuring._source
    monkeypatch.setattr(
        triton_measuring, "_source", lambda module: source(module) + b"#" * (module is changed)
    )
    measured.clear()
    tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    assert measured
    assert len(list(tmp_path.iterdir())) == 2


ALONE = candidates(Kind(8, chunk=False), 64, 2)[0]


@pytest.mark.parametrize(
    ("joined", "keys", "wanted"),
    [
        ((5.0, 5.0), ((2.0, 9.0), (5.0, 5.0)), ALONE._replace(joins=True, least_keys=64)),
        ((9.0, 3.0), ((2.0, 9.0), (1.0, 11.0)), ALONE),
    ],
    ids=["the second time", "neither time"],
)
def test_both_contexts_decide_together(
    joined: tuple[float, float],
    keys: tuple[tuple[float, float], tuple[float, float]],
    wanted: Tile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Milliseconds with few cached rows and with many: 2 and 9 of the best shape; joined; 128 and 64 keys."""
    contexts: set[tuple[int, int]] = set()
    plan = TritonAttention.plan

    def note(self: TritonAttention, batch: AttentionInput, pool: KVPool) -> None:
        plan(self, batch, pool)
        contexts.add((int(batch.lengths), batch.max_length))

    monkeypatch.setattr(TritonAttention, "plan", note)
    shapes = [3.0, 2.0, 1.0, 5.0, 5.0, 5.0] + [1.0] * len(candidates(CHUNK, 64, 2))
    longer = [9.0] * 12
    times = iter([*shapes, 2.0, 9.0, *joined, *(time for both in keys for time in both), *longer])
    found = tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=lambda run: next(times))
    assert found[Kind(8, chunk=False)] == wanted
    assert next(times, None) is None
    assert contexts == {(triton_tuning._SHORT, 4608), (triton_tuning._CACHED, 4608)}


def test_what_rotates_apart_is_measured_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[Tensor] = []
    monkeypatch.setattr(triton_tuning.model_kernels, "rotate", lambda qk, at, rotary: positions.append(at))
    monkeypatch.setattr(triton_tuning, "_agree", lambda by_two, by_one: True)
    counts: list[int] = []

    def clock(run: Callable[[], object]) -> float:
        before = len(positions)
        run()
        counts.append(len(positions) - before)
        return 1.0

    shape = replace(SHAPE, frequencies=32)
    tuned_tiles(shape, DEVICE, tmp_path, most_nodes=1, clock=clock)
    shapes = 2 * len(candidates(Kind(8, chunk=False), 64, 2)) + len(candidates(CHUNK, 64, 2))
    # In two contexts each: as it was, rotated apart, joined, both; then the first in other parts.
    assert counts == [0] * shapes + [0, 0, 1, 1, 0, 0, 1, 1] + [0] * 16
    assert {int(at) for at in positions} == {triton_tuning._SHORT, triton_tuning._CACHED}


def test_another_model_shape_and_a_damaged_file_are_measured_anew(
    tmp_path: Path, measured: list[Tile]
) -> None:
    tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    once = len(measured)
    other = ModelShape(group=4, kv_heads=1, head_dim=64, block_size=32, dtype=torch.float16)
    tuned_tiles(other, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    assert len(measured) == 2 * once
    for file in tmp_path.iterdir():
        file.write_text('{"tiles": 3}')
    tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    assert len(measured) == 3 * once


def test_larger_trees_add_only_their_own_kinds(tmp_path: Path, measured: list[Tile]) -> None:
    tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=4, clock=slowest_first())
    measured.clear()
    tiles = tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=8, clock=slowest_first())
    new = Kind(32, chunk=False)
    assert measured[:6:2] == candidates(new, 64, 2)
    assert {tile.rows for tile in measured} == {32}
    assert len(tiles) == 4


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_every_kind_has_a_tile_for_little_shared_memory(channels: int) -> None:
    """99 KiB of compute capability 8.6, 8.9 and 12.0: queries, weights, and keys and values of all stages but
    one, as Triton lays them out there."""

    def shared(tile: Tile) -> int:
        stages = 2 * (tile.stages - 1) * tile.keys * channels
        return 2 * (stages + tile.rows * (channels + tile.keys))

    for kind in (*TREES, CHUNK):
        assert min(map(shared, candidates(kind, channels, 2))) <= 99 << 10


def test_a_short_chunk_of_more_rows_than_any_tree_takes_a_tile_that_runs(
    tmp_path: Path, measured: list[Tile]
) -> None:
    """What was never measured might not fit the device."""
    tiles = tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    assert set(tiles) == {Kind(8, False), CHUNK}
    pool = KVPool(
        num_layers=1, num_blocks=3, block_size=16, kv_heads=1, head_dim=64, dtype=torch.float16, device=DEVICE
    )
    attention = TritonAttention(SHAPE.group, tiles=tiles)
    measured.clear()
    for rows in (1, 8, 16, 17):
        made = torch.zeros(1, rows, dtype=torch.int64, device=DEVICE)
        attention.plan(AttentionInput(made[:, :1], made[:, 0], made, max_length=rows), pool)
    assert measured == [tiles[Kind(8, False)]] * 3 + [tiles[CHUNK]]


def test_a_tile_too_large_for_the_device_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def clock(run: Callable[[], object]) -> float:
        if next(calls) == 0:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return 1.0

    tiles = tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=clock)
    assert tiles[Kind(8, False)] == candidates(Kind(8, False), 64, 2)[1]  # as fast as with joins

    def never(run: Callable[[], object]) -> float:
        raise OutOfResources(200_000, 100_000, "shared memory")

    with pytest.raises(ConfigError, match=r"shared memory.*sdpa"):
        tuned_tiles(SHAPE, DEVICE, tmp_path / "none", clock=never)


def test_a_folder_that_cannot_be_written_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        tiles = tuned_tiles(SHAPE, DEVICE, tmp_path / "file", most_nodes=1, clock=slowest_first())
    assert len(tiles) == 2
    assert "measured anew" in caplog.text


@pytest.mark.cuda
@pytest.mark.parametrize("flag", ["", "head_norm", "sinks"])
def test_what_is_measured_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(triton_tuning, "_CACHED", 300)  # enough to be split
    monkeypatch.setattr(triton_tuning, "_CHUNK", 40)
    outputs: list[torch.Tensor] = []
    given: set[bool] = set()
    attend = TritonAttention.attend

    def noted(self: TritonAttention, *args: Any, sinks: Tensor | None) -> Tensor:
        given.add(sinks is not None)
        return attend(self, *args, sinks=sinks)

    monkeypatch.setattr(TritonAttention, "attend", noted)

    def clock(run: Callable[[], object]) -> float:
        # One of each: a tree, a chunk, a tree rotated apart, whose parts are joined, both, with longer parts.
        if len(outputs) in (0, 6, 12, 14, 16, 24):
            found = run()
            assert isinstance(found, torch.Tensor)
            assert found.isfinite().all()
            outputs.append(found)
        else:
            outputs.append(torch.empty(0))
        return 1.0

    shape = replace(SHAPE, frequencies=32, **({flag: True} if flag else {}))
    tuned_tiles(shape, DEVICE, tmp_path, most_nodes=1, clock=clock)
    assert [len(found) for found in outputs if len(found)] == [1, 40, 1, 1, 1, 1]
    assert given == {flag == "sinks"}


def test_a_device_that_joins_parts_wrongly_has_a_second_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_tuning, "_CACHED", 300)
    attend = TritonAttention.attend
    calls = iter(range(1000))

    def wrong_once(self: TritonAttention, *args: object, **named: object) -> torch.Tensor:
        found = attend(self, *args, **named)  # type: ignore[arg-type]
        assert self._plan is not None
        if self._plan.tile.joins and next(calls) == 5:
            found[0, 3] += 1e-2
        return found

    monkeypatch.setattr(TritonAttention, "attend", wrong_once)
    with caplog.at_level(logging.WARNING):
        tiles = tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    assert not any(tile.joins for tile in tiles.values())
    assert "wrongly" in caplog.text


def test_candidates_are_compiledside_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    together = threading.Barrier(2, timeout=60)
    entered: list[int] = []

    def refused() -> None:
        together.wait()
        raise OutOfResources(200_000, 100_000, "shared memory")

    @contextmanager
    def here() -> Iterator[None]:
        entered.append(threading.get_ident())
        yield

    side_by_side([together.wait, refused], here)
    assert len(set(entered)) == 2

    def broken() -> None:
        raise ValueError("of ours")

    with pytest.raises(ValueError, match="of ours"):
        side_by_side([broken], nullcontext)


def test_joining_that_does_not_fit_the_device_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*ways: object) -> bool:
        raise OutOfResources(200_000, 100_000, "registers")

    monkeypatch.setattr(triton_tuning, "_agree", refuse)
    tiles = tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=slowest_first())
    assert tiles == {kind: last_of_all(kind)._replace(joins=False) for kind in (Kind(8, False), CHUNK)}
