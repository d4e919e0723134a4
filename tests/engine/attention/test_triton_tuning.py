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
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from engine.attention import triton_tuning
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, Tile, candidates
from engine.attention.triton_tuning import ModelShape, tuned_tiles
from engine.errors import ConfigError
from engine.triton_measuring import side_by_side
from tests.engine.attention.triton_cases import DEVICE

SHAPE = ModelShape(group=4, kv_heads=1, head_dim=64, block_size=16, dtype=torch.float16)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's stands for a GPU where there is none."""
    if torch.cuda.is_available():
        return
    properties = SimpleNamespace(name="interpreter", multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles of all steps that were made to be measured."""
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


def test_the_fastest_is_taken_and_kept_on_disk(tmp_path: Path, measured: list[Tile]) -> None:
    tiles = tuned_tiles(SHAPE, DEVICE, tmp_path / "new", clock=slowest_first())
    trees = [Kind(16, False), Kind(32, False), Kind(64, False), Kind(128, False)]
    chunk = Kind(128, True)
    fastest = {kind: candidates(kind, 64, 2)[-1] for kind in [*trees, chunk]}
    assert tiles == {kind: tile._replace(joins=not kind.chunk) for kind, tile in fastest.items()}
    wanted = [tile for kind in [*trees, chunk] for tile in candidates(kind, 64, 2)]
    assert measured == [*wanted, *(tiles[kind] for kind in trees)]
    measured.clear()
    assert tuned_tiles(SHAPE, DEVICE, tmp_path / "new", clock=slowest_first()) == tiles
    assert not measured
    (file,) = (tmp_path / "new").iterdir()
    assert json.loads(file.read_text())["device"] == torch.cuda.get_device_properties(DEVICE).name


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
    assert measured[:-1] == candidates(Kind(32, False), 64, 2)
    assert len(tiles) == 3


def test_a_tile_too_large_for_the_device_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def clock(run: Callable[[], object]) -> float:
        if next(calls) == 0:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return 1.0

    tiles = tuned_tiles(SHAPE, DEVICE, tmp_path, most_nodes=1, clock=clock)
    assert tiles[Kind(16, False)] == candidates(Kind(16, False), 64, 2)[1]  # as fast as with joins

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
@pytest.mark.parametrize("head_norm", [False, True])
def test_what_is_measured_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_norm: bool) -> None:
    monkeypatch.setattr(triton_tuning, "_CACHED", 300)  # enough to be split
    monkeypatch.setattr(triton_tuning, "_CHUNK", 40)
    outputs: list[torch.Tensor] = []

    def clock(run: Callable[[], object]) -> float:
        if len(outputs) in (0, 3, 8):  # one of each: a tree, a chunk, a tree whose parts are joined
            found = run()
            assert isinstance(found, torch.Tensor)
            assert found.isfinite().all()
            outputs.append(found)
        else:
            outputs.append(torch.empty(0))
        return 1.0

    shape = replace(SHAPE, frequencies=32, head_norm=head_norm)
    tuned_tiles(shape, DEVICE, tmp_path, most_nodes=1, clock=clock)
    assert [len(found) for found in outputs if len(found)] == [1, 40, 1]


def test_a_device_that_joins_parts_wrongly_has_a_second_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_tuning, "_CACHED", 300)
    attend = TritonAttention.attend
    calls = iter(range(1000))

    def wrong_once(self: TritonAttention, *args: object) -> torch.Tensor:
        found = attend(self, *args)  # type: ignore[arg-type]
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
    assert tiles == {kind: candidates(kind, 64, 2)[-1] for kind in (Kind(16, False), Kind(128, True))}
