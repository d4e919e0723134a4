"""Responses wait for the burst of requests to be over, and for nothing longer."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from functools import partial

import pytest

from server.arrivals import Arrivals, FewAtATime, Intake
from tests.server.conftest import RunningServer, chat_body, wait_until


def _never(_listener: Callable[[], None]) -> None:
    """A stream without events."""


def test_no_response_of_a_burst_begins_before_the_last_request_is_there() -> None:
    async def burst() -> None:
        arrivals = Arrivals()
        streams = []
        for _ in range(500):
            streams.append(asyncio.create_task(arrivals.over(_never)))
            await asyncio.sleep(0)
            assert not streams[0].done()
        await asyncio.wait_for(asyncio.gather(*streams), 5)
        await asyncio.wait_for(arrivals.over(_never), 5)  # a later one waits for none of them

    asyncio.run(burst())


def test_a_burst_without_end_is_not_waited_for() -> None:
    async def endless() -> None:
        arrivals = Arrivals()
        first = asyncio.create_task(arrivals.over(_never))
        others = []
        async with asyncio.timeout(5):
            while not first.done():
                others.append(asyncio.create_task(arrivals.over(_never)))
                await asyncio.sleep(0)
            await asyncio.gather(*others)

    asyncio.run(endless())


def test_what_has_events_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.arrivals._CALM_S", 60)

    async def told() -> None:
        arrivals = Arrivals()
        listeners: list[Callable[[], None]] = []
        eager = asyncio.create_task(arrivals.over(listeners.append))
        patient = asyncio.create_task(arrivals.over(_never))
        await asyncio.sleep(0.01)
        assert not eager.done()
        for _ in range(2):
            listeners[0]()
        await asyncio.wait_for(eager, 5)
        assert not patient.done()
        patient.cancel()  # its client has left
        arrivals._look()
        await asyncio.wait({patient})

    asyncio.run(told())


def test_streams_wait_when_their_request_is_in_the_engine(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = len(hello.engine.submitted), []

    class Noting(Arrivals):
        async def over(self, listen: Callable[[Callable[[], None]], None]) -> None:
            seen.append(len(hello.engine.submitted) - before)
            await super().over(listen)

    monkeypatch.setattr(hello.context, "arrivals", Noting())
    assert hello.events()[-1] == "[DONE]"
    assert seen == [1]


def test_the_first_of_a_burst_are_through_before_the_last_begin() -> None:
    """Each goes on three turns later, as those do whose task begins in the next turn and whose prompt is
    encoded in that after it."""

    async def burst() -> None:
        intake, begun, through = Intake(), list[int](), list[int]()

        async def request(number: int) -> None:
            await intake.turn()
            begun.append(number)
            assert len(begun) - len(through) <= 8
            for _ in range(3):
                await asyncio.sleep(0)
            through.append(number)

        tasks = [asyncio.create_task(request(number)) for number in range(100)]
        await asyncio.sleep(0)
        assert begun == [*range(8)], "these wait for nothing"
        tasks[20].cancel()  # its client leaves
        await asyncio.wait(tasks, timeout=5)
        assert begun == through == [number for number in range(100) if number != 20]
        late = asyncio.create_task(request(100))
        await asyncio.sleep(0)
        assert begun[-1] == 100, "a lone one waits for nothing"
        await late

    asyncio.run(burst())


@pytest.mark.parametrize("direct", [True, False])
def test_requests_take_their_turn(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """Before they are parsed; of other servers' connections, which do not, behind that."""
    turns: list[Callable[[], None]] = []

    def noted(_intake: Intake, begin: Callable[[], None]) -> None:
        turns.append(begin)
        begin()

    monkeypatch.setattr(Intake, "take", noted)
    if not direct:
        monkeypatch.setattr("server.middleware.DIRECT", "absent")
    assert hello.events()[-1] == "[DONE]"
    assert len(turns) == (1 if direct else 2)


def test_what_comes_while_a_request_waits_for_its_turn_is_kept(hello: RunningServer) -> None:
    """Also the rest of its body, and that its client has left."""
    intake, held = hello.context.arrivals.intake, list[Callable[[], None]]()
    body = json.dumps(chat_body()).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    host, port = hello.url.removeprefix("http://").split(":")
    before = len(hello.engine.submitted)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(intake, "take", held.append, raising=False)
        with socket.create_connection((host, int(port)), timeout=5) as left:
            left.sendall(head + body)
            wait_until(lambda: len(held) == 1)
        with socket.create_connection((host, int(port)), timeout=5) as stays:
            stays.sendall(head)
            wait_until(lambda: len(held) == 2)
            stays.sendall(body)
            time.sleep(0.05)
            for begin in held:
                hello.server.loop.call_soon_threadsafe(begin)
            answer = b""
            while part := stays.recv(65536):
                answer += part
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Hello, world!" in answer
    assert len(hello.engine.submitted) - before == 1


def test_calls_that_can_wait_leave_room_for_others() -> None:
    async def main() -> None:
        few, made = FewAtATime(), list[int]()
        for number in range(20):
            few.add(partial(made.append, number))
        seen = []
        while len(made) < 20:
            seen.append(len(made))
            await asyncio.sleep(0)
        assert seen == [0, 8, 16]
        assert made == [*range(20)]
        few.add(partial(made.append, 20))
        await asyncio.sleep(0)
        assert made[-1] == 20

    asyncio.run(main())


def test_no_response_begins_while_requests_wait_for_their_turn() -> None:
    async def main() -> None:
        arrivals = Arrivals()
        first = asyncio.create_task(arrivals.over(_never))
        arrivals.intake._waiting.append(lambda: None)
        await asyncio.sleep(0.02)
        assert not first.done()
        arrivals.intake._waiting.clear()
        await asyncio.wait_for(first, 5)

    asyncio.run(main())
