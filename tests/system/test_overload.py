"""Ten times what two small replicas can hold: answered, or refused at once; memory flat."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.system.support import Load, Nginx, Replica, running, wait_until

SLOTS, WAITING = 2, 4
CAPACITY = 2 * (SLOTS + WAITING)
CLIENTS = 10 * CAPACITY
REFUSED_WITHIN_S = 1.0
MEMORY_RISE = 1.05


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Replica]]:
    """Two replicas of two slots and a queue of four."""
    folder = tmp_path_factory.mktemp("small")
    options = ["--max-num-seqs", str(SLOTS), "--max-waiting", str(WAITING)]
    options += ["--max-model-len", "2048", "--kv-cache-tokens", "4096"]
    with Replica("small-1", folder, *options) as first, Replica("small-2", folder, *options) as second:
        first.wait_ready()
        second.wait_ready()
        yield first, second


@pytest.mark.minutes
def test_overload(
    small: tuple[Replica, Replica], tmp_path_factory: pytest.TempPathFactory, seconds: float
) -> None:
    memory: list[int] = []

    async def scenario(url: str) -> Load:
        async with running(Load(url, CAPACITY)) as warm:  # memory that a first use takes
            await asyncio.sleep(seconds / 6)
        assert all(outcome.whole for outcome in warm.outcomes)
        async with running(Load(url, CLIENTS)) as load:
            for _ in range(30):
                await asyncio.sleep(seconds / 30)
                memory.append(sum(replica.memory() for replica in small))
        return load

    with Nginx(tmp_path_factory.mktemp("nginx"), small) as nginx:
        load = asyncio.run(scenario(nginx.url))
        # By nginx's clock: 120 clients in one process wait for one another when all begin at once.
        requests = {outcome.request_id for outcome in load.outcomes}
        wait_until(lambda: requests <= nginx.times().keys(), 10, "nginx has logged every request")
        took = nginx.times()

    answered = [outcome for outcome in load.outcomes if outcome.whole]
    refused = [outcome for outcome in load.outcomes if not outcome.whole]
    assert answered
    assert refused
    for outcome in refused:
        assert outcome.status == 503, outcome.error
        assert outcome.retry_after is not None
        assert int(outcome.retry_after) >= 1
        assert took[outcome.request_id] < REFUSED_WITHIN_S
    # And by the clients', less what they waited for one another.
    seen = sorted(o.ended - o.started - load.waited_for_itself(o) for o in refused)
    assert seen[-1] < REFUSED_WITHIN_S

    # Whoever is accepted has at most WAITING before him, SLOTS at a time, each for as long as the slowest.
    decoding = max(o.ended - o.first_token for o in answered if o.first_token is not None)
    first_token = max(o.first_token - o.started for o in answered if o.first_token is not None)
    assert first_token < (WAITING / SLOTS + 1) * (decoding + REFUSED_WITHIN_S)

    assert max(memory[-5:]) < MEMORY_RISE * max(memory[:5])
    slowest = max(took[outcome.request_id] for outcome in refused)
    print(
        f"{len(answered)} answered, {len(refused)} refused within {slowest:.2f} s, by the clients' clocks "
        f"{max(o.ended - o.started for o in refused):.2f} s, less what they waited for one another "
        f"{seen[-1]:.2f} s; first token within {first_token:.1f} s, slowest decode {decoding:.1f} s; memory "
        f"{memory[0] / 2**20:.0f} to {memory[-1] / 2**20:.0f} MiB"
    )
