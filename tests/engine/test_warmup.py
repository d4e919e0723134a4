"""Start-up measurement leaves nothing behind, whatever the pool and the bounds."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import Tensor

from engine import warmup
from engine.cache.blocks import BlockManager
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.loader import load
from engine.types import Sequence
from tests.engine.conftest import MEASURED, TinyModel
from tests.support import MODE, greedy, greedy_reference, make_engine, run_all


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 1},
        {"max_model_len": 8, "block_size": 1},
        {"max_model_len": 16, "kv_cache_tokens": 80},
        {"max_step_tokens": 64, "max_num_seqs": 64},
    ],
    ids=str,
)
def test_nothing_is_left_behind(narrow: TinyModel, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MEASURED.items():
        monkeypatch.setattr(warmup, name, value)
    loaded = load(
        EngineConfig(
            model=str(narrow.folder),
            heads=str(narrow.heads),
            device="cpu",
            **({"block_size": 4, "max_num_seqs": 8} | settings),
        ),
        progress=False,
    )
    engine = Engine(loaded)
    assert engine.info.tree == "auto"
    engine.check()
    assert loaded.blocks.free == loaded.blocks.total
    # In order: a long context whose blocks follow one another is read where it lies.
    blocks: list[int] = []
    assert loaded.blocks.grow(blocks, loaded.blocks.total * loaded.blocks.block_size)
    assert blocks == list(range(1, loaded.blocks.total + 1))
    loaded.blocks.release(blocks)
    assert engine.stats.num_steps == engine.stats.generation_tokens == 0
    outputs = run_all(engine, [greedy(f"r{i}", [i, 2, 3], 5) for i in range(3)])
    assert all(outputs[f"r{i}", 0] == greedy_reference(narrow.reference, [i, 2, 3], 5) for i in range(3))


def test_a_busy_machine_is_not_measured_for_ever(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What larger batches take then follows from the smaller ones."""
    made: list[Sequence] = []

    def counted(blocks: BlockManager, count: int, *sizes: int) -> list[Sequence] | None:
        found = sequences(blocks, count, *sizes)
        made.extend(found or ())
        return found

    sequences = warmup._sequences
    monkeypatch.setattr(warmup, "_LONGEST_S", 0.0)
    monkeypatch.setattr(warmup, "_sequences", counted)
    engine = make_engine(narrow.folder, heads=str(narrow.heads), max_num_seqs=8)
    assert len(made) == 1 + 2
    outputs = run_all(engine, [greedy(f"r{i}", [i, 2, 3], 5) for i in range(8)])
    assert all(outputs[f"r{i}", 0] == greedy_reference(narrow.reference, [i, 2, 3], 5) for i in range(8))


def test_all_tokens_of_a_measured_step_differ(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would all pass through the same experts, and large trees would look cheap."""
    engine = make_engine(narrow.folder, tree=4, max_num_seqs=4)
    runner, seen = engine._runner, list[int]()
    sequences = warmup._sequences(engine._blocks, 2, 8, runner.vocab_size)
    assert sequences is not None
    forward = runner._decoder.forward

    def noted(tokens: Tensor, *others: Tensor) -> Tensor:
        seen.extend(tokens.tolist())
        return forward(tokens, *others)

    monkeypatch.setattr(runner._decoder, "forward", noted)
    warmup._step(runner, sequences, [4, 4], in_a_row=1)
    assert len(seen) == len(set(seen)) == 8


def test_so_do_those_of_a_captured_one(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODE, "captured", True)
    engine = make_engine(narrow.folder, tree=4, max_num_seqs=2, lookup=3)
    runner = engine._runner
    assert isinstance(runner, CapturedRunner)
    sequences = warmup._sequences(engine._blocks, 2, 8, runner.vocab_size)
    assert sequences is not None
    for sequence in sequences:
        sequence.lookup_nodes = 3
    warmup._replay(runner, sequences, 4, heads=False)
    tokens = runner._in_buffers((2, 4)).draft.tokens.flatten().tolist()
    assert len(tokens) == len(set(tokens)) == 8


@pytest.mark.parametrize(("enough", "steps"), [({"_ENOUGH_S": 0.0}, 4), ({"_ENOUGH_OF_BATCH_S": 0.0}, 3)])
def test_long_steps_are_not_repeated(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch, enough: dict[str, float], steps: int
) -> None:
    """In a row, or in rounds."""
    engine = make_engine(narrow.folder, tree=2, max_num_seqs=1)
    sequences = warmup._sequences(engine._blocks, 1, 8)
    assert sequences is not None
    for name, value in ({"_ROUNDS": 4} | enough).items():
        monkeypatch.setattr(warmup, name, value)
    forward, sizes = engine._runner._decoder.forward, list[int]()

    def noted(tokens: Tensor, *others: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return forward(tokens, *others)

    monkeypatch.setattr(engine._runner._decoder, "forward", noted)
    warmup._eager(engine._runner, sequences, [0], 64)
    assert Counter(sizes) == dict.fromkeys(warmup._NODES, steps)
