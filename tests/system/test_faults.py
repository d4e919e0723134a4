"""Faults on purpose in a real server: the requests concerned are told why, everything else goes on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.common import kv_blocks, metrics
from benchmarks.disconnect import is_idle
from tests.system.support import (
    PROMPTS,
    ROOT,
    START_S,
    STREAM,
    Load,
    Outcome,
    Replica,
    running,
    until,
    wait_until,
)

SLOTS, CLIENTS = 4, 6
LONGEST = 192
SMALLEST_POOL = LONGEST + 64
"""One longest sequence and its tree: four of them do not fit together."""
STRUCK_S = 300.0
POINTS = {"encode": 12, "prefill": 20, "decode": 150}
"""Where a fault strikes, and at which visit: all of them while the clients are at work."""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A replica with the smallest K/V pool, in which the tokenizer, a prefill and a decode step fail once."""
    options = ["--max-num-seqs", str(SLOTS), "--max-model-len", str(LONGEST)]
    options += ["--kv-cache-tokens", str(SMALLEST_POOL)]
    faults = ",".join(f"{point}=raise@{visit}" for point, visit in POINTS.items())
    with Replica("faulty", tmp_path_factory.mktemp("faulty"), *options, faults=faults) as replica:
        replica.wait_ready()
        yield replica


def page(replica: Replica) -> dict[str, float]:
    return metrics(httpx.get(f"{replica.url}/metrics", trust_env=False).text)


def log_lines(replica: Replica) -> list[dict[str, object]]:
    lines = replica.log.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def ask(replica: Replica, length: int | None = None) -> socket.socket:
    """A connection that asks for a stream; `length` is what its head says of the body, if not the truth."""
    body = json.dumps(STREAM | {"max_tokens": 120}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {replica.address}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(START_S)
    raw.connect(("127.0.0.1", replica.port))
    raw.sendall(head.encode() + body)
    return raw


async def read_a_byte_a_second(raw: socket.socket) -> None:
    while await asyncio.to_thread(raw.recv, 1):
        await asyncio.sleep(1)


def test_faults_under_load_concern_their_own_requests_and_lose_no_block(faulty: Replica) -> None:
    total = sum(kv_blocks(page(faulty)).values())

    def struck() -> bool:
        log = faulty.log.read_text(errors="replace")
        return all(f"fault injected: {point}" in log for point in POINTS)

    async def scenario() -> Load:
        async with running(Load(faulty.url, CLIENTS)) as load:
            with ask(faulty) as slow, ask(faulty, length=10_000) as cut:
                reader = asyncio.create_task(read_a_byte_a_second(slow))
                await asyncio.sleep(2)
                cut.shutdown(socket.SHUT_RDWR)  # in the middle of its body
                await until(struck, STRUCK_S, "every fault struck")
                reader.cancel()
            before = len(load.outcomes)
            await until(lambda: len(load.outcomes) > before + 2 * CLIENTS, STRUCK_S, "the others go on")
        assert all(outcome.whole for outcome in load.outcomes[before:])
        return load

    load = asyncio.run(scenario())
    failed = [outcome for outcome in load.outcomes if not outcome.whole]
    by_a_step = [outcome for outcome in failed if "internal error: RuntimeError" in str(outcome.error)]
    (by_the_tokenizer,) = [outcome for outcome in failed if outcome not in by_a_step]
    assert by_the_tokenizer.status == 500
    assert 1 <= len(by_a_step) <= SLOTS + 1
    assert one_text_a_prompt([outcome for outcome in load.outcomes if outcome.whole])

    wait_until(lambda: is_idle(page(faulty), total), 30, "free + cached = total")
    assert page(faulty)["medusa_num_preemptions_total"] > 0
    assert httpx.get(f"{faulty.url}/ready", trust_env=False).status_code == 200
    left = [line for line in log_lines(faulty) if line.get("status") == 499]
    assert len(left) == 1  # the body that was cut


def one_text_a_prompt(whole: list[Outcome]) -> bool:
    """At temperature 0, whatever failed or was preempted beside them."""
    texts = defaultdict(set)
    for outcome in whole:
        texts[outcome.prompt].add(outcome.text)
    return len(texts) == len(PROMPTS) and all(len(found) == 1 for found in texts.values())


def last_words(folder: Path, *options: str, **environment: str) -> list[str]:
    """What a server says that cannot start."""
    server = Replica("cannot-start", folder, *options)
    done = subprocess.run(
        server.command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 1
    return [line for line in done.stderr.splitlines() if not line.startswith("{")]


@pytest.mark.minutes
def test_a_head_file_cut_short_ends_the_start_with_one_line(tmp_path: Path) -> None:
    whole = (ROOT / "configs" / "smollm2-135m" / "medusa_lm_head.safetensors").read_bytes()
    cut = tmp_path / "medusa_lm_head.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    (line,) = last_words(tmp_path, "--heads", str(cut))
    assert line.startswith("error: ")
    assert str(cut) in line


@pytest.mark.minutes
def test_a_full_disk_ends_the_start_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (line,) = last_words(
        tmp_path, MEDUSA_CACHE=str(cache), MEDUSA_FAULTS="disk=full", MEDUSA_LOG_FORMAT="json"
    )
    assert line.startswith("error: ")
    assert "No space left on device; free some space" in line
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 0]
