"""What goes between a server's process and its engine's: pickled messages, each behind its length.

Deltas and requests travel as tuples, which is sooner done than pickled dataclasses: a sixth of the time for a
delta (0.2 and 1.3 µs), less than half for a request (7 and 17 µs).
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.config import EngineConfig
from engine.grammar import GrammarSpec
from engine.stats import EngineStats
from engine.types import EngineInfo, MedusaParams, Request, SamplingParams, TokenDelta

if TYPE_CHECKING:
    from engine.model.weights import GenerationDefaults

__all__ = [
    "READ_BYTES",
    "Abort",
    "Add",
    "Done",
    "End",
    "Failed",
    "Made",
    "Refused",
    "SetUp",
    "Stack",
    "Step",
    "Where",
    "deltas_of",
    "packed",
    "received",
    "request_of",
    "row_of",
    "rows_of",
    "taken",
]

READ_BYTES = 1 << 18
"""Most that is read from the sockets at a time."""

_LENGTH = struct.Struct("!Q")

_row = attrgetter(*(field.name for field in fields(TokenDelta)))
_sampling = attrgetter(*(field.name for field in fields(SamplingParams)))
_medusa = attrgetter(*(field.name for field in fields(MedusaParams)))
_PARTS = {"sampling", "medusa", "grammar"}
_others = tuple(field.name for field in fields(Request) if field.name not in _PARTS)
_rest = attrgetter(*_others)


# -- to the engine ---------------------------------------------------------------------------------


class SetUp(NamedTuple):
    """The first message.

    Args:
        config: what to load; progress: show how far that is.
        prepare: called before anything is loaded.
    """

    config: EngineConfig
    progress: bool
    prepare: tuple[Callable[[], None], ...]


class Add(NamedTuple):
    """A request, of `row_of`; and what its grammar is made from."""

    row: tuple[Any, ...]
    grammar: GrammarSpec | None


class Abort(NamedTuple):
    """A request to drop, or one choice of it."""

    request_id: str
    choice: int | None


class Where(NamedTuple):
    """Asks for a `Stack`."""


class End(NamedTuple):
    """Nothing more will come."""


# -- from the engine -------------------------------------------------------------------------------


class Made(NamedTuple):
    """The model is loaded: what `Loaded` has of these names, and the engine's first statistics.

    The text processor is pickled by itself: whether it can be has to be known before the engine is made.
    """

    info: EngineInfo
    text: bytes
    generation_defaults: GenerationDefaults
    stats: EngineStats


class Refused(NamedTuple):
    """Loading failed; the traceback is text."""

    error: BaseException
    traceback: str


class Step(NamedTuple):
    """What one step gave, or several.

    Args:
        time_s: `time.monotonic()` when it was put together, which is the same clock in both processes.
        rows: of `rows_of`.
        stats: pickled `EngineStats`, where they are due.
    """

    time_s: float
    rows: list[tuple[Any, ...]]
    stats: bytes | None


class Stack(NamedTuple):
    """Where the engine is in the code."""

    text: str


class Failed(NamedTuple):
    """The engine is dead."""

    reason: str


class Done(NamedTuple):
    """The engine has ended as it was told; `problem`: what of its books was wrong."""

    problem: str | None


def row_of(request: Request) -> tuple[Any, ...]:
    """A request without its grammar."""
    return _sampling(request.sampling), _medusa(request.medusa), _rest(request)


def request_of(row: tuple[Any, ...]) -> Request:
    sampling, medusa, rest = row
    named = dict(zip(_others, rest, strict=True))
    return Request(sampling=SamplingParams(*sampling), medusa=MedusaParams(*medusa), **named)


def rows_of(deltas: list[TokenDelta]) -> list[tuple[Any, ...]]:
    return list(map(_row, deltas))


def deltas_of(rows: list[tuple[Any, ...]]) -> list[TokenDelta]:
    return [TokenDelta(*row) for row in rows]


def packed(message: NamedTuple) -> bytes:
    """As it is sent."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


def taken(buffer: bytearray) -> list[Any]:
    """The messages that are whole; they are taken from the buffer."""
    messages: list[Any] = []
    begin = 0
    with memoryview(buffer) as view:
        while len(buffer) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, begin)
            end = begin + _LENGTH.size + length
            if end > len(buffer):
                break
            messages.append(pickle.loads(view[begin + _LENGTH.size : end]))
            begin = end
    del buffer[:begin]
    return messages


def received(connection: socket.socket) -> Any:
    """The next message of a blocking socket; None where the other side is gone."""
    if (header := _exactly(connection, _LENGTH.size)) is None:
        return None
    data = _exactly(connection, *_LENGTH.unpack(header))
    return None if data is None else pickle.loads(data)


def _exactly(connection: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    filled = 0
    with memoryview(data) as view:
        while filled < size:
            try:
                count = connection.recv_into(view[filled:])
            except ConnectionError:
                return None
            if count == 0:
                return None
            filled += count
    return data
