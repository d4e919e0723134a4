"""The engine's process: what waits for a parent that lags, and what happens when either of the two ends."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import children
from engine.child import Outlet, _packed_text
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineStoppedError, ModelError
from engine.front import EngineFront
from engine.process import EngineProcess
from engine.stats import EngineStats
from engine.text import TextProcessor
from engine.types import FinishReason, TokenDelta
from engine.wire import Done, Step, deltas_of, received
from tests.engine.conftest import TinyModel
from tests.engine.test_loop import collect, endless, run, until
from tests.letters import letter_tokenizer
from tests.support import greedy

ROOT = Path(__file__).parents[2]

PARENT = """
import socket, sys
from engine.config import EngineConfig
from engine.process import _started
from engine.types import Request
from engine.wire import Add, SetUp, Step, packed, received, row_of
from tests.engine.in_child import strike
ours, theirs = socket.socketpair()
with theirs:
    child = _started(theirs.fileno())
ours.sendall(packed(SetUp(EngineConfig(model=sys.argv[1], device="cpu", tree="off"), False, (strike,))))
received(ours)  # it has loaded
if sys.argv[2:]:
    ours.sendall(packed(Add(row_of(Request(sys.argv[2], (1, 2))), None)))
    received(ours)  # it begins
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_what_a_reader_leaves_waiting_is_joined_and_nothing_is_lost() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outlet, stats = Outlet(theirs), EngineStats()
        began = time.monotonic()
        for step in range(20_000):
            stats.num_steps = step + 1
            both = [TokenDelta(f"a request's id of usual length {i}", 0, [step], num_steps=1) for i in (0, 1)]
            outlet.tell(both, stats if step % 100 == 99 else None)
        assert len(outlet._kept) <= 2
        assert time.monotonic() - began < 5
        outlet.say(Done(None))
        found: dict[str, list[int]] = {}
        messages, newest = 0, None
        while isinstance(message := received(ours), Step):
            messages += 1
            newest = message.stats or newest
            for delta in deltas_of(message.rows):
                assert delta.num_steps == len(delta.token_ids)
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        assert message == Done(None)
        assert messages < 10_000
        assert [tokens == list(range(20_000)) for tokens in found.values()] == [True, True]
        assert newest == pickle.dumps(stats, pickle.HIGHEST_PROTOCOL)


def test_what_nobody_can_read_any_more_is_no_failure() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        outlet = Outlet(theirs)
        ours.close()
        outlet.tell([TokenDelta("r", 0, [1])], EngineStats())
        outlet.say(Done(None))


def test_a_process_that_is_killed_ends_every_stream_with_the_reason(tiny: TinyModel) -> None:
    async def body(engine: EngineProcess) -> None:
        pid = engine.pid
        assert pid is not None
        stream = engine.submit(endless("compiled", n=2))
        await until(lambda: engine.stats.running == 2)
        (compiler,) = children(pid)  # which goes on, and has nothing that was meant for the engine
        begun_with = Path(f"/proc/{compiler}/environ").read_bytes().split(b"\0")
        assert [each for each in begun_with if each.startswith(b"PYTHONPATH=")] == [
            f"PYTHONPATH={path}".encode() for path in [os.environ.get("PYTHONPATH")] if path is not None
        ]
        os.kill(pid, signal.SIGKILL)
        deltas = [delta async for delta in stream]
        assert {delta.index: delta.finish_reason for delta in deltas} == dict.fromkeys(
            (0, 1), FinishReason.ERROR
        )
        assert deltas[-1].error == "the engine's process was killed by SIGKILL"
        assert engine.pid is None
        os.kill(compiler, signal.SIGKILL)
        dead(engine, "SIGKILL")

    run(tiny, body, "process", tree="off")


def test_an_engine_that_fails_tells_why_and_what_it_gave_is_not_lost(tiny: TinyModel) -> None:
    async def body(engine: EngineProcess) -> None:
        slow = asyncio.ensure_future(collect(engine, greedy("slow", [1], 2)))
        await until(lambda: engine.stats.step_age() > 0.2)  # while a step takes long
        engine.submit(endless("slow too"))
        await until(lambda: engine.stats.running == 2)
        engine.submit(endless("instead"))  # comes in the first one's last step, so as many run as before
        await slow
        assert engine.stats.generation_tokens >= 4
        engine.abort(["slow too", "instead"])
        await until(lambda: not engine._streams)
        assert engine.stats.step_age() == 0
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGTERM)  # as a service manager does
        os.kill(engine.pid, signal.SIGINT)
        stream, fatal = engine.submit(endless("r")), engine.submit(endless("fatal"))
        await asyncio.sleep(0)  # they are sent together, in the next turn
        assert engine._process.wait(20) == 1
        engine.abort(["r"])  # which cannot be sent any more, before what has come is read
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason is FinishReason.ERROR
        assert deltas[-1].error == "the engine has failed: MemoryError: no more"
        assert [delta.finish_reason async for delta in fatal] == [FinishReason.ERROR]
        dead(engine, "no more")

    run(tiny, body, "process of a thread that ended", tree="off", max_num_seqs=3)


def dead(engine: EngineFront, reason: str) -> None:
    assert not engine.healthy
    assert not engine.ready
    with pytest.raises(EngineStoppedError, match=reason):
        engine.submit(endless("late"))


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not end it")


@pytest.mark.parametrize("request_id", [None, pytest.param("held", marks=on_linux)])
def test_the_process_goes_when_its_parent_is_killed(tiny: TinyModel, request_id: str | None) -> None:
    """Idle, and in a call that keeps Python's lock."""
    command = [sys.executable, "-c", PARENT, str(tiny.folder), *([request_id] if request_id else [])]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)  # into the call
        assert _runs(child)
        parent.kill()
    deadline = time.monotonic() + 20  # at once, but for a machine that has much to do
    while _runs(child):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("the engine's process goes on without its parent")
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether there is such a process; one that has ended may wait for somebody to ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_tokenizer_that_cannot_be_sent_is_refused_in_words() -> None:
    text = TextProcessor(letter_tokenizer("abc"))
    assert pickle.loads(_packed_text(text)).encode("abc") == text.encode("abc")
    text.tokenizer.of_its_own = lambda: None
    with pytest.raises(ConfigError, match=r"tokenizer cannot be sent.*--engine-process off"):
        _packed_text(text)


def test_a_model_that_cannot_be_loaded_is_told_as_by_the_thread() -> None:
    with pytest.raises(ModelError, match=r"^model folder \./none does not exist$"):
        EngineProcess.load(EngineConfig(model="./none"), progress=False)
