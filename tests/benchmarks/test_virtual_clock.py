"""The virtual clock on a tiny model: what is replayed is what the engine itself does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.host_cost import HostCost
from benchmarks.virtual_clock import Times, VirtualEngine, compare, main, record, run_empty, streams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import Loaded, load
from engine.types import Request, SamplingParams
from tests.engine.conftest import TinyModel
from tests.support import save_model, save_random_heads, tiny_llama

PROMPTS = [(1, 2, 3, 4), (5, 6, 5), (2, 2, 7, 1, 3), (7,)]
TIMES = Times({1: (1.0, 1.1, 1.2, 1.3), 4: (2.0, 2.2, 2.6, 3.4)}, context=0, per_token=0.001)
TOKENS = 24


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Of twelve tokens: random heads are right now and then, and texts repeat themselves."""
    model, folder = tiny_llama(vocab_size=12), tmp_path_factory.mktemp("virtual")
    heads = save_random_heads(folder / "heads.safetensors", hidden=model.config.hidden_size, vocab=12)
    return TinyModel(model, save_model(model, folder), heads)


def loaded(model: TinyModel, tree: int | str, **settings: Any) -> Loaded:
    drafts = {"heads": str(model.heads), "lookup": 2 if tree == 8 else "on"} if tree != "off" else {}
    values = {"max_num_seqs": 4, "kv_cache_tokens": 2048, "device": "cpu", "tree": tree}
    return load(EngineConfig(model=str(model.folder), **(values | drafts | settings)), progress=False)


@pytest.mark.parametrize("tree", [8, "off"])
def test_what_is_replayed_is_what_the_engine_does(narrow: TinyModel, tree: int | str) -> None:
    """Token by token and step by step, with heads and lookup."""
    records = record(loaded(narrow, tree), PROMPTS, TOKENS + 40)
    virtual = VirtualEngine(loaded(narrow, tree), records, TIMES)
    outputs = []
    for engine in (Engine(loaded(narrow, tree), ahead=True), virtual):
        texts: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
        for i, prompt in enumerate(PROMPTS):
            sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
            engine.add(Request(str(i), prompt, sampling))
        while engine.has_work:
            for delta in engine.step():
                texts[delta.request_id] += delta.token_ids
        engine.check()
        outputs.append((texts, engine.stats.acceptance_counts, engine.stats.accepted_by_source))
    assert outputs[0] == outputs[1]
    assert (tree == "off") == (sum(outputs[0][1][2:]) == 0)


def test_blocks_of_another_size_are_refused(narrow: TinyModel) -> None:
    with pytest.raises(ValueError, match="blocks of 16 tokens"):
        record(loaded(narrow, "off", block_size=4), PROMPTS, TOKENS)


def test_the_clock_is_the_sum_of_what_steps_take(narrow: TinyModel) -> None:
    records = record(loaded(narrow, "off"), PROMPTS, TOKENS + 40)
    engine = VirtualEngine(loaded(narrow, "off"), records, TIMES)
    (ended,) = run_empty(engine, PROMPTS[:1], 3)
    steps = sum(TIMES.step_s(1, 1, heads=False, context=context) for context in (4, 5))
    # What is under way counts as context.
    assert ended == pytest.approx(TIMES.prompts_s(4) + steps, rel=5e-4)
    before, prefilled = engine.clock_s, engine.prefill_s
    rate = streams(engine, PROMPTS * 2, 4, 3)
    # Eight prompts in two rounds of two steps; every first token is a prompt's pass's.
    assert rate == pytest.approx(16 / (engine.clock_s - before - (engine.prefill_s - prefilled)))
    assert engine.nodes == [1] * 6
    assert not engine.has_work
    engine.check()


def test_a_host_that_is_slower_than_the_device_is_what_steps_take(narrow: TinyModel, tmp_path: Path) -> None:
    rows = [(1, "off", 700.0), (4, "off", 1000.0), (4, "auto", 9e9)]
    named = [dict(zip(("streams", "tree", "cpu_us"), row, strict=True)) for row in rows]
    (tmp_path / "host.json").write_text(json.dumps({"rows": named}))
    quick, slow = (HostCost.read(tmp_path / "host.json", "off", factor) for factor in (1.0, 3.0))
    assert (quick.of(1), quick.of(2), quick.of(9)) == pytest.approx((0.0007, 0.0008, 0.001))
    with pytest.raises(ValueError, match="no row with tree 7"):
        HostCost.read(tmp_path / "host.json", "7", 1.0)
    records = record(loaded(narrow, "off"), PROMPTS, TOKENS + 40)
    took, idle = [], []
    for host in (quick, slow):  # of steps of 2 ms
        engine = VirtualEngine(loaded(narrow, "off"), records, TIMES, host=host)
        run_empty(engine, PROMPTS, 4)  # each prompt's pass comes between
        before = engine.clock_s, engine.stats.device_idle_seconds
        run_empty(engine, PROMPTS, TOKENS)
        took.append(engine.clock_s - before[0])
        idle.append(engine.stats.device_idle_seconds - before[1])
    assert took[0] == pytest.approx(0.002 * (TOKENS - 1), rel=0.2)
    assert took[1] == pytest.approx(0.003 * (TOKENS - 1), rel=0.2)
    assert idle == [pytest.approx(0.0, abs=1e-6), pytest.approx(0.001 * (TOKENS - 1), rel=0.2)]


def test_a_slower_host_has_to_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--slower", "3.3"])
    assert "--host FILE" in capsys.readouterr().err


def test_trees_are_measured_and_compared_by_the_table(narrow: TinyModel) -> None:
    """Where nodes cost next to nothing and drafts come true, and where a node costs a step."""
    gains = []
    for last in (1.0, 8.0):
        cheap_or_dear = Times({1: (1.0, *[last] * 6), 4: (1.0, *[last] * 6)}, draft_ms=0.0)
        records = record(loaded(narrow, "auto"), PROMPTS, TOKENS + 40)
        engines = {
            tree: VirtualEngine(loaded(narrow, tree, tree_file=None), records, cheap_or_dear)
            for tree in ("auto", "off")
        }
        args = argparse.Namespace(batches=[4], rounds=3, new_tokens=TOKENS, seed=0)
        empty, streamed = compare(engines, PROMPTS, args)
        assert (empty["load"], streamed["load"]) == ("runs empty", "streams")
        gains.append(
            (empty["ratio_median"], streamed["ratio_median"], empty["until_each_ends"]["ratio_median"])
        )
    assert min(gains[0]) > 1.0
    assert max(gains[1]) < 1.05
