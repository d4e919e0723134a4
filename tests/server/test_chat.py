"""The terminal chat against a real server: what it shows, remembers, and does when interrupted or refused."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from engine.fake import FakeEngine
from engine.types import Request
from server.chat import ChatError, Conversation, run
from tests.server.conftest import EOS_ID, MODEL, TEXT, RunningServer, Serve, endless, ids, says, wait_until
from tests.server.test_lifecycle import certificate

ROOT = Path(__file__).parents[2]


def talk(url: str, lines: list[str], **options: object) -> tuple[int, str, str]:
    """Exit status, answers and notes of a chat in which these lines are typed."""
    typed = iter(lines)

    def read(_prompt: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    out, notes = io.StringIO(), io.StringIO()
    status = run(url, read=read, out=out, notes=notes, **options)  # type: ignore[arg-type]
    return status, out.getvalue(), notes.getvalue()


@pytest.fixture
def parrot(serve: Serve) -> tuple[RunningServer, list[str]]:
    """A server that answers "Yes?", and the prompts it has seen."""
    seen: list[str] = []

    def reply(request: Request, index: int) -> list[list[int]]:
        seen.append(TEXT.decode(request.prompt_token_ids, skip_special_tokens=False))
        return says("Yes?")(request, index)  # type: ignore[return-value]

    return serve(reply), seen


def test_answers_appear_and_the_conversation_is_remembered(parrot: tuple[RunningServer, list[str]]) -> None:
    server, seen = parrot
    lines = ["Hello.", "", '"""', "Two", "  lines", '"""', "/reset", "Again.", "/exit", "never sent"]
    status, out, notes = talk(server.url + "/v1/", lines, system="Be kind.", sampling={"max_tokens": 9})
    assert status == 0
    assert out == "Yes?\n" * 3
    start = "<|im_start|>system\nBe kind.<|im_end|>\n"
    first = "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    second = "Yes?<|im_end|>\n<|im_start|>user\nTwo\n  lines<|im_end|>\n<|im_start|>assistant\n"
    again = "<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"
    assert seen == [start + first, start + first + second, start + again]
    assert notes.count("[5 tokens · ") == 3
    assert "starts anew" in notes


def test_the_summary_counts_this_answer(parrot: tuple[RunningServer, list[str]]) -> None:
    """Four characters and the end token: one from prefill, four from two steps, so two a step."""
    server, _ = parrot
    with httpx.Client(base_url=server.url) as http:
        conversation = Conversation(http, {"model": MODEL})
        assert "".join(piece.text for piece in conversation.ask("Hi")) == "Yes?"
        summary = conversation.summary
        assert summary.tokens == 5
        assert summary.acceptance_length == 2.0
        assert summary.first_s is not None
        assert summary.first_s > 0
        assert str(summary).endswith("acceptance length 2.00]")


def test_a_server_that_served_others_meanwhile_tells_no_acceptance_length(serve: Serve) -> None:
    server = serve(says("Yes?"))
    with httpx.Client(base_url=server.url) as http:
        conversation = Conversation(http, {"model": MODEL})
        pieces = conversation.ask("Hi")
        next(pieces)
        server.chat()
        assert "".join(piece.text for piece in pieces)
        assert conversation.summary.tokens == 5
        assert conversation.summary.acceptance_length is None


@pytest.mark.parametrize("leave", ["/quit", " /exit "])
def test_it_ends_as_it_says_at_its_start(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, leave: str
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    status, out, notes = talk(hello.url, [leave, "never sent"])
    assert (status, out) == (0, "")
    assert notes == f"{MODEL} at {hello.url}. /quit leaves, /help says what else there is.\n"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_server_with_a_certificate_of_its_own(serve: Serve, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    url = serve(says("hi"), ssl_certfile=cert, ssl_keyfile=key).url.replace("http:", "https:")
    for trust in ({"ca": cert}, {"insecure": True}):
        assert talk(url, ["Hi."], **trust)[:2] == (0, "hi\n")
    for model in (None, MODEL):
        status, out, notes = talk(url, ["Hi."], model=model)
        assert (status, out) == (1, "")
        assert notes.splitlines()[0].startswith(f"error: the certificate of {url} is not trusted")
        assert notes.splitlines()[0].endswith("by --ca PEM, or take any by --insecure")
    for options, fault in (
        ({"ca": tmp_path / "absent"}, f"--ca {tmp_path / 'absent'}: No such file or directory"),
        ({"ca": key}, f"--ca {key} holds no certificate in PEM"),
        ({"ca": cert, "insecure": True}, "--ca has no effect beside --insecure, which takes any certificate"),
    ):
        assert talk(url, ["Hi."], **options) == (1, "", f"error: {fault}\n")


def test_commands(hello: RunningServer) -> None:
    status, out, notes = talk(hello.url, ["/help", "/nonsense", "/etc/hosts is a file"])
    assert status == 0
    assert "/reset forgets" in notes
    assert "/nonsense is no command" in notes
    assert out == "Hello, world!\n"  # only the last one is a message


@pytest.mark.parametrize("watched", [True, False])
def test_refusals_are_told_and_forgotten(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    """And the exit status has them where nobody watched."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: watched)
    status, out, notes = talk(hello.url, ["Hi.", "/help"], sampling={"temperature": 9.0})
    assert (status, out) == (int(not watched), "")
    assert "error: " in notes
    assert "temperature" in notes
    with httpx.Client(base_url=hello.url) as http:
        conversation = Conversation(http, {"model": "another"})
        with pytest.raises(ChatError, match="another"):
            list(conversation.ask("Hi"))
        assert conversation.messages == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_thought_is_shown_apart_and_not_remembered(serve: Serve) -> None:
    server = serve(says("<think>\nHm.\nYes.\n</think>\n\nFine."), reasoning_parser="think")
    status, out, notes = talk(server.url, ["Hi.", "And?"])
    assert (status, out) == (0, "Fine.\n" * 2)
    assert notes.startswith("Hm.\nYes.\n\n[")
    asked = TEXT.decode(server.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)
    assert "assistant\nFine.<|im_end|>" in asked
    with httpx.Client(base_url=server.url) as http:
        conversation = Conversation(http, {"model": MODEL})
        pieces = list(conversation.ask("Hi"))
        assert [piece.is_thought for piece in pieces] == sorted((p.is_thought for p in pieces), reverse=True)
        assert conversation.summary.tokens_per_s is not None  # of all, from the thought's first on


@pytest.mark.parametrize(
    ("said", "shown"), [("<think>a</think>b", "\033[2ma\033[0m\n\n"), ("<think>a", "\033[2ma\033[0m\n")]
)
def test_a_thought_is_dim_in_a_terminal(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, said: str, shown: str
) -> None:
    server = serve(says(said), reasoning_parser="think")
    monkeypatch.setattr("io.StringIO", Terminal)
    assert talk(server.url, ["Hi."])[2].startswith(shown)


def test_an_error_in_the_stream_is_told(serve: Serve) -> None:
    def fails(_request: Request, _index: int) -> Iterator[list[int]]:
        yield ids("Ye")
        raise RuntimeError("the device is gone")

    server = serve(FakeEngine(fails, vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,)))
    with httpx.Client(base_url=server.url) as http:
        conversation = Conversation(http, {"model": MODEL})
        with pytest.raises(ChatError):
            list(conversation.ask("Hi"))
        assert conversation.messages == []


def test_no_server_is_one_line() -> None:
    for url in ("http://127.0.0.1:9", "127.0.0.1:9/v1"):
        status, out, notes = talk(url, ["Hi."])
        assert (status, out) == (1, "")
        assert notes.startswith("error: no server at http://127.0.0.1:9")
        assert len(notes.splitlines()) == 1


def test_a_key_is_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain listener that records what arrives."""
    import http.server

    seen: list[str | None] = []

    class Recorder(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            body = json.dumps({"error": {"message": "bad key"}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Recorder) as listener:
        threading.Thread(target=listener.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{listener.server_port}"
        assert talk(url, [], api_key="secret") == (1, "", "error: bad key\n")
    assert seen == ["Bearer secret"]


def test_ctrl_c_stops_the_answer_only(serve: Serve) -> None:
    """In a process of its own, interrupted like a terminal would: the slot is freed, and the chat goes on."""
    replies: list[Callable[..., object]] = [endless, says("Fine.")]
    asked: list[str] = []

    def reply(request: Request, index: int) -> object:
        asked.append(TEXT.decode(request.prompt_token_ids, skip_special_tokens=False))
        return replies[len(asked) - 1](request, index)

    server = serve(reply)  # type: ignore[arg-type]
    command = [sys.executable, "-u", "-m", "server.cli", "chat", "--url", server.url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        process.stdin.write("Go on.\n")
        process.stdin.flush()
        assert process.stdout is not None
        assert process.stdout.read(20) == "x" * 20
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        out, notes = process.communicate("Well?\n", timeout=30)
    assert process.returncode == 0, notes
    assert out.splitlines()[-1] == "Fine."
    assert "[stopped" in notes
    assert "Go on.<|im_end|>\n<|im_start|>assistant\nxxx" in asked[1]  # what was said before Ctrl-C is kept
    wait_until(lambda: server.engine.stats.running == 0)
