"""Faults on purpose in the real engine: who is concerned is told why, everything else goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from engine import faults
from engine.errors import ConfigError, HeadsError, ModelError
from engine.loop import EngineLoop
from engine.model import embedded
from engine.types import FinishReason, Request
from tests.engine.conftest import TinyModel
from tests.engine.test_loop import collect, run, until
from tests.support import greedy, greedy_reference, make_engine


async def ends(engine: EngineLoop, request: Request) -> tuple[int, FinishReason | None, str | None]:
    """Tokens, reason and error of a request's only choice."""
    tokens, last = 0, None
    async for delta in engine.submit(request):
        tokens += len(delta.token_ids)
        last = delta
    assert last is not None
    return tokens, last.finish_reason, last.error


@pytest.mark.parametrize("tree", ["off", "12"])
def test_a_step_that_raises_fails_those_in_it_and_no_others(tiny: TinyModel, tree: str) -> None:
    async def body(engine: EngineLoop) -> None:
        with faults.injected("decode=raise@4"):
            # Two slots: the third waits while the first two fail.
            found = await asyncio.gather(*(ends(engine, greedy(f"r{i}", [1, 2, i], 20)) for i in range(3)))
        for tokens, reason, error in found[:2]:
            assert reason is FinishReason.ERROR
            assert error == "internal error: RuntimeError"
            assert 0 < tokens < 20
        assert found[2][:2] == (20, FinishReason.LENGTH)
        again = await collect(engine, greedy("again", [1, 2, 3], 15))
        assert again[0] == greedy_reference(tiny.reference, [1, 2, 3], 15)
        engine._engine.check()

    lookup = {} if tree == "off" else {"lookup": 11}
    run(tiny, body, tree=tree if tree == "off" else int(tree), **lookup)


def test_a_prefill_that_raises_fails_its_own_request(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        running = asyncio.ensure_future(collect(engine, greedy("first", [1, 2, 3], 60)))
        await until(lambda: engine.stats.generation_tokens > 2)
        with faults.injected("prefill=raise"):
            assert await ends(engine, greedy("second", [4, 5], 5)) == (
                0,
                FinishReason.ERROR,
                "internal error: RuntimeError",
            )
        assert (await running)[0] == greedy_reference(tiny.reference, [1, 2, 3], 60)

    run(tiny, body)


def test_a_step_that_hangs_shows_its_age_and_may_recover(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        assert engine.stats.step_age() == 0
        with faults.injected("decode=hang:0.4@2"):
            running = asyncio.ensure_future(collect(engine, greedy("r", [1, 2, 3], 10)))
            await until(lambda: engine.stats.step_age() > 0.2)
            assert (await running)[0] == greedy_reference(tiny.reference, [1, 2, 3], 10)
        await until(lambda: engine.stats.step_age() == 0)

    run(tiny, body)


def test_a_drain_does_not_wait_for_a_step_that_hangs(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.front._STOP_S", 0.2)

    async def body(engine: EngineLoop) -> None:
        with faults.injected("decode=hang:1.5@2"):
            running = asyncio.ensure_future(ends(engine, greedy("r", [1, 2, 3], 10)))
            await until(lambda: engine.stats.step_age() > 0.1)
            await asyncio.wait_for(engine.stop(0.1), timeout=1)
            assert "did not end" in ((await running)[2] or "")
            await asyncio.to_thread(engine._thread.join, 5)

    run(tiny, body)


def test_the_smallest_pool_serves_all_one_after_the_other(tiny: TinyModel) -> None:
    """Blocks for one longest sequence and its tree: the others are preempted or wait, and lose nothing."""
    engine = make_engine(tiny.folder, max_model_len=40, kv_cache_tokens=104, tree=8, lookup=7, max_num_seqs=4)
    requests = [greedy(f"r{i}", [1 + i, 2, 3], 37) for i in range(4)]
    for request in requests:
        engine.add(request)
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            found[delta.request_id] += delta.token_ids
    for i, request in enumerate(requests):
        assert found[request.request_id] == greedy_reference(tiny.reference, [1 + i, 2, 3], 37)
    engine.check()
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        make_engine(tiny.folder, max_model_len=40, kv_cache_tokens=100, tree=8, lookup=7)


def test_a_head_file_cut_short_is_named_before_anything_is_served(tiny: TinyModel, tmp_path: Path) -> None:
    data = tiny.heads.read_bytes()
    for size in (0, 5, 200, len(data) - 1):
        cut = tmp_path / "medusa_lm_head.safetensors"
        cut.write_bytes(data[:size])
        with pytest.raises(HeadsError, match=r"medusa_lm_head\.safetensors"):
            make_engine(tiny.folder, heads=str(cut))


def test_a_disk_that_is_full_during_the_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"as good as any")

    def convert(_source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        faults.visit("disk")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(embedded, "convert", convert)
    root = tmp_path / "cache"
    with faults.injected("disk=full"):
        with pytest.raises(ModelError, match=r"No space left on device; free some space"):
            embedded.cached_conversion(source, root)
        assert not [path for path in root.iterdir() if path.is_dir()]
        assert (embedded.cached_conversion(source, root) / "model.safetensors").exists()  # space was made


@pytest.mark.parametrize("text", ["decode", "decode=explode", "nowhere=raise", "disk=hang", "disk=raise@x"])
def test_a_specification_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MEDUSA_FAULTS"), faults.injected(text):
        pass


def test_faults_strike_once_at_their_visit_and_nowhere_else() -> None:
    faults.visit("decode")
    with faults.injected("decode=raise@2, disk=full"):
        faults.visit("decode")
        with pytest.raises(RuntimeError, match="fault injected: decode"):
            faults.visit("decode")
        faults.visit("decode")
        with pytest.raises(OSError, match="No space left"):
            faults.visit("disk")
        faults.visit("prefill")


def test_the_environment_is_the_switch() -> None:
    code = "from engine import faults; faults.visit('decode'); faults.visit('encode')"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=False).returncode == 0
    environment = {"MEDUSA_FAULTS": "encode=raise", "PATH": ""}
    failed = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
    assert "fault injected: encode" in failed.stderr
