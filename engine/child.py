"""The process of an engine that `engine.process` starts: loads, serves, and ends when its parent does."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NamedTuple

from engine.engine import Engine
from engine.errors import ConfigError
from engine.grammar import GrammarCompiler
from engine.grammar_queue import GrammarQueue
from engine.loader import load
from engine.stats import EngineStats
from engine.stream import joined
from engine.text import TextProcessor
from engine.types import TokenDelta
from engine.wire import (
    READ_BYTES,
    Abort,
    Add,
    Done,
    End,
    Failed,
    Made,
    Refused,
    SetUp,
    Stack,
    Step,
    Where,
    packed,
    received,
    request_of,
    rows_of,
    taken,
)
from engine.worker import EngineWorker, stack_of

__all__ = ["Outlet", "main"]

log = logging.getLogger(__name__)

_FLUSH_S = 10.0
"""How long a parent whose event loop lags gets to read the last of it."""

_STATS_S = 0.25
"""Between two copies of the statistics while the same sequences run."""


_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Outlet:
    """Sends messages without waiting for a reader that lags.

    What the socket does not take at once is left to a thread, and what comes meanwhile is kept: of each
    choice one delta, where they can be joined, so what waits is bounded by the answers' length.

    Args:
        connection: a blocking stream socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._lags = threading.Condition(self._lock)
        self._rest = b""
        self._kept: list[TokenDelta] = []
        self._newest: dict[tuple[str, int], TokenDelta] = {}
        self._stats: bytes | None = None
        self._others: list[NamedTuple] = []
        threading.Thread(target=self._catch_up, name="outlet", daemon=True).start()

    def tell(self, deltas: list[TokenDelta], stats: EngineStats | None) -> None:
        """Send what a step gave, and the statistics as they are now."""
        copied = None if stats is None else pickle.dumps(stats, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if not self._rest:
                self._send(Step(time.monotonic(), rows_of(deltas), copied))
                return
            self._stats = copied or self._stats
            for delta in deltas:
                key = delta.request_id, delta.index
                if (newest := self._newest.get(key)) is None or not joined(newest, delta):
                    self._kept.append(delta)
                    self._newest[key] = delta

    def say(self, message: NamedTuple) -> None:
        """Send another message, behind the deltas that were told before."""
        with self._lock:
            if self._rest:
                self._others.append(message)
            else:
                self._send(message)

    def flush(self, timeout_s: float) -> None:
        """Wait until all has been sent."""
        with self._lock:
            self._lags.wait_for(lambda: not self._rest, timeout_s)

    def _send(self, message: NamedTuple) -> None:
        data = packed(message)
        try:
            sent = self._connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            return  # the parent is gone, which the reader sees
        if sent < len(data):
            self._rest = data[sent:]
            self._lags.notify_all()

    def _catch_up(self) -> None:
        while True:
            with self._lock:
                self._lags.wait_for(lambda: self._rest)
            try:
                self._connection.sendall(self._rest)
            except OSError:
                return  # the parent is gone, which the reader sees
            with self._lock:
                self._rest = self._gathered()
                self._lags.notify_all()

    def _gathered(self) -> bytes:
        """What has come while the last was sent."""
        data = b""
        if self._kept or self._stats is not None:
            data = packed(Step(time.monotonic(), rows_of(self._kept), self._stats))
        data += b"".join(map(packed, self._others))
        self._kept, self._newest, self._stats, self._others = [], {}, None, []
        return data


def main() -> None:
    """The process. Its arguments: the socket to its parent, and the parent it ends with, where it does."""
    # Ctrl-C and a service manager's SIGTERM go to all processes; this one does what its parent says, which
    # has blocked them until here.
    asked = {signal.SIGINT, signal.SIGTERM}
    for number in asked:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, asked)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # a compiler's process that held it would hide the end of this one
    _end_with(int(sys.argv[2]))
    set_up = received(connection)
    if set_up is None:
        os._exit(1)
    child = _Child(connection)
    try:
        code = child.run(set_up)
    except BaseException as error:
        log.exception("the engine has died")
        child.outlet.say(Failed(f"the engine has failed: {type(error).__name__}: {error}"))
        code = 1
    child.outlet.flush(_FLUSH_S)
    logging.shutdown()
    os._exit(code)  # the interpreter's own end would wait for threads and unload what the system frees anyway


def _end_with(parent: int) -> None:
    """Have the system end this process when its parent ends; 0: not by that.

    A thread that sees the socket's end needs Python's lock to do something about it, and a call into a driver
    or compiler may hold that for minutes, and the GPU's memory with it.
    """
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it has ended before that
            os._exit(1)


class _Child:
    """The engine, what it is told and what it says."""

    def __init__(self, connection: socket.socket) -> None:
        self.outlet = Outlet(connection)
        self._connection = connection
        self._thread = threading.get_ident()
        self._held = 0, 0
        self._told_s = 0.0
        # From now on, so that a parent that is killed while the model is loaded leaves nothing either.
        threading.Thread(target=self._listen, name="commands", daemon=True).start()

    def run(self, set_up: SetUp) -> int:
        """Load, then serve until told to end; returns the exit status."""
        for each in set_up.prepare:
            each()
        try:
            loaded = load(set_up.config, progress=set_up.progress)
            text = _packed_text(loaded.text)
            self._engine = Engine(loaded)
        except BaseException as error:
            self.outlet.say(_refused(error))
            return 1
        self._worker = EngineWorker(self._engine, self._report)
        ends, size = loaded.generation_defaults.eos_token_ids, loaded.info.vocab_size
        compiler = GrammarCompiler(loaded.text.tokenizer, ends, size)
        self._grammars = GrammarQueue(compiler, self._worker)
        self.outlet.say(Made(loaded.info, text, loaded.generation_defaults, self._engine.stats))
        # While the server makes itself ready: what would stop every stream at the first grammar, and what the
        # server does with all that it has loaded (see `server.lifecycle.Server.run`).
        # Where it cannot be read, the server says so, and requests without a grammar go on.
        with suppress(Exception):
            compiler.prepare()
        gc.collect()
        gc.freeze()
        self._worker.serve()
        problem = None
        try:
            self._engine.check()
        except RuntimeError as error:
            problem = str(error)
        self.outlet.say(Done(problem))
        return 0

    def _report(self, deltas: list[TokenDelta]) -> None:
        """See `EngineWorker`. The statistics are exact whenever a choice has ended."""
        stats, now = self._engine.stats, time.monotonic()
        held = stats.running, stats.waiting
        # A choice that has ended need not change the numbers: another may have come in the same step.
        ended = any(delta.finish_reason is not None for delta in deltas)
        due = ended or held != self._held or not self._engine.has_work or now - self._told_s >= _STATS_S
        if due:
            self._held, self._told_s = held, now
        if due or deltas:
            self.outlet.tell(deltas, stats if due else None)

    def _listen(self) -> None:
        """Take commands, which come only when `Made` has been sent, until the parent is gone."""
        buffer = bytearray()
        try:
            # All that has come, at once: each wait gives Python's lock away, and the engine keeps it a while.
            while data := self._connection.recv(READ_BYTES):
                buffer += data
                for message in taken(buffer):
                    self._obey(message)
        except ConnectionError:
            pass
        except BaseException:
            log.exception("a command could not be read")
        os._exit(1)

    def _obey(self, message: Any) -> None:
        match message:
            case Add(row, spec):
                self._grammars.add(request_of(row), spec)
            case Abort(request_id, choice):
                self._grammars.abort(request_id, choice)
            case Where():
                self.outlet.say(Stack(stack_of(self._thread)))
            case End():
                self._worker.put(None)


def _packed_text(text: TextProcessor) -> bytes:
    try:
        return pickle.dumps(text)
    except Exception as error:
        raise ConfigError(
            f"this model's tokenizer cannot be sent to another process ({error}); pass --engine-process off"
        ) from error


def _refused(error: BaseException) -> Refused:
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Refused(error, told)
