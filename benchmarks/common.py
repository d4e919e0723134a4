"""What the measuring commands share: a server process, a client, prompts, an interval, a hardware line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
import httpx

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.bench import hardware
from server.settings import load_settings

__all__ = [
    "Completion",
    "Encoder",
    "Item",
    "Server",
    "add_model",
    "add_prompts",
    "bootstrap_interval",
    "chat",
    "cpu_seconds",
    "data_of",
    "engine_config",
    "exact_prompt",
    "first_model",
    "first_turns",
    "free_port",
    "hardware",
    "kv_blocks",
    "metrics",
    "model_folder",
    "new_client",
    "new_parser",
    "numbers",
    "open_connections",
    "parse_with_engine_options",
    "positive",
    "print_result",
    "prompt_ids",
    "ratio_interval",
    "read_items",
    "thread_environment",
    "word_prompt",
]

ROOT = Path(__file__).resolve().parent.parent
READY_S = 300.0
"""Longest wait for a server: a first start converts the embedded model."""


def model_folder(model: str) -> Path:
    """A folder that transformers can load: `model` itself, or what the engine makes of its name."""
    if Path(model).is_dir():
        return Path(model).resolve()
    from engine.model.weights import resolve_model

    return Path(resolve_model(model))


# -- options ---------------------------------------------------------------------------------------


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A command's; `description` is its module's docstring, shown as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, the engine's own by default."""
    default = EngineConfig.model_fields["model"].default
    parser.add_argument("--model", default=default, help="embedded name, folder or hub id")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """`--prompts` and `--limit`, as `read_items` takes them."""
    parser.add_argument("--prompts", type=Path, required=True, help="MT-bench-shaped JSONL")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")


def positive(text: str) -> int:
    """At least 1, for argparse's `type`."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def numbers(text: str) -> list[int]:
    """`1,8,16` as a list, for argparse's `type`."""
    return [int(part) for part in text.split(",")]


def parse_with_engine_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and those of `medusa-serve serve` among or (after `--`) behind them."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_known_args(given[:cut])
    options += given[cut + 1 :]
    try:
        engine_config(options)  # a mistyped option is told now and not after minutes
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    return args, options


def engine_config(options: Sequence[str], **values: Any) -> EngineConfig:
    """What an engine in this process needs for `serve` options; `values` win over them.

    Raises:
        ValueError: an option that the server does not have, or that lacks its value.
        ConfigError: a bad value.
    """
    given: dict[str, Any] = {}
    rest = list(options)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        field = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or field not in EngineConfig.model_fields:
            raise ValueError(f"unrecognized argument: {name}")
        if not equals:
            if not rest:
                raise ValueError(f"{name} needs a value")
            value = rest.pop(0)
        given[field] = value
    return load_settings(given | values).engine_config


# -- the server ------------------------------------------------------------------------------------


class Server:
    """`medusa-serve serve …` as a child process on a free port, ready on entry and stopped on exit.

    Args:
        args: what follows `serve`, without the port.
        threads: CPU threads for the model; None leaves the default.
        command: what of Python's modules is run.

    Raises:
        RuntimeError: it died or was not ready in time; the text ends with its log.
    """

    def __init__(
        self, args: Sequence[str], *, threads: int | None = None, command: Sequence[str] = ("server.cli",)
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.args = [*args, "--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [sys.executable, "-m", *command, "serve"]
        self._env = {**os.environ, **thread_environment(threads)}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        # A file, not a pipe: nobody reads while the server runs, and a full pipe would stop it.
        self._log = tempfile.NamedTemporaryFile(prefix="medusa-serve-", suffix=".log")
        self._process = subprocess.Popen(
            [*self._command, *self.args],
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if it has not ended 40 s later (it drains for up to 30)."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(40)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        self._log.close()

    def send_signal(self, sig: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(sig)

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-lines:])

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise RuntimeError(f"the server ended with {code} before it was ready:\n{self.log_tail()}")
            try:
                # To read the certificates that https would need takes 30 ms, each time anew.
                answer = httpx.get(f"{self.url}/ready", timeout=2.0, trust_env=False, verify=False)
                if answer.status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server was not ready within {READY_S:.0f} s:\n{self.log_tail()}")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def thread_environment(threads: int | None) -> dict[str, str]:
    """Environment variables that give a torch process this many CPU threads."""
    if threads is None:
        return {}
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run; none where /proc does not tell."""
    try:
        found = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for child in " ".join(found).split()]


def cpu_seconds(pid: int, *, main_thread: bool = False) -> float | None:
    """CPU time a process, or its main thread alone, has used; None where /proc does not tell."""
    place = f"/proc/{pid}/task/{pid}/stat" if main_thread else f"/proc/{pid}/stat"
    try:
        fields = Path(place).read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- the client ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text, why it ended, and the server's own token counts."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


def new_client(url: str) -> aiohttp.ClientSession:
    """A client without a proxy, without a pool limit, and with a timeout fit for a CPU.

    It is aiohttp's: with httpx, 64 requests at once left the client over 40 ms, of connections kept open over
    400, which would be booked on the server.
    """
    return aiohttp.ClientSession(
        url.rstrip("/") + "/",
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=900.0),
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=2**22,  # a line of many log-probabilities must fit
    )


async def open_connections(client: aiohttp.ClientSession, count: int) -> None:
    """As many idle connections, as a load balancer keeps them."""

    async def ask() -> None:
        async with client.get("health") as answer:
            await answer.read()

    await asyncio.gather(*(ask() for _ in range(count)))


async def data_of(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The payloads of a stream of events."""
    async for line in answer.content:
        if line.startswith(b"data:"):
            yield line.removeprefix(b"data:").strip().decode()


async def first_model(url: str) -> str:
    """The first name that `/v1/models` lists."""
    async with new_client(url) as client, client.get("v1/models") as answer:
        answer.raise_for_status()
        return str((await answer.json())["data"][0]["id"])


async def chat(
    client: aiohttp.ClientSession, model: str, prompt: str, *, stream: bool, **body: Any
) -> Completion:
    """One chat completion of a single user turn, streamed or not.

    Raises:
        RuntimeError: an error response, an error event, or a stream that ends without its usage.
    """
    request = {"model": model, "messages": [{"role": "user", "content": prompt}], **body}
    if not stream:
        async with client.post("v1/chat/completions", json=request) as answer:
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {(await answer.text())[:500]}")
            data = await answer.json()
        choice = data["choices"][0]
        return _completion(choice["message"]["content"] or "", choice["finish_reason"], data["usage"])

    request |= {"stream": True, "stream_options": {"include_usage": True}}
    parts: list[str] = []
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    done = False
    async with client.post("v1/chat/completions", json=request) as answer:
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {(await answer.text())[:500]}")
        async for payload in data_of(answer):
            if payload == "[DONE]":
                done = True
                continue
            event = json.loads(payload)
            if "error" in event:
                raise RuntimeError(f"error event: {event['error']}")
            for choice in event["choices"]:
                parts.append(choice["delta"].get("content") or "")
                finish_reason = choice.get("finish_reason") or finish_reason
            usage = event.get("usage") or usage
    if usage is None or not done:
        raise RuntimeError("the stream ended early: no usage or no [DONE]")
    return _completion("".join(parts), finish_reason, usage)


def _completion(text: str, finish_reason: str | None, usage: dict[str, int]) -> Completion:
    return Completion(text, finish_reason, usage["prompt_tokens"], usage["completion_tokens"])


def metrics(text: str) -> dict[str, float]:
    """A Prometheus page as {"name{labels}": value}, labels as written."""
    pairs = re.findall(r"^([a-zA-Z_:][\w:]*(?:\{.*\})?)\s+(\S+)", text, flags=re.MULTILINE)
    return {name: float(value) for name, value in pairs}


def kv_blocks(page: dict[str, float]) -> dict[str, int]:
    """Blocks of the K/V pool by state, from a metrics page."""
    found = {state: page.get(f'medusa_kv_blocks{{state="{state}"}}') for state in ("free", "cached", "used")}
    missing = [state for state, value in found.items() if value is None]
    if missing:
        raise RuntimeError(f"/metrics has no medusa_kv_blocks of state {', '.join(missing)}")
    return {state: int(value) for state, value in found.items() if value is not None}


# -- prompts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a prompt file: its category, the first user turn, and the answer expected, if any."""

    category: str
    prompt: str
    prediction: str | None = None


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Items of an MT-bench-shaped file: a line is {"category", "turns": [...]}, `prediction` may be there."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [json.loads(line) for line in lines[:limit]]
    return [
        Item(str(item.get("category", path.stem)), str(item["turns"][0]), item.get("prediction"))
        for item in found
    ]


def first_turns(path: Path, limit: int | None = None) -> list[str]:
    """First turns of an MT-bench-shaped file: a line is {"question_id", "category", "turns": [...]}."""
    return [item.prompt for item in read_items(path, limit)]


class Encoder(Protocol):
    """The part of a transformers tokenizer that `exact_prompt` needs."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


_WORDS = (  # noqa: SIM905 - forty quoted words would be forty lines
    "river garden winter engine paper window history market teacher music doctor island machine forest "
    "letter kitchen morning village science painting journey summer bridge language city station farmer "
    "ocean mountain school picture family number system water people country story question answer"
).split()


def exact_prompt(tokenizer: Encoder, num_tokens: int, rng: random.Random) -> str:
    """A user turn whose chat prompt, template included, is exactly `num_tokens` tokens.

    Raises:
        ValueError: the template alone is longer.
    """

    def length(text: str) -> int:
        return len(prompt_ids(tokenizer, text))

    text = "Write a long story about these things: " + rng.choice(_WORDS)
    if length(text) > num_tokens:
        raise ValueError(f"the chat template leaves no room in {num_tokens} tokens")
    while (now := length(text)) < num_tokens:
        longer = [f"{text} {word}" for word in rng.sample(_WORDS, 4)]
        # Past the first words each adds one token or two; the short ones close the last gap.
        text = next((candidate for candidate in longer if length(candidate) <= num_tokens), text + "!")
        if length(text) <= now:
            raise ValueError(f"cannot make a prompt of exactly {num_tokens} tokens")
    return text


def word_prompt(num_words: int, rng: random.Random) -> str:
    """A user turn of so many common words, for a server whose tokenizer is not at hand."""
    words = ["Write", "a", "long", "story", "about", "these", "things:"]
    return " ".join((words + rng.choices(_WORDS, k=num_words))[: max(num_words, len(words) + 1)])


def prompt_ids(tokenizer: Encoder, text: str) -> list[int]:
    """Token ids of the chat prompt of one user turn, ready for the answer."""
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in found]


# -- results ---------------------------------------------------------------------------------------


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic (Efron 1979), seeded so that a rerun prints the same."""
    rng = random.Random(seed)
    found = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1.0 - level) / 2.0
    return found[round(tail * (resamples - 1))], found[round((1.0 - tail) * (resamples - 1))]


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Median of a / b over rounds, each round's values a pair, with its 95 % interval."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, high = bootstrap_interval(ratios)
    return {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_mean": round(statistics.fmean(ratios), 3),
        "ratio_interval_95": [round(low, 3), round(high, 3)],
        "rounds": len(ratios),
    }


def print_result(result: dict[str, Any], output: Path | None = None) -> None:
    """The one JSON line a measurement ends in, and in a file if one is given, where it is easier to read."""
    print(json.dumps(result, ensure_ascii=False), flush=True)
    if output is not None:
        output.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
