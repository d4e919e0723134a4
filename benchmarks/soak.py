"""Minutes of everything at once: does memory stay flat, is every block accounted for, does nothing fail?

    python -m benchmarks.soak --minutes 20 -- --heads heads/random.safetensors --tree auto

A server with few slots and a K/V pool too small for them (so that sequences are preempted) gets a mix of
requests from more clients than slots: greedy and seeded, several choices, shared prefixes, log-probabilities,
penalties, biases, stop strings, predictions, both acceptances, schemas of which each is another, patterns,
tool calls, log-probabilities of prompts, and bad ones that have to be refused; a third of them hang up.
Answers that ended by themselves have to be what they were asked to be. Some requests are asked again and
again: their text must be the same every time. The server's resident memory, with its engine's where that
has a process of its own, is sampled all along; its slope after the warm-up is a least-squares line. So are
its threads and open files, the most of which may not be more in the second half after the warm-up than in
the first. Exit code 1 on an error, a text that changed, a block lost, no preemption, a slope above
--most-slope, or more threads or open files.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common import (
    Server,
    add_model,
    children,
    data_of,
    first_model,
    hardware,
    kv_blocks,
    new_client,
    new_parser,
    parse_with_engine_options,
    print_result,
    word_prompt,
)
from benchmarks.disconnect import SETTLE_S, is_idle, page
from engine.grammar import MAX_KEPT

SERVE = [
    "--max-num-seqs",
    "6",
    "--max-model-len",
    "512",
    "--kv-cache-tokens",
    "768",
    "--max-step-tokens",
    "128",
]
"""A pool of hardly more than one context for eight slots, and chunks that cut prompts in two."""

FILES_SLACK = 3
"""Connections that open and close within a sample move the most by a few."""

_SHARED = (
    "You are the clerk of a small harbour. Ships report at the northern pier, pay by weight, and leave "
    "with the tide. The office opens at six and closes when the lamp is lit. Answer in one short paragraph "
    "and name the pier, the fee and the hour. Never promise a berth that is already taken. "
) * 2

Body = dict[str, Any]


def _choices(rng: random.Random) -> Body:
    return {"n": rng.randint(2, 4), "temperature": 0.9}


def _sampled(rng: random.Random) -> Body:
    return {
        "temperature": rng.uniform(0.3, 1.5),
        "top_p": rng.uniform(0.5, 1.0),
        "seed": rng.randrange(2**31),
    }


def _penalties(rng: random.Random) -> Body:
    return {"presence_penalty": rng.uniform(0, 2), "frequency_penalty": rng.uniform(0, 1), "temperature": 0.7}


def _shared(rng: random.Random) -> Body:
    ask = f"Ship {rng.randrange(100)} asks for a berth. What do you say?"
    return {"messages": [{"role": "system", "content": _SHARED}, {"role": "user", "content": ask}]}


def _schema(rng: random.Random) -> Body:
    """One that nobody has asked for before: what is compiled for it and kept must not pile up."""
    names = [f"{word_prompt(1, rng)}_{rng.randrange(10**6)}" for _ in range(rng.randint(1, 4))]
    kinds: list[Body] = [{"type": "integer"}, {"type": "boolean"}, {"enum": ["north", "south"]}]
    schema = {
        "type": "object",
        "properties": {name: rng.choice(kinds) for name in names},
        "required": names,
        "additionalProperties": False,
    }
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "berth", "schema": schema}}}


def _tools(rng: random.Random) -> Body:
    parameters = {
        "type": "object",
        "properties": {"ship": {"type": "integer"}, "pier": {"enum": ["north", "south"]}},
        "required": ["ship", "pier"],
        "additionalProperties": False,
    }
    names = [f"berth_{rng.randrange(100)}", "weigh"]
    functions = [{"name": name, "parameters": parameters} for name in names]
    return {
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }


def _responses(rng: random.Random) -> Body:
    """By OpenAI's newer API, a call that the answer has to make or not."""
    pier = {"type": "object", "properties": {"pier": {"enum": ["north", "south"]}}, "required": ["pier"]}
    tool = {"type": "function", "name": "berth", "parameters": pier, "strict": True}
    called = {"tools": [tool], "tool_choice": "required"}
    return {"input": word_prompt(40, rng), **(called if rng.random() < 0.5 else {})}


_PATTERN = "[a-z]{3,9}-[0-9]{2}"

_REFUSED: list[Body] = [
    {"temperature": 9},
    {"logit_bias": {"x": 1}},
    {"messages": []},
    {"structured_outputs": {"regex": "("}},
    {"medusa": {"acceptance": "sometimes"}},
    {"tools": [{"type": "function", "function": {"name": "a b"}}]},
]


KINDS: dict[str, Callable[[random.Random], Body]] = {
    "greedy": lambda _: {"temperature": 0},
    "sampled": _sampled,
    "choices": _choices,
    "shared prefix": _shared,
    "logprobs": lambda rng: {"logprobs": True, "top_logprobs": rng.randint(0, 5)},
    "penalties": _penalties,
    "bias": lambda rng: {"logit_bias": {str(rng.randrange(1000, 2000)): 5.0}, "min_tokens": 4},
    "stop string": lambda _: {"stop": [".", "\n\n"], "temperature": 0},
    "prediction": lambda _: {"prediction": {"type": "content", "content": _SHARED}, "temperature": 0},
    "typical": lambda _: {"medusa": {"acceptance": "typical"}, "temperature": 0.8},
    "schema": _schema,
    "pattern": lambda _: {"structured_outputs": {"regex": _PATTERN}},
    "tools": _tools,
    "responses": _responses,
    "prompt logprobs": lambda rng: {"prompt_logprobs": rng.randint(0, 5), "stream": False},
    "refused": lambda rng: rng.choice(_REFUSED),
}
"""What a request of each kind has beside its prompt and length."""


def make_body(kind: str, model: str, rng: random.Random) -> Body:
    """One request of this kind."""
    prompt = word_prompt(rng.choice((12, 40, 120)), rng)
    body: Body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": rng.randint(16, 120),
        "stream": rng.random() < 0.5,
    }
    body |= KINDS[kind](rng)
    if "input" in body:
        body["max_output_tokens"] = body.pop("max_tokens")
        del body["messages"]
    return body


def broken(body: Body, choice: Body) -> str | None:
    """What is wrong with a whole choice of a body's answer."""
    message, ended = choice["message"], choice["finish_reason"]
    if body.get("logprobs") and not choice["logprobs"]["content"]:
        return "no logprobs"
    if "tools" in body and ended == "tool_calls":
        names = {tool["function"]["name"] for tool in body["tools"]}
        for call in (call["function"] for call in message["tool_calls"]):
            if call["name"] not in names or set(json.loads(call["arguments"])) != {"ship", "pier"}:
                return f"a call of {call}"
    elif "tools" in body and ended == "stop":
        return "no call"
    if ended != "stop":
        return None
    if "response_format" in body:
        schema = body["response_format"]["json_schema"]["schema"]
        if set(json.loads(message["content"])) != set(schema["required"]):
            return f"not by the schema: {message['content']}"
    if "structured_outputs" in body and not re.fullmatch(_PATTERN, message["content"]):
        return f"not by the pattern: {message['content']}"
    return None


def repeated_bodies(model: str) -> list[Body]:
    """Requests whose text is a function of themselves: greedy ones and seeded ones."""
    rng = random.Random(12345)
    fixed: list[Body] = []
    for number in range(8):
        body = make_body("greedy" if number % 2 == 0 else "sampled", model, rng)
        fixed.append(body | {"max_tokens": 48, "stream": False})
    return fixed


class Soak:
    """The clients and what they have seen."""

    def __init__(self, url: str, model: str, deadline: float, seed: int) -> None:
        self.url, self.model, self.deadline = url, model, deadline
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.changed = 0
        self._rng = random.Random(seed)
        self._fixed = repeated_bodies(model)
        self._texts: dict[int, str] = {}

    async def client(self) -> None:
        """One request after another until the time is up."""
        while time.monotonic() < self.deadline:
            rng = random.Random(self._rng.random())
            if rng.random() < 0.2:
                number = rng.randrange(len(self._fixed))
                text = await self._ask("repeated", self._fixed[number], None)
                if text is not None and self._texts.setdefault(number, text) != text:
                    self.changed += 1
                continue
            kind = rng.choice(list(KINDS))
            leave_after_s = rng.uniform(0.0, 4.0) if rng.random() < 1 / 3 else None
            await self._ask(kind, make_body(kind, self.model, rng), leave_after_s)

    async def _ask(self, kind: str, body: Body, leave_after_s: float | None) -> str | None:
        """The answer's text; None where it was left early or failed."""
        # A client of its own: hanging up closes its connection and not a pooled one.
        async with new_client(self.url) as client:
            answer = asyncio.ensure_future(self._send(client, body, kind == "refused"))
            done, _ = await asyncio.wait({answer}, timeout=leave_after_s)
            if not done:
                answer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answer
                self.counts["left"] += 1
                return None
            try:
                text = answer.result()
            except (aiohttp.ClientError, TimeoutError, RuntimeError, ValueError, KeyError) as error:
                self.errors[f"{kind}: {type(error).__name__}: {str(error)[:200]}"] += 1
                return None
            self.counts[kind] += 1
            return text

    async def _send(self, client: aiohttp.ClientSession, body: Body, refused: bool) -> str:
        if "input" in body:
            return await _respond(client, body)
        if refused:
            async with client.post("v1/chat/completions", json=body) as answer:
                text = await answer.text()
                if answer.status != 400 or not json.loads(text)["error"]["message"]:
                    raise RuntimeError(f"HTTP {answer.status}, not refused: {text}")
                return text
        if not body["stream"]:
            async with client.post("v1/chat/completions", json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"HTTP {answer.status}: {await answer.text()}")
                whole = await answer.json()
            choices = whole["choices"]
            if len(choices) != body.get("n", 1):
                raise RuntimeError(f"{len(choices)} choices, not {body.get('n', 1)}")
            if "prompt_logprobs" in body and len(whole["prompt_logprobs"]) != whole["usage"]["prompt_tokens"]:
                raise RuntimeError("not a log-probability for each token of the prompt")
            if found := [wrong for choice in choices if (wrong := broken(body, choice))]:
                raise RuntimeError(found[0])
            return "\n".join(choice["message"]["content"] or "" for choice in choices)
        parts: list[str] = []
        last = ""
        async with client.post("v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {await answer.text()}")
            async for last in data_of(answer):
                if '"error"' in last[:20]:
                    raise RuntimeError(last)
                parts.append(last)
        if "[DONE]" not in last:
            raise RuntimeError("the stream ended early")
        return "".join(parts)


async def _respond(client: aiohttp.ClientSession, body: Body) -> str:
    """What a response holds, in JSON. Raises RuntimeError where it is not what was asked for."""
    async with client.post("v1/responses", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {await answer.text()}")
        if body["stream"]:
            events = [json.loads(data) async for data in data_of(answer)]
            response = events[-1].get("response", events[-1])
            if [event["sequence_number"] for event in events] != list(range(len(events))):
                raise RuntimeError("events are missing")
        else:
            response = await answer.json()
    if response.get("status") not in ("completed", "incomplete"):
        raise RuntimeError(f"the response ended as {response}")
    for item in response["output"]:
        if "tools" in body and item["status"] == "completed" and not json.loads(item["arguments"])["pier"]:
            raise RuntimeError(f"a call of {item}")
    return json.dumps(response["output"])


def rss_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    kib = next(
        line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(kib) / 1024


def threads(pid: int) -> int:
    """Threads of a process."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def open_files(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def growth(values: Sequence[int]) -> int | None:
    """How much more the most of the second half is than that of the first; None for less than two."""
    half = len(values) // 2
    return max(values[half:]) - max(values[:half]) if half else None


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of (minutes, MiB) pairs, in MiB per minute."""
    return statistics.linear_regression(*zip(*samples, strict=True)).slope


def by_minute(samples: Sequence[tuple[float, float]]) -> list[float]:
    """The first value of each minute, of (minutes, MiB) pairs."""
    first: dict[int, float] = {}
    for minute, value in samples:
        first.setdefault(int(minute), round(value, 1))
    return list(first.values())


async def fill_grammars(url: str, model: str) -> None:
    """Ask for as many schemas as a server keeps compiled: until then its memory grows with each."""
    rng = random.Random(0)
    async with new_client(url) as client:
        for _ in range(MAX_KEPT):
            body = make_body("schema", model, rng) | {"max_tokens": 1, "stream": False}
            async with client.post("v1/chat/completions", json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"HTTP {answer.status}: {await answer.text()}")


async def drive(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    """Run the clients and watch the memory; the result's measured part."""
    model = await first_model(server.url)
    total = sum(kv_blocks(await page(server.url)).values())
    await fill_grammars(server.url, model)
    start = time.monotonic()
    soak = Soak(server.url, model, start + 60 * args.minutes, args.seed)
    clients = asyncio.gather(*(soak.client() for _ in range(args.clients)))
    samples: list[tuple[float, float]] = []
    counts: list[tuple[int, int]] = []
    for number in itertools.count(1):
        pids = (server.pid, *children(server.pid))  # the engine may have a process of its own
        samples.append(((time.monotonic() - start) / 60, sum(map(rss_mib, pids))))
        counts.append((sum(map(threads, pids)), sum(map(open_files, pids))))
        if number % 60 == 0:
            answered, failed = sum(soak.counts.values()), sum(soak.errors.values())
            print(
                f"{samples[-1][0]:5.1f} min  {samples[-1][1]:7.1f} MiB  {answered} requests  {failed} errors",
                flush=True,
            )
        done, _ = await asyncio.wait({clients}, timeout=args.sample_s)
        if done:
            break
    await clients
    end = time.monotonic()
    while not is_idle(found := await page(server.url), total) and time.monotonic() - end < SETTLE_S:
        await asyncio.sleep(0.1)

    warm = [sample for sample in samples if sample[0] >= args.warm_share * args.minutes]
    rise = slope(warm) if len(warm) > 1 else None
    warm_counts = counts[len(samples) - len(warm) :]
    more_threads = growth([count for count, _ in warm_counts])
    more_files = growth([count for _, count in warm_counts])
    preemptions = int(found.get("medusa_num_preemptions_total", 0))
    idle = is_idle(found, total)
    return {
        "passed": idle
        and not soak.errors
        and not soak.changed
        and preemptions > 0
        and rise is not None
        and rise <= args.most_slope
        and more_threads is not None
        and more_threads <= 0
        and more_files is not None
        and more_files <= FILES_SLACK,
        "minutes": args.minutes,
        "clients": args.clients,
        "requests": dict(soak.counts),
        "errors": dict(soak.errors),
        "texts_changed": soak.changed,
        "preemptions": preemptions,
        "reused_prompt_tokens": int(found.get("medusa_prefix_cache_hits_total", 0)),
        "idle": idle,
        "kv_blocks": {"total": total, **kv_blocks(found)},
        "memory_mib": {
            "first": round(samples[0][1], 1),
            "after_warm_up": round(warm[0][1], 1) if warm else None,
            "last": round(samples[-1][1], 1),
            "most": round(max(value for _, value in samples), 1),
            "each_minute": by_minute(samples),
            "slope_per_minute": round(rise, 3) if rise is not None else None,
            "most_slope": args.most_slope,
        },
        "threads": {"most": max(count for count, _ in counts), "growth": more_threads},
        "open_files": {"most": max(count for _, count in counts), "growth": more_files},
    }


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--sample-s", type=float, default=1.0, help="seconds between looks at the memory")
    parser.add_argument("--warm-share", type=float, default=0.3, help="share of the time before the slope")
    parser.add_argument("--most-slope", type=float, default=2.0, help="MiB per minute that pass as flat")
    parser.add_argument("--seed", type=int, default=0)
    return parse_with_engine_options(parser, argv)


def main() -> int:
    args, options = parse()
    serve = [args.model, "--dtype", "float32", *SERVE, *options]
    with Server(serve) as server:
        result = asyncio.run(drive(args, server))
        if not result["passed"]:
            print(server.log_tail(), flush=True)
    for text, count in result["errors"].items():
        print(f"{count} × {text}", flush=True)
    print_result({"benchmark": "soak", **result, "serve": serve, "hardware": hardware()})
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
