"""`medusa-serve chat`: a conversation in the terminal with a running server, over its OpenAI interface."""

from __future__ import annotations

import json
import re
import ssl
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import httpx

from engine.errors import MedusaError

__all__ = ["ChatError", "Conversation", "Piece", "Summary", "run"]

HELP = '''Type a message and press Enter. """ alone on a line starts a message of several lines, and ends it.
Ctrl-C stops the answer, Ctrl-D leaves.
/reset forgets the conversation, /help shows this, /quit or /exit leaves.'''

_FENCE = '"""'
_SAMPLE = re.compile(r"^(medusa_(?:acceptance_length_(?:sum|count)|generation_tokens_total)) (\S+)$", re.M)


_DIM, _PLAIN = "\033[2m", "\033[0m"


class ChatError(MedusaError):
    """The server cannot be reached, or refuses or fails a request; the text says which."""


@dataclass(slots=True)
class Summary:
    """What an answer took. Seconds; None where nothing was measured or the server does not say.

    Args:
        tokens: of the answer, by the server's count.
        first_s: from the question to the first text.
        tokens_per_s: of the tokens after the first.
        acceptance_length: mean tokens per decode step, root counted. Servers tell it of all they do, so it
            is known only where this answer was all they did.
        stopped: by Ctrl-C.
    """

    tokens: int | None = None
    first_s: float | None = None
    tokens_per_s: float | None = None
    acceptance_length: float | None = None
    stopped: bool = False

    def __str__(self) -> str:
        parts = ["stopped"] if self.stopped else []
        if self.tokens is not None:
            parts.append(f"{self.tokens} tokens")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        if self.first_s is not None:
            parts.append(f"first after {self.first_s:.2f} s")
        if self.acceptance_length is not None:
            parts.append(f"acceptance length {self.acceptance_length:.2f}")
        return f"[{' · '.join(parts)}]" if parts else ""


class Piece(NamedTuple):
    """More of an answer, or of what the model thinks before it."""

    text: str
    is_thought: bool = False


@dataclass(slots=True)
class Conversation:
    """The messages so far and the server that answers them.

    Args:
        http: a client whose base URL is the server's, with its key.
        options: fields of the request body beside messages: `model`, and sampling where given.
        system: the system message, if any; /reset keeps it.
    """

    http: httpx.Client
    options: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Generator[Piece, None, None]:
        """The pieces of the answer as they come; `summary` is about it afterwards.

        Question and answer, without its thought, join the conversation, also an answer stopped halfway (by
        KeyboardInterrupt, or by closing this). A question without an answer, or one that failed, leaves no
        trace.

        Raises:
            ChatError: as its text says.
        """
        self.summary = Summary()
        messages = [*self.messages, {"role": "user", "content": question}]
        before = self._counts()
        usage: dict[str, Any] | None = None
        said: list[str] = []
        started = last = time.monotonic()
        first: float | None = None
        try:
            with closing(self._events({**self.options, "messages": messages})) as events:
                for event in events:
                    usage = event.get("usage") or usage
                    for piece in _pieces(event):
                        last = time.monotonic()
                        first = last if first is None else first
                        if not piece.is_thought:
                            said.append(piece.text)
                        yield piece
        except (KeyboardInterrupt, GeneratorExit):
            self.summary.stopped = True
            raise
        finally:
            if said and (self.summary.stopped or usage is not None):
                self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
            if first is not None:
                self.summary.first_s = first - started
        if usage is not None:
            self._summarize(usage, before, last - (first or last))

    def _summarize(self, usage: dict[str, Any], before: dict[str, float], rest_s: float) -> None:
        """What an answer that came to its end took; `rest_s` seconds from its first text to its last."""
        tokens = self.summary.tokens = int(usage["completion_tokens"])
        if tokens > 1 and rest_s > 0:
            self.summary.tokens_per_s = (tokens - 1) / rest_s
        after = self._counts()
        if not before or not after:
            return
        grown = {name.removeprefix("medusa_"): after[name] - before.get(name, 0.0) for name in after}
        steps = grown.get("acceptance_length_count", 0)
        if steps > 0 and grown.get("generation_tokens_total") == tokens:
            self.summary.acceptance_length = grown["acceptance_length_sum"] / steps

    def _events(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The JSON of each event of a streamed completion."""
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=request) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatError(_reason(response))
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ChatError(event["error"].get("message", str(event["error"])))
                    yield event
        except httpx.HTTPError as error:
            raise _no_answer(self.http, error, f"no answer from {self.http.base_url}: {error}") from error
        except ValueError as error:
            raise ChatError(f"{self.http.base_url} sent what is no event: {error}") from error

    def _counts(self) -> dict[str, float]:
        """The server's totals, where it tells them."""
        try:
            response = self.http.get("/metrics", timeout=5)
        except httpx.HTTPError:
            return {}
        return {name: float(value) for name, value in _SAMPLE.findall(response.text)}


def run(
    url: str,
    *,
    model: str | None = None,
    system: str | None = None,
    api_key: str | None = None,
    ca: Path | None = None,
    insecure: bool = False,
    sampling: dict[str, Any] | None = None,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
    notes: TextIO | None = None,
) -> int:
    """Talk until the input ends, or /quit or /exit; returns the process's exit status.

    It is 1 where there was no server, or none to trust, and where the input is no terminal and a request
    failed.

    Args:
        url: of the server, with or without http:// and /v1.
        model: the name to ask for; the server's first one if not given.
        system: a system message.
        api_key: sent as a bearer token.
        ca: certificates (PEM), of which the server's, or what signed it, has to be one; the system's if None.
        insecure: take any certificate.
        sampling: fields of the request body, as given; None values are left out.
        read: a line of input for a prompt, raising EOFError at its end.
        out: answers; stdout if not given.
        notes: everything else; stderr if not given.
    """
    out, notes = out or sys.stdout, notes or sys.stderr
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    base = url.rstrip("/").removesuffix("/v1")
    base = base if "://" in base else f"http://{base}"
    try:
        verify = _trust(ca, insecure)
    except ChatError as error:
        print(f"error: {error}", file=notes)
        return 1
    timeout = httpx.Timeout(None, connect=5)
    with httpx.Client(base_url=base, headers=headers, timeout=timeout, verify=verify) as http:
        try:
            options = {"model": model or _first_model(http)}
        except ChatError as error:
            print(f"error: {error}", file=notes)
            return 1
        options |= {name: value for name, value in (sampling or {}).items() if value is not None}
        talk = Conversation(http, options, system)
        watched, failed = sys.stdin.isatty(), False
        if watched:
            _line_editing()
            print(f"{options['model']} at {base}. /quit leaves, /help says what else there is.", file=notes)
        while (message := _message(read, notes)) is not None:
            message = message.strip()
            if not message:
                continue
            if message in ("/quit", "/exit"):
                break
            failed |= not _turn(talk, message, out, notes)
    return int(failed and not watched)


def _turn(talk: Conversation, message: str, out: TextIO, notes: TextIO) -> bool:
    """Do what a message says; returns whether the server did."""
    if message == "/reset":
        talk.reset()
        print("The conversation starts anew.", file=notes)
        return True
    if message == "/help":
        print(HELP, file=notes)
        return True
    if re.fullmatch(r"/\w+", message):
        print(f"{message} is no command; /help lists them.", file=notes)
        return True
    answer = talk.ask(message)
    try:
        _show(answer, out, notes)
    except KeyboardInterrupt:
        answer.close()
    except ChatError as error:
        print(f"error: {error}", file=notes)
        return False
    print(file=out, flush=True)
    print(talk.summary, file=notes, flush=True)
    return True


def _show(answer: Iterable[Piece], out: TextIO, notes: TextIO) -> None:
    """Thoughts are notes, dim where someone watches; the answer is what a pipe gets."""
    dim, plain = (_DIM, _PLAIN) if notes.isatty() else ("", "")
    thinks = False
    try:
        for text, is_thought in answer:
            if is_thought and not thinks:
                print(dim, end="", file=notes, flush=True)
            elif thinks and not is_thought:
                print(f"{plain}\n", file=notes, flush=True)
            thinks = is_thought
            print(text, end="", file=notes if thinks else out, flush=True)
    finally:
        if thinks:
            print(plain, file=notes, flush=True)


def _message(read: Callable[[str], str], notes: TextIO) -> str | None:
    """The next message, of one line or of those between two fences; None at the end of the input."""
    prompt, more = ("> ", "… ") if sys.stdin.isatty() else ("", "")
    while True:
        try:
            line = read(prompt)
            if line.strip() != _FENCE:
                return line
            lines: list[str] = []
            while (line := read(more)).strip() != _FENCE:
                lines.append(line)
            return "\n".join(lines)
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit leaves.", file=notes)


def _trust(ca: Path | None, insecure: bool) -> ssl.SSLContext | bool:
    """Which certificates are taken, as httpx wants to hear it. Raises ChatError for a file that has none."""
    if ca is None:
        return not insecure
    if insecure:
        raise ChatError("--ca has no effect beside --insecure, which takes any certificate")
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise ChatError(f"--ca {ca} holds no certificate in PEM") from error
    except OSError as error:
        raise ChatError(f"--ca {ca}: {error.strerror}") from error


def _first_model(http: httpx.Client) -> str:
    try:
        response = http.get("/v1/models", timeout=10)
        if response.status_code != 200:
            raise ChatError(_reason(response))
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        advice = "start one with `medusa-serve serve`, or give its --url"
        raise _no_answer(http, error, f"no server at {http.base_url} ({error}); {advice}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ChatError(f"{http.base_url} lists no models; is it an OpenAI-compatible server?") from error


def _pieces(event: dict[str, Any]) -> Iterator[Piece]:
    """What one event of a stream has, of this server's or another's."""
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield Piece(thought, is_thought=True)
        if text := delta.get("content"):
            yield Piece(text)


def _no_answer(http: httpx.Client, error: httpx.HTTPError, text: str) -> ChatError:
    """What to say of a request that failed on its way: `text`, unless the certificate was refused."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        text = (
            f"the certificate of {http.base_url} is not trusted ({error}); name it, or what signed it, by "
            "--ca PEM, or take any by --insecure"
        )
    return ChatError(text)


def _reason(response: httpx.Response) -> str:
    """What an error response says, in OpenAI's form or any other."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"status {response.status_code} from {response.url}: {response.text[:200]}"


def _line_editing() -> None:
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (importing it gives input() a history)
