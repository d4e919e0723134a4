"""The engine in a process of its own, beside whose steps an event loop needs no lock."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from engine.config import EngineConfig
from engine.errors import EngineStoppedError, MedusaError
from engine.front import EngineFront
from engine.stats import EngineStats
from engine.types import EngineInfo, Request, TokenDelta
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
    deltas_of,
    packed,
    received,
    row_of,
    taken,
)

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["EngineProcess", "cuda_is_used"]

log = logging.getLogger(__name__)

_STACK_S = 1.0
"""How long the engine's process gets to say where it is."""

_EXIT_POLLS = 200
_EXIT_POLL_S = 0.005
"""A process whose socket is closed has ended, or will at once."""


class EngineProcess(EngineFront):
    """Runs an `Engine` in a process of its own; implements `EngineClient`.

    A thread would share Python's lock with the event loop. Beside a fast device that costs more than to send
    what goes between the two: messages on a pair of sockets, the deltas of a step in one, those of several
    taken together where the event loop lags. The statistics are copies, up to a quarter of a second old while
    the same sequences run, and exact when one has ended. A request's grammar is compiled there once more.

    Either side sees the other's end by its socket, and on Linux the system ends a child whose parent is gone
    and that is too busy to look. Signals are the parent's: the child ignores those that a terminal or a
    service manager sends to both.

    Args:
        config: what to load.
        progress: show how far that is.
        prepare: called in the child before it loads; has to be picklable.
    """

    def __init__(
        self, config: EngineConfig, *, progress: bool = True, prepare: Sequence[Callable[[], None]] = ()
    ) -> None:
        super().__init__(config)
        self._transport: asyncio.Transport | None = None
        self._outbox: list[bytes] = []
        self._lost = self._done = False
        self._problem: str | None = None
        self._stacks: list[asyncio.Future[str]] = []
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = _started(theirs.fileno())
        try:
            made = self._load(SetUp(config, progress, tuple(prepare)))
        except BaseException:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            raise
        self._info, text, self.generation_defaults, self._stats = made
        self.text: TextProcessor = pickle.loads(text)

    @classmethod
    def load(
        cls, config: EngineConfig, *, progress: bool = True, prepare: Sequence[Callable[[], None]] = ()
    ) -> Self:
        """Load what `config` names; takes seconds and blocks.

        Raises:
            EngineStoppedError: the process ended meanwhile.
            Exception: what `engine.loader.load` raises.
        """
        return cls(config, progress=progress, prepare=prepare)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def pid(self) -> int | None:
        """See `EngineClient.pid`."""
        return self._process.pid if self._process.poll() is None else None

    async def start(self) -> None:
        """See `EngineClient.start`."""
        await super().start()
        assert self._event_loop is not None
        self._socket.setblocking(False)
        self._transport, _ = await self._event_loop.create_unix_connection(
            lambda: _Inlet(self._heard, self._ended_there, self._socket.dup()), sock=self._socket
        )

    async def stack(self) -> str:
        """See `EngineClient.stack`."""
        asked: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stacks.append(asked)
        self._send(Where())
        try:
            return await asyncio.wait_for(asked, _STACK_S)
        except TimeoutError:
            return ""

    def _load(self, set_up: SetUp) -> Made:
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(packed(set_up))
        # What the answer needs, while the model is loaded: transformers imports torch, which takes seconds.
        import_module("transformers.tokenization_utils_base")
        import_module("engine.model.weights")
        match received(self._socket):
            case Made() as made:
                return made
            case Refused(error, told):
                if not isinstance(error, MedusaError):
                    error.add_note(f"In the engine's process:\n{told}")
                raise error
            case _:
                self._process.wait()
                raise EngineStoppedError(
                    f"the engine's process {_end_of(self._process)} while it loaded the model"
                )

    def _add(self, request: Request) -> None:
        self._send(Add(row_of(request), None if request.grammar is None else request.grammar.spec))

    def _abort(self, request_id: str, index: int | None) -> None:
        self._send(Abort(request_id, index))

    def _send(self, message: NamedTuple) -> None:
        """Send it with the others of this turn of the event loop: a write that wakes the process takes longer
        than all else that is done to hand a request over."""
        if self._event_loop is not None:
            if not self._outbox:
                self._event_loop.call_soon(self._flush)
            self._outbox.append(packed(message))

    def _flush(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._outbox))
        self._outbox.clear()

    def _end(self) -> None:
        if self._transport is None:
            self._socket.close()
        self._send(End())

    def _ended(self) -> bool:
        return self._process.poll() is not None and (self._lost or self._transport is None)

    def _leave_behind(self) -> None:
        log.error("the engine's process does not end; it is killed")
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)

    def _check(self) -> None:
        if self._problem is not None:
            raise RuntimeError(self._problem)

    def _heard(self, messages: list[Any]) -> None:
        """What has come since the last time; called by the event loop."""
        steps: deque[list[TokenDelta]] = deque()
        for message in messages:
            match message:
                case Step(time_s, rows, stats):
                    if stats is not None:
                        self._stats = pickle.loads(stats)
                    # While it works, the next message comes with the end of a step.
                    works = self._stats.running or self._stats.waiting
                    self._stats.step_started = time_s if works else 0.0
                    if rows:
                        steps.append(deltas_of(rows))
                case Stack(text):
                    for asked in self._stacks:
                        if not asked.done():
                            asked.set_result(text)
                    self._stacks.clear()
                case Failed(reason):
                    self._hand_out(steps)
                    self._die(reason)
                case Done(problem):
                    self._done, self._problem = True, problem
        self._hand_out(steps)

    def _ended_there(self, polls: int = _EXIT_POLLS) -> None:
        """The socket is closed on the other side."""
        assert self._event_loop is not None
        if self._process.poll() is None and polls:
            self._event_loop.call_later(_EXIT_POLL_S, self._ended_there, polls - 1)
            return
        self._lost = True
        if self.healthy and not self._done:
            reason = f"the engine's process {_end_of(self._process)}"
            log.error(reason)
            self._die(reason)


class _Inlet(asyncio.Protocol):
    """Makes messages of what comes.

    Args:
        heard: called with all that are whole by now.
        lost: called at the end.
        left: another descriptor of the same socket. A transport whose write fails, since the process has
            ended, closes and leaves unread what that has said before.
    """

    def __init__(
        self, heard: Callable[[list[Any]], None], lost: Callable[[], None], left: socket.socket
    ) -> None:
        self._heard, self._lost, self._left = heard, lost, left
        self._buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if messages := taken(self._buffer):
            self._heard(messages)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the hook's signature
        try:
            with self._left, contextlib.suppress(OSError):
                while data := self._left.recv(READ_BYTES):
                    self.data_received(data)
        finally:
            self._lost()


def cuda_is_used(device: str) -> bool:
    """Whether a `device` setting means a GPU here. Leaves CUDA alone where NVML can tell."""
    if device != "auto":
        return device.startswith("cuda")
    import torch  # takes a second or two, which the tokenizer would take later

    return torch.cuda.device_count() > 0


def _started(descriptor: int) -> subprocess.Popen[bytes]:
    """A Python like this one that runs `engine.child` and has this socket.

    multiprocessing's own would import the parent's main module there and start a third process. Where modules
    are is told in its arguments, since what it starts in turn (compilers) would inherit PYTHONPATH.
    """
    code = "import sys; sys.path[:0] = sys.argv[3:]; from engine.child import main; main()"
    # Which it ends with. To the system that is this thread, so it has to be one that stays.
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    command = [sys.executable, "-P", "-c", code, str(descriptor), str(parent)]
    command += [os.path.abspath(place) for place in sys.path]
    # A Ctrl-C while it imports shall not end it with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_of(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    if code is None:
        return "closed its connection"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code}"
