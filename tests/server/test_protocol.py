"""Clients that send or read slowly, or too much, on real connections."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import pytest

from engine.fake import FakeEngine
from server import events, middleware, protocol
from server.arrivals import FewAtATime
from server.protocol import MAX_HEAD_BYTES
from tests.server.conftest import TEXT, RunningServer, Serve, chat_body, endless, ids, says, wait_until


@contextmanager
def connection(server: RunningServer, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as raw:
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(5)
        raw.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        yield raw


def shorten_buffers(server: RunningServer) -> None:
    """Of connections to come: a few kilobytes, where the kernel would hold megabytes."""
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)


def rest(raw: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    try:
        while data := raw.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def refusal(answer: bytes) -> tuple[int, str]:
    """Status and code of an answer in OpenAI's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def post(body: bytes, length: int | None = None) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length)
    ) + body


def trickle(raw: socket.socket, data: bytes, every_s: float) -> threading.Thread:
    """Send byte by byte until the other side has had enough."""

    def send() -> None:
        try:
            for i in range(len(data)):
                raw.send(data[i : i + 1])
                time.sleep(every_s)
        except OSError:
            pass

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("part", ["headers", "body", "empty lines"])
def test_a_request_that_comes_byte_by_byte_is_cut(serve: Serve, part: str) -> None:
    server = serve(says("hi"), read_timeout=0.3)
    request = post(json.dumps(chat_body()).encode())
    head, _, body = request.partition(b"\r\n\r\n")
    with connection(server) as raw:
        started = time.monotonic()
        if part == "headers":
            sender = trickle(raw, head, 0.05)
        elif part == "body":
            raw.sendall(head + b"\r\n\r\n")
            sender = trickle(raw, body, 0.05)
        else:
            sender = trickle(raw, b"\r\n" * 1000, 0.05)
        answer = rest(raw)
        assert 0.25 < time.monotonic() - started < 2
        assert refusal(answer) == (408, "request_timeout")
        sender.join(5)
        assert not sender.is_alive()
    assert server.chat().status_code == 200  # nobody else is concerned


def test_a_body_in_pieces_that_arrives_in_time_is_served(serve: Serve) -> None:
    server = serve(says("hi"), read_timeout=2.0)
    request = post(json.dumps(chat_body()).encode())
    with connection(server) as raw:
        for i in range(0, len(request), 40):
            raw.sendall(request[i : i + 40])
            time.sleep(0.005)
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_deadline_is_the_requests_not_the_connections_or_the_answers(serve: Serve) -> None:
    """Kept alive, idle for longer than a request may take to arrive; and an answer that takes longer."""
    server = serve(
        FakeEngine(says("x" * 40, size=1), step_s=0.02, vocab_size=TEXT.vocab_size), read_timeout=0.3
    )
    request = post(json.dumps(chat_body()).encode())
    with connection(server) as raw:
        for _ in range(2):
            raw.sendall(request)
            assert raw.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.5)


def test_headers_have_a_bound(serve: Serve) -> None:
    server = serve(says("hi"))
    with connection(server) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with suppress(OSError):  # it has been told already
            for _ in range(MAX_HEAD_BYTES // 1000 + 200):
                raw.sendall(b"y" * 1000)
        assert refusal(rest(raw)) == (431, "request_header_fields_too_large")
    with connection(server) as raw:  # whole, in one read
        raw.sendall(b"GET /health HTTP/1.1\r\nX-Long: %b\r\n\r\n" % (b"y" * MAX_HEAD_BYTES) * 2)
        assert refusal(rest(raw)) == (431, "request_header_fields_too_large")
    assert not any("/health" in name for name in server.metrics()), "the application was asked all the same"


def test_what_follows_a_chunked_body_has_the_same_bound(serve: Serve) -> None:
    with connection(serve(says("hi"))) as raw:
        raw.sendall(post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        raw.sendall(b"2\r\n{}\r\n0\r\nX-Long: ")
        with suppress(OSError):
            for _ in range(MAX_HEAD_BYTES // 1000 + 400):
                raw.sendall(b"y" * 1000)
        assert refusal(rest(raw)) == (431, "request_header_fields_too_large")


@pytest.mark.parametrize("behind", [b"no request\r\n\r\n", b"GET /health HTTP/1.1\r\nX: " + b"y" * 800_000])
def test_what_cannot_be_taken_behind_a_request_cuts_its_answer(serve: Serve, behind: bytes) -> None:
    """A second status line would stand in the midst of the first one's stream."""
    server = serve(FakeEngine(endless, step_s=0.01, max_model_len=100_000, vocab_size=TEXT.vocab_size))
    with connection(server) as raw:
        raw.sendall(post(json.dumps(chat_body(stream=True)).encode()))
        answer = raw.recv(65536)
        with suppress(OSError):
            raw.sendall(behind)
        answer += rest(raw)
    assert answer.count(b"HTTP/1.1") == 1
    wait_until(lambda: server.engine.stats.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_all_it_has_asked_for_in_a_row(
    serve: Serve, log_lines: Any, stream: bool
) -> None:
    server = serve(FakeEngine(endless, step_s=0.01, max_model_len=100_000, vocab_size=TEXT.vocab_size))
    with connection(server) as raw:
        raw.sendall(2 * post(json.dumps(chat_body(stream=stream)).encode()))
        wait_until(lambda: server.engine.stats.running == 1)
    wait_until(lambda: server.engine.stats.running == 0)
    assert len(server.engine.submitted) == 1
    wait_until(lambda: any(line["event"] == "request" for line in log_lines()))
    assert not any(line["level"] == "error" for line in log_lines())


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_another_protocol_is_passed_over(serve: Serve, at_once: bool, chunked: bool) -> None:
    """Java's client offers HTTP/2 with its first request."""
    server = serve(says("hi"))
    plain = post(json.dumps(chat_body()).encode())
    head, _, body = plain.partition(b"\r\n\r\n")
    if chunked:
        head = head.rpartition(b"\r\n")[0] + b"\r\nTransfer-Encoding: chunked"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head += b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAE\r\n\r\n"
    with connection(server) as raw:
        raw.sendall(head + body if at_once else head)
        if not at_once:
            time.sleep(0.05)
            raw.sendall(body)
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        raw.sendall(plain)
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
    assert len(server.engine.submitted) == 2


def test_what_is_no_http_is_told_so(serve: Serve) -> None:
    with connection(serve(says("hi"))) as raw:
        raw.sendall(b"hello\r\n\r\n")
        assert refusal(rest(raw)) == (400, "bad_request")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_unread(serve: Serve, chunked: bool) -> None:
    server = serve(says("hi"), max_body_bytes=10_000)
    with connection(server) as raw:
        if chunked:
            raw.sendall(post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            raw.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            raw.sendall(b"1\r\nx\r\n")
        else:
            raw.sendall(post(b"", length=10_001))
        assert refusal(rest(raw)) == (413, "content_too_large")


def test_a_body_cut_in_the_middle_leaves_nothing_behind(serve: Serve, log_lines: Any) -> None:
    server = serve(says("hi"))
    with connection(server) as raw:
        raw.sendall(post(b'{"model": "fake', length=1000))
    wait_until(lambda: any(line["event"] == "request" for line in log_lines()))
    [line] = [line for line in log_lines() if line["event"] == "request"]
    assert line["status"] == 499
    assert not any(line["level"] == "error" for line in log_lines())
    assert server.engine.submitted == []
    assert server.chat().status_code == 200


def test_a_reader_that_stops_is_cut_and_its_slot_is_freed(serve: Serve) -> None:
    """What waits for it meanwhile is one delta, however many steps it lags."""
    engine = FakeEngine(
        lambda _r, _i: [ids("y" * 60)] * 20_000,
        max_model_len=2_000_000,
        vocab_size=TEXT.vocab_size,
        step_s=0.0005,
    )
    server = serve(engine, write_timeout=0.5)
    shorten_buffers(server)
    with connection(server, receive_buffer=4096) as raw:
        raw.sendall(post(json.dumps(chat_body(stream=True)).encode()))
        wait_until(lambda: engine.stats.running == 1)
        wait_until(lambda: engine.stats.running == 0, timeout_s=20)  # cut off: its buffers were full
        assert engine.stats.generation_tokens < 20_000 * 60
    wait_until(lambda: server.metrics()["medusa_stream_steps_merged_total"] > 100)
    metrics = server.metrics()
    assert metrics["medusa_request_success_total[('finished_reason', 'abort')]"] == 1
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total


def test_a_slow_reader_gets_all_of_the_text_in_fewer_events(serve: Serve) -> None:
    text = "".join(f"{i:05d} " for i in range(30_000))
    engine = FakeEngine(says(text, size=60), max_model_len=1_000_000, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    shorten_buffers(server)
    with connection(server, receive_buffer=4096) as raw:
        raw.sendall(
            post(json.dumps(chat_body(stream=True)).encode()).replace(b"Host", b"Connection: close\r\nHost")
        )
        wait_until(lambda: engine.stats.num_steps > 2900, timeout_s=30)  # the engine does not wait for it
        wait_until(lambda: engine.stats.running == 0)
        answer = rest(raw)
    lines = answer.decode().split("\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(events) < 2000  # of 3000 steps; what the socket's buffers took at once is not merged
    assert server.metrics()["medusa_stream_steps_merged_total"] > 1000


@pytest.mark.parametrize("body", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": "rl"}])
def test_events_are_the_same_with_and_without_direct_writes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    """Other ASGI servers have no such thing; with ours a step's events go past the layers between."""
    engine = FakeEngine(says("Hello, wörld! " * 5, size=1), step_s=0.005, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    write, written = protocol.Direct.write, []

    def counted(direct: protocol.Direct, part: bytes, last: bool) -> bool:
        written.append(last)
        return write(direct, part, last)

    monkeypatch.setattr(protocol.Direct, "write", counted)
    options = {"stream_options": {"include_usage": True}, **body}
    headers = server.chat(stream=True).headers
    written.clear()
    direct = told(server.events(**options))
    assert len(written) > 3
    assert [last for last in written if last] == written[-1:], "and the end of the response with the last"
    written.clear()
    for module in (events, middleware):
        monkeypatch.setattr(module, "DIRECT", "absent")
    assert told(server.events(**options)) == direct
    others = server.chat(stream=True).headers
    for changing in ("date", "x-request-id"):
        del headers[changing], others[changing]
    assert dict(others) == dict(headers)
    assert written == []


def test_what_follows_an_end_that_is_written_early(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No ping, while the response's task has still to clear up; then the connection's next request."""
    monkeypatch.setattr(events, "PING_S", 0.01)
    add, held = FewAtATime.add, threading.Event()

    def late(self: FewAtATime, call: Callable[[], None]) -> None:
        if getattr(call, "__name__", "") == "_wake":
            held.set()
        asyncio.get_running_loop().call_later(0.2, add, self, call)

    server = serve(FakeEngine(says("Hello", size=1), step_s=0.03, vocab_size=TEXT.vocab_size))
    monkeypatch.setattr(FewAtATime, "add", late)
    body = json.dumps(chat_body(stream=True)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
    ).encode()
    with connection(server) as raw:
        raw.sendall(head + b"\r\n" + body)
        first = b""
        while not first.endswith(b"0\r\n\r\n"):
            first += raw.recv(65536)
        assert held.is_set()
        raw.sendall(head + b"Connection: close\r\n\r\n" + body)
        second = rest(raw)
    for answer in (first, second):
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"data: [DONE]") == answer.count(b"\r\n0\r\n\r\n") == 1
    assert b": ping\n\n" in first
    assert b"ping" not in first.partition(b"[DONE]")[2]
    assert second.endswith(b"0\r\n\r\n")
    assert "request_failed" not in caplog.text


class OneStream:
    """The generation and the events of a stream that a test tells what to do."""

    def __init__(self) -> None:
        self.waiting = b""
        self.ended = self.slow = False

    def take(self) -> bytes:
        data, self.waiting = self.waiting, b""
        return data

    async def take_slow(self) -> bytes:
        self.slow = False
        return b"slow"

    def listen(self, listener: Callable[[], None]) -> None:
        self.tell = listener


class Line:
    """A `Direct` to a client that reads or not."""

    def __init__(self) -> None:
        self.free, self.gone = True, False
        self.written: list[bytes] = []
        self.lost: Callable[[], None] | None = None

    def on_lost(self, call: Callable[[], None] | None) -> None:
        self.lost = call

    def write(self, part: bytes, _last: bool) -> bool:
        if self.free:
            self.written.append(part)
        return self.free


async def answering(stream: OneStream, line: Line) -> tuple[asyncio.Task[None], list[Any]]:
    """The task of a response that waits for events, and the messages it has sent."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    begun = events._Begun(cast("Any", stream), stream, cast("Any", line), FewAtATime())
    task = asyncio.create_task(begun(send))
    await asyncio.sleep(0)
    return task, sent


def test_what_cannot_be_written_at_once_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PING_S", 0.01)

    async def main() -> None:
        stream, line = OneStream(), Line()
        stream.waiting = b"first"
        task, sent = await answering(stream, line)
        stream.waiting = b"second"
        stream.tell()
        await asyncio.sleep(0.03)
        pings = line.written[2:]
        assert pings
        assert set(pings) == {b": ping\n\n"}
        line.free = False
        await asyncio.sleep(0.03)  # who has still to read gets no pings
        line.written.clear()
        stream.waiting = b"third"
        stream.tell()
        await asyncio.sleep(0)
        line.free = True
        await asyncio.sleep(0)
        stream.waiting, stream.slow = b"fourth", True
        stream.tell()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stream.waiting, stream.ended = b"last", True
        stream.tell()
        await asyncio.wait_for(task, 5)
        assert sent == [None, b"third", b"slow", b""]
        assert [part for part in line.written if b"ping" not in part] == [b"fourth", b"last"]
        assert line.lost is None

    asyncio.run(main())


def test_a_stream_whose_client_leaves_ends() -> None:
    async def main() -> None:
        stream, line = OneStream(), Line()
        task, sent = await answering(stream, line)
        line.gone = True
        assert line.lost is not None
        line.lost()
        line.lost()
        await asyncio.wait_for(task, 5)
        assert sent == [None], "nobody is told of the end"
        task, sent = await answering(stream, line)  # it had left before
        await asyncio.wait_for(task, 5)
        assert sent == []

    asyncio.run(main())


def told(events: list[Any]) -> Any:
    """What a stream tells, however its steps were joined."""
    assert events.pop() == "[DONE]"
    choices: dict[int, list[Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        text, logprobs, reasons = choices.setdefault(choice["index"], ["", [], []])
        logprobs += (choice["logprobs"] or {"content": []})["content"]
        choices[choice["index"]] = [text + choice["delta"].get("content", ""), logprobs, reasons]
        if choice["finish_reason"] is not None:
            reasons.append(choice["finish_reason"])
    return choices, events[-1]["usage"]


def test_a_request_may_take_only_so_long(serve: Serve) -> None:
    server = serve(FakeEngine(endless, step_s=0.01, vocab_size=TEXT.vocab_size), request_timeout=0.3)
    started = time.monotonic()
    answer = server.chat()
    assert 0.25 < time.monotonic() - started < 2
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    events = server.events()
    assert events[-1]["error"]["code"] == "request_timeout"
    assert len(events) > 10
    name = "medusa_request_success_total[('finished_reason', 'timeout')]"
    assert server.metrics()[name] == 2
    wait_until(lambda: server.engine.stats.running == 0)


def test_in_time_is_in_time(serve: Serve) -> None:
    server = serve(says("Hello"), request_timeout=5.0)
    assert server.chat(n=2).json()["choices"][1]["message"]["content"] == "Hello"
    assert server.events()[-1] == "[DONE]"


@pytest.mark.parametrize("options", [{"engine_steps": 0}, {"engine_steps": 1}])
def test_connections_end_with_the_server(serve: Serve, options: dict[str, int]) -> None:
    """An idle connection, and one in the middle of its headers, do not hold up the end."""
    server = serve(says("hi"))
    with connection(server) as raw:
        if options["engine_steps"]:
            raw.sendall(b"GET /hea")
        time.sleep(0.05)
        started = time.monotonic()
        server.server.should_exit = True
        assert rest(raw) == b""
        assert time.monotonic() - started < 2


def test_a_request_that_waits_for_its_turn_is_answered_when_the_server_ends(serve: Serve) -> None:
    server = serve(says("hi"))
    intake = server.context.arrivals.intake

    async def is_full() -> None:
        intake._begun = 1000  # and nobody says that they are done

    server.in_loop(is_full())
    with connection(server) as raw:
        raw.sendall(post(json.dumps(chat_body()).encode()))
        wait_until(lambda: intake.busy)
        server.server.should_exit = True
        answer = rest(raw)
    assert answer.startswith(b"HTTP/1.1 ")
    assert b"connection: close" in answer.lower()
