"""`medusa-serve bench`: what the engine does offline on this machine, without HTTP."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.limits import cpus
from engine.types import FinishReason, Request, SamplingParams, TokenDelta

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.llm import LLM

__all__ = ["Workload", "hardware", "measure", "read_prompts", "run", "settings_given"]

_WARM_TOKENS = 8
"""Output of the round before the first one: caches, allocator, lazy imports."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What each round asks for.

    Args:
        concurrency: requests that start together, one measurement each.
        prompt_tokens: length of a random prompt.
        new_tokens: most tokens of an answer; random prompts always get so many.
        rounds: per concurrency, each with prompts of its own.
        prompts: file with real prompts instead of random ones.
        seed: of the random prompts.

    Raises:
        ConfigError: a number that measures nothing.
    """

    concurrency: tuple[int, ...] = (1, 8, 16)
    prompt_tokens: int = 60
    new_tokens: int = 128
    rounds: int = 3
    prompts: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError("--concurrency must be numbers of at least 1, like 1,8,16")


@dataclass(frozen=True, slots=True)
class Round:
    """One round's requests, measured together. Times in seconds, one per request or step."""

    seconds: float
    tokens: int
    steps_s: list[float]
    ttft_s: list[float]
    tpot_s: list[float]
    decoded: int
    sequence_steps: int


def run(config: EngineConfig, workload: Workload) -> dict[str, Any]:
    """Load the model, measure each concurrency, print a table; returns what the JSON line says.

    Raises:
        ConfigError, ModelError: it cannot be loaded, or the prompt file cannot be used.
        RequestError: a prompt does not fit the context.
        RuntimeError: a request failed.
    """
    texts = read_prompts(workload.prompts) if workload.prompts else None
    if (most := max(workload.concurrency)) > config.max_num_seqs:
        raise ConfigError(f"--concurrency {most} needs --max-num-seqs {most} (it is {config.max_num_seqs})")

    from engine.llm import LLM  # here, so that --help does not import torch

    llm = LLM(config, progress=True)
    print(f"{'streams':>7}  {'tokens/s':>9}  {'step ms':>8}  {'TTFT ms':>8}  {'TPOT ms':>8}  {'length':>6}")
    rows: list[dict[str, Any]] = []
    for streams in workload.concurrency:
        rng = random.Random(f"{workload.seed} {streams}")
        rounds: list[Round] = []
        for number in range(-1, workload.rounds):
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=workload.new_tokens if number >= 0 else min(_WARM_TOKENS, workload.new_tokens),
                ignore_eos=texts is None,
            )
            prompts = _prompts(llm, workload, texts, streams, number, rng)
            # A salt of its own keeps what an earlier round left in the prefix cache out of this one.
            salt = f"{streams} {number}"
            requests = [
                Request(f"{number}-{i}", prompt, sampling, cache_salt=salt)
                for i, prompt in enumerate(prompts)
            ]
            found = measure(llm, requests)
            if number >= 0:
                rounds.append(found)
        rows.append(row := summary(streams, rounds))
        print(
            f"{streams:7}  {row['tokens_per_s']:9.1f}  {_ms(row['step_ms'])}  {_ms(row['ttft_ms'])}  "
            f"{_ms(row['tpot_ms'])}  {row['acceptance_length'] or 1.0:6.2f}",
            flush=True,
        )
    return {
        "benchmark": "offline",
        "rows": rows,
        "prompts": workload.prompts.name if workload.prompts else "random tokens",
        "prompt_tokens": None if workload.prompts else workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "rounds": workload.rounds,
        "temperature": 0,
        "settings": settings_given(config),
        "dtype": llm.info.dtype,
        "device": llm.info.device,
        "heads": llm.info.num_heads,
        "threads": _threads(),
        "hardware": hardware(),
    }


def settings_given(config: EngineConfig) -> dict[str, Any]:
    """The settings that are not at their default; the model always."""
    return {"model": config.model, **config.model_dump(mode="json", exclude_defaults=True)}


def _ms(value: float | None) -> str:
    return "       -" if value is None else f"{value:8.1f}"


def measure(llm: LLM, requests: Sequence[Request]) -> Round:
    """Run these requests together and time them.

    A step counts as a decode step of this batch where every choice took part in it and none was prefilled.

    Raises:
        RuntimeError: a request failed.
    """
    choices = sum(request.sampling.n for request in requests)
    firsts: dict[tuple[str, int], float] = {}
    tokens: dict[tuple[str, int], int] = {}
    steps_s: list[float] = []
    tpot_s: list[float] = []
    decoded = sequence_steps = 0
    start = last = time.monotonic()
    for deltas in llm.steps(requests):
        now = time.monotonic()
        if len(deltas) == choices and all(delta.num_steps for delta in deltas):
            steps_s.append(now - last)
        last = now
        for delta in deltas:
            _refuse_failure(delta)
            key = (delta.request_id, delta.index)
            tokens[key] = tokens.get(key, 0) + len(delta.token_ids)
            if delta.token_ids:
                firsts.setdefault(key, delta.time_s)
            if delta.num_steps:
                decoded += len(delta.token_ids)
                sequence_steps += delta.num_steps
            if delta.finish_reason is not None and tokens[key] > 1:
                tpot_s.append((delta.time_s - firsts[key]) / (tokens[key] - 1))
    return Round(
        seconds=last - start,
        tokens=sum(tokens.values()),
        steps_s=steps_s,
        ttft_s=[first - start for first in firsts.values()],
        tpot_s=tpot_s,
        decoded=decoded,
        sequence_steps=sequence_steps,
    )


def _refuse_failure(delta: TokenDelta) -> None:
    if delta.finish_reason is FinishReason.ERROR:
        raise RuntimeError(f"request {delta.request_id} failed: {delta.error}")


def summary(streams: int, rounds: list[Round]) -> dict[str, Any]:
    """Medians over rounds (tokens/s) or over all requests and steps (the times, in ms)."""

    def median_ms(values: list[float]) -> float | None:
        return round(1000 * statistics.median(values), 2) if values else None

    rates = [found.tokens / found.seconds for found in rounds]
    steps = sum(found.sequence_steps for found in rounds)
    return {
        "streams": streams,
        "tokens_per_s": round(statistics.median(rates), 2),
        "tokens_per_s_rounds": [round(rate, 2) for rate in rates],
        "step_ms": median_ms([value for found in rounds for value in found.steps_s]),
        "ttft_ms": median_ms([value for found in rounds for value in found.ttft_s]),
        "tpot_ms": median_ms([value for found in rounds for value in found.tpot_s]),
        # Tokens per sequence and decode step, the root counted: 1.0 is plain decoding.
        "acceptance_length": round(sum(f.decoded for f in rounds) / steps, 3) if steps else None,
    }


def _prompts(
    llm: LLM, workload: Workload, texts: list[str] | None, streams: int, number: int, rng: random.Random
) -> list[tuple[int, ...]]:
    """Token ids of one round's prompts: the file's next ones, around and around, or random tokens."""
    if texts is None:
        size = llm.info.vocab_size
        return [tuple(rng.randrange(size) for _ in range(workload.prompt_tokens)) for _ in range(streams)]
    chosen = [texts[(max(number, 0) * streams + i) % len(texts)] for i in range(streams)]
    return [tuple(llm.text.encode_chat([{"role": "user", "content": text}])) for text in chosen]


def read_prompts(path: Path) -> list[str]:
    """User turns of a JSONL file: each line {"turns": [first, …]} (MT-bench's shape) or {"prompt": text}.

    Raises:
        ConfigError: it cannot be read, or a line is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            texts.append(str(item["turns"][0] if "turns" in item else item["prompt"]))
        except (ValueError, TypeError, LookupError):
            raise ConfigError(
                f'{path}, line {number}: must be {{"turns": ["…"]}} or {{"prompt": "…"}}'
            ) from None
    if not texts:
        raise ConfigError(f"{path} holds no prompts")
    return texts


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def hardware() -> dict[str, Any]:
    """Machine and library versions, for the JSON line of every measurement."""
    import torch

    cpu = platform.processor() or platform.machine()
    memory_gib: float | None = None
    try:
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            cpu = found[1]
        memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        pass  # not Linux: the architecture's name is what there is
    return {
        "cpu": cpu,
        "cores": cpus(),
        "memory_gib": memory_gib,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "medusa-serve")},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
