"""Captured steps: the rules a graph has, what a padded batch touches, and which shapes there are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import warmup
from engine.batch import Batch, Verified
from engine.config import EngineConfig
from engine.cuda_graphs import Graph, RecordedGraph
from engine.engine import Engine
from engine.errors import CaptureError, ConfigError
from engine.graphs import Bucket, CapturedRunner
from engine.loader import load
from engine.medusa.adaptive import AdaptiveTree, FixedTree
from engine.medusa.buckets import Buckets
from engine.medusa.tree import TreeShape
from engine.types import Request, SamplingParams
from engine.warmup import _replay, _sequences
from tests import support
from tests.engine.conftest import TinyModel
from tests.support import greedy, greedy_reference, make_engine, run_all


@pytest.fixture(autouse=True)
def _captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.MODE, "captured", True)


def runner_of(engine: Engine) -> CapturedRunner:
    runner = engine._runner
    assert isinstance(runner, CapturedRunner)
    return runner


class TestRecordedGraph:
    def test_replay_works_on_the_memory_as_it_is_then(self) -> None:
        value, index, total = torch.zeros(3), torch.tensor([0]), torch.zeros(2)

        def run() -> None:
            gathered = value[index].unsqueeze(1).expand(-1, 2)
            rows = torch.zeros_like(gathered)
            rows[:, 1:].add_(gathered[:, :1] * 2)
            total.copy_(rows[0])

        graph = RecordedGraph()
        graph.capture(run)
        value.copy_(torch.tensor([1.0, 2.0, 3.0]))
        graph.replay()
        assert total.tolist() == [0.0, 2.0]
        index.fill_(2)
        graph.replay()
        assert total.tolist() == [0.0, 6.0]

    def test_what_is_like_another_is_it_only_where_it_lies_there(self) -> None:
        value, total = torch.arange(4.0).view(2, 2), torch.zeros(2, 2)

        def run() -> None:
            doubled = value * 2
            copied = doubled.to(doubled.dtype, copy=True)
            doubled[:].add_(1)
            total.copy_(copied + 10 * doubled.T)

        graph = RecordedGraph()
        with torch.inference_mode():
            graph.capture(run)
            value.add_(1)
            graph.replay()
        doubled = 2 * value
        assert torch.equal(total, doubled + 10 * (doubled + 1).T)

    def test_what_the_host_decides_stays_decided(self) -> None:
        out, step = torch.zeros(1), 1

        def run() -> None:
            out.copy_(torch.full((1,), float(step)))

        graph = RecordedGraph()
        graph.capture(run)
        step = 2
        out.zero_()
        graph.replay()
        assert out.item() == 1.0

    @pytest.mark.parametrize(
        "run",
        [
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: x.numpy(),
            lambda x: bool(x.any()),
            lambda x: int(x[0]),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: x.masked_select(x > 0),
            lambda x: x.__setitem__(x > 0, 1.0),
            lambda x: x + torch.tensor([1.0]),
            lambda x: x.cpu(),
            lambda x: torch.equal(x, x),
        ],
    )
    def test_the_host_has_no_part_in_it(self, run: Callable[[Tensor], object]) -> None:
        x = torch.ones(3)
        run(x)
        with pytest.raises(RuntimeError, match="in a captured step"):
            RecordedGraph().capture(lambda: run(x))

    @pytest.mark.parametrize("use", [lambda x: x * 2, lambda x: x.view(1, 2)[0] * 2])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_memory_that_is_gone_is_missed(self, use: Callable[[Tensor], Tensor], mode: Any) -> None:
        held = {"x": torch.ones(2)}
        out = torch.zeros(2)
        graph = RecordedGraph()
        with mode():
            graph.capture(lambda: out.copy_(use(held["x"])))  # type: ignore[arg-type, return-value]
        graph.replay()
        held["x"] = torch.ones(2)
        with pytest.raises(RuntimeError, match="gone"):
            graph.replay()


def test_a_batch_that_does_not_fill_its_bucket_touches_nobody(narrow: TinyModel) -> None:
    """Three sequences in a bucket of four, in trees of which none fills the grid; the fourth slot is free."""
    engine = make_engine(narrow.folder, tree=33, heads=str(narrow.heads), lookup=4)
    runner = runner_of(engine)
    for i in range(3):
        engine.add(
            Request(f"r{i}", (i, 2, 3), SamplingParams(max_tokens=40, seed=i, presence_penalty=0.5 * i))
        )
    engine.step()
    for _ in range(8):
        owned = {block for sequence in engine._scheduler.running for block in sequence.blocks}
        others = [b for b in range(runner._pool.num_blocks) if b not in owned and b != 0]
        free = [s for s in range(8) if s not in {sequence.slot for sequence in engine._scheduler.running}]
        state = (runner._root, runner._hidden, runner._lengths, runner._tables, runner._lookup.history)
        pool_before = runner._pool.data[:, :, others].clone()
        before = [tensor[free].clone() for tensor in state]
        engine.step()
        grown = {block for sequence in engine._scheduler.running for block in sequence.blocks} - owned
        kept = [i for i, block in enumerate(others) if block not in grown]
        assert torch.equal(runner._pool.data[:, :, others][:, :, kept], pool_before[:, :, kept])
        assert all(torch.equal(tensor[free], old) for tensor, old in zip(state, before, strict=True))
        assert runner._lengths[-1] == 0
        assert not runner._tables[-1].any()
        # Of block 0 the first row alone: nodes that are not valid write what their root writes.
        assert runner._pool.data[:, :, 0, 0].any()
        assert not runner._pool.data[:, :, 0, 1:].any()
    assert {bucket.batch for bucket, _ in runner._first} == {4}


def test_steps_that_are_alike_are_told_once(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(narrow.folder, tree="off", max_num_seqs=2)
    runner_of(engine).capture()
    grid, told = runner_of(engine)._drafter.grid, []

    def noted(shapes: list[TreeShape], *rest: Any) -> Any:
        told.append(len(shapes))
        return grid(shapes, *rest)

    monkeypatch.setattr(runner_of(engine)._drafter, "grid", noted)
    requests = [greedy("short", [1, 2, 3], 6), greedy("long", [2, 2, 3], 20)]
    outputs = run_all(engine, requests)
    assert told == [2, 1], "both, and the one that goes on alone"
    for request in requests:
        sampling, prompt = request.sampling, list(request.prompt_token_ids)
        expected = greedy_reference(narrow.reference, prompt, sampling.max_tokens or 0)
        assert outputs[request.request_id, 0] == expected


def test_heads_draft_where_a_tree_has_nodes_of_theirs(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its bucket could hold: it would take as long as many nodes do."""
    engine, drafts = make_engine(narrow.folder, tree=8, heads=str(narrow.heads)), list[bool]()
    runner = runner_of(engine)
    first_half = runner._first_half

    def noted(bucket: Bucket, heads: bool) -> Graph:
        drafts.append(heads)
        return first_half(bucket, heads)

    monkeypatch.setattr(runner, "_first_half", noted)
    made = _sequences(engine._blocks, 2, 10)
    assert made is not None
    for heads, chain in ((0, 3), (2, 3), (0, 0), (4, 0)):
        made[1].head_nodes, made[1].lookup_nodes = heads, chain
        batch = runner.place(made)
        runner.targets_accept_compact(batch, runner.draft_forward(batch)).rows()
    assert drafts == [False, True, False, True]


def test_a_step_outside_the_buckets_is_eager(narrow: TinyModel) -> None:
    loaded = load(
        EngineConfig(
            model=str(narrow.folder),
            heads=str(narrow.heads),
            tree=8,
            block_size=4,
            max_num_seqs=8,
            device="cpu",
        ),
        progress=False,
    )
    engine = Engine(loaded, graph=RecordedGraph, buckets=Buckets((1,), (1,), 512))
    asked = [greedy(f"r{i}", [i, 2, 3], 20) for i in range(3)]
    outputs = run_all(engine, asked)
    for i in range(3):
        assert outputs[f"r{i}", 0] == greedy_reference(narrow.reference, [i, 2, 3], 20)
    assert not runner_of(engine)._first


def test_a_capture_that_fails_says_what_to_do(tiny: TinyModel) -> None:
    class Broken(RecordedGraph):
        def capture(self, run: Callable[[], None]) -> None:
            raise torch.OutOfMemoryError("out of memory")

    loaded = load(EngineConfig(model=str(tiny.folder), tree="off", device="cpu"), progress=False)
    engine = Engine(loaded, graph=Broken)
    with pytest.raises(CaptureError, match=r"32 sequences with 1 nodes: out of memory.*--enforce-eager"):
        runner_of(engine).capture()


def test_a_pool_that_leaves_no_memory_for_steps_is_said(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CapturedRunner, "__init__", full)
    loaded = load(EngineConfig(model=str(tiny.folder), tree="off", device="cpu"), progress=False)
    with pytest.raises(ConfigError, match=r"K/V pool leaves no memory .* lower kv_cache_tokens"):
        Engine(loaded, graph=RecordedGraph)


def test_all_graphs_are_captured_at_once(narrow: TinyModel) -> None:
    """Two sizes of batch, three of tree; trees of one node have no heads."""
    for settings, first, second in (
        ({"tree": "off"}, 2, 4),
        ({"tree": 8, "heads": str(narrow.heads)}, 2 + 2 * 2, 4 + 4),
        ({"tree": 8, "heads": str(narrow.heads), "lookup": "off"}, 2 + 2, 4 + 4),
        ({"tree": 8, "lookup": 7}, 2 + 2, 4 + 4),
    ):
        engine = make_engine(narrow.folder, max_num_seqs=2, **settings)
        runner = runner_of(engine)
        assert not runner._first
        runner.capture()
        assert (len(runner._first), len(runner._second)) == (first, second), settings
        assert not any(carried.any() for carried in (runner._lengths, runner._root[:-1], runner._hidden[:-1]))
        asked = [Request(f"r{i}", (i, 2), SamplingParams(max_tokens=9, seed=i, top_p=0.9)) for i in range(3)]
        run_all(engine, asked)
        assert (len(runner._first), len(runner._second)) == (first, second), "nothing is captured later"


def test_auto_times_captured_steps(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, heads=str(narrow.heads), max_num_seqs=6)
    runner, chooser = runner_of(engine), engine._chooser
    assert isinstance(chooser, AdaptiveTree)
    buckets = runner.buckets
    assert buckets.batches == (1, 4, 6)
    assert {(bucket.batch, bucket.nodes) for bucket, _ in runner._first} == set(buckets)
    times = chooser._times
    for batch in buckets.batches:
        assert times._rows[batch].tolist() == [batch * n for b, n in sorted(buckets) if b == batch]
    # What a step of five sequences takes depends on its largest tree alone, and not on the others.
    assert [times.rows(5, 5, 1), times.rows(5, 9, 5)] == [6.0, 48.0]
    engine.check()
    outputs = run_all(engine, [greedy(f"r{i}", [i, 2, 3], 20) for i in range(6)])
    for i in range(6):
        assert outputs[f"r{i}", 0] == greedy_reference(narrow.reference, [i, 2, 3], 20)


def test_what_the_host_does_before_the_first_step_is_not_measured(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each step would otherwise seem to take what getting it ready takes."""
    engine = make_engine(narrow.folder, heads=str(narrow.heads), tree=8, max_num_seqs=1)
    runner = runner_of(engine)
    sequences = _sequences(engine._blocks, 1, 20)
    assert sequences is not None
    runner.capture()
    replay, seen = runner.replay, []

    def slow_at_first(batch: Batch, size: tuple[int, int], *, heads: bool) -> Verified:
        seen.append((size, int(runner._lengths[0])))
        time.sleep(0.0 if len(seen) > 1 else 1.0)
        return replay(batch, size, heads=heads)

    monkeypatch.setattr(runner, "replay", slow_at_first)
    assert _replay(runner, sequences, 8, heads=True) < 1.0
    assert seen == [((1, 8), 20), ((1, 8), 20)]


def test_the_device_is_busy_while_a_measured_step_is_made_ready(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a step that takes less than that would seem to take as long."""
    engine = make_engine(narrow.folder, heads=str(narrow.heads), tree=8, max_num_seqs=1)
    runner, order = runner_of(engine), []
    sequences = _sequences(engine._blocks, 1, 20)
    assert sequences is not None
    for owner, name in ((warmup, "_keep_busy"), (runner, "place_again"), (runner, "replay")):
        real = getattr(owner, name)

        def noted(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            order.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, noted)
    _replay(runner, sequences, 8, heads=True)
    assert order[-3:] == ["_keep_busy", "place_again", "replay"]


def test_a_fixed_tree_does_not_outgrow_its_bucket(certain: TinyModel) -> None:
    """Five sequences of 64 nodes would fit the step, but not in a bucket of eight sequences."""
    settings = {"tree": 64, "heads": str(certain.heads), "tree_file": str(certain.tree_file)}
    engine = make_engine(certain.folder, max_step_tokens=330, **settings)
    assert isinstance(engine._chooser, FixedTree)
    outputs = run_all(engine, [greedy(f"r{i}", [i % 4, 2, 3], 20) for i in range(5)])
    for i in range(5):
        assert outputs[f"r{i}", 0] == greedy_reference(certain.reference, [i % 4, 2, 3], 20)
    sizes = {(bucket.batch, bucket.nodes) for bucket, _ in runner_of(engine)._first}
    assert (8, 8) in sizes
    assert max(nodes for batch, nodes in sizes if batch == 8) == 8
    assert 64 in {nodes for batch, nodes in sizes if batch <= 4}, "alone at the end a tree is whole"


class TestBuckets:
    def test_default_sizes(self) -> None:
        buckets = Buckets.default(max_num_seqs=24, tree_size=33, max_rows=512)
        assert buckets.batches == (1, 2, 4, 8, 16, 24)
        assert buckets.nodes == (1, 2, 4, 8, 16, 32, 33)
        pairs = list(buckets)
        assert pairs[0] == (16, 32)
        assert all(b * n <= 512 for b, n in pairs)
        assert (24, 16) in pairs
        assert (24, 32) not in pairs
        rows = [b * n for b, n in pairs]
        assert rows == sorted(rows, reverse=True)
        assert list(Buckets.default(max_num_seqs=1, tree_size=1, max_rows=64)) == [(1, 1)]

    def test_the_smallest_that_holds_it(self) -> None:
        buckets = Buckets((1, 4, 16), (1, 8, 64), 256)
        assert buckets.find(1, 1) == (1, 1)
        assert buckets.find(2, 3) == (4, 8)
        assert buckets.find(4, 64) == (4, 64)
        assert buckets.find(5, 9) is None
        assert buckets.find(17, 1) is None
        assert buckets.find(1, 65) is None
        assert [buckets.most_nodes(b) for b in (1, 4, 5, 16, 17)] == [64, 64, 8, 8, 1]
        assert [buckets.rows(3, largest) for largest in (1, 2, 8, 9)] == [4, 32, 32, 256]
        assert buckets.rows(17, 1) > 1e8
        assert buckets.rows(1, 65) > 1e8
