"""The Ray Serve application with real replicas: it streams, scales up with load, and down losing nothing."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.common import free_port, thread_environment
from engine.errors import ConfigError
from server.lifecycle import HANDSHAKE_S
from tests.system.support import ROOT, START_S, STREAM, Load, Process, pieces, running, until, wait_until

pytestmark = [
    pytest.mark.minutes,
    # Ray's own use of pydantic, told when it is imported.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
]

CLIENTS = 8
SCALE_S = 300.0


class Ray(Process):
    """Ray with the application, autoscaling between one and two replicas of one thread."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("ray") is None:
            raise RuntimeError(
                "ray is missing; `make test-system` installs it, or: pip install 'medusa-serve[ray]'"
            )
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = {
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 3,
            "upscale_delay_s": 1,
            "downscale_delay_s": 5,
            "look_back_period_s": 5,
            "max_num_seqs": 8,
            "max_model_len": 2048,
            "kv_cache_tokens": 8192,
            "device": "cpu",
        }
        command = [sys.executable, "-m", "tests.system.ray_driver", str(self.port), json.dumps(arguments)]
        # Requests are counted every second, not every ten.
        often = {f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1" for who in ("REPLICA", "HANDLE")}
        super().__init__(
            "ray",
            command,
            folder,
            PYTHONPATH=str(ROOT),
            RAY_AUTH_MODE="disabled",
            **often,
            **thread_environment(1),
        )

    def states(self) -> list[dict[str, int]]:
        """Replicas by state, as they changed."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def replicas(self, count: int) -> bool:
        """Whether there are exactly so many, all of them running."""
        seen = self.states()
        return bool(seen) and list(seen[-1].values()) == [count] and "RUNNING" in next(iter(seen[-1]))


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    with Ray(tmp_path_factory.mktemp("ray")) as process:
        process.wait_answering(f"{process.url}/ready", START_S)
        yield process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seq": 4}, "unknown: max_num_seq"),
        ({"port": 8001}, "of no effect here.*: port"),
        ({"engine_process": "on"}, "of no effect here.*: engine_process"),
        ({"max_num_seqs": "many"}, "--max-num-seqs: must be a valid integer"),
        ({"min_replicas": 0}, "min_replicas: .*greater than or equal to 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas: below min_replicas"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    from server.ray_app import app  # here: without Ray the fixture says what to install

    with pytest.raises(ConfigError, match=message):
        app(arguments)


def test_the_deployment_follows_from_the_settings() -> None:
    from server.ray_app import app

    arguments = {"max_num_seqs": 8, "max_waiting": 5, "drain_timeout": 60, "max_replicas": 3, "cpus": 2}
    deployment = app(arguments)._bound_deployment
    config = deployment._deployment_config
    assert config.max_ongoing_requests == 8 + 5 + 1
    assert config.autoscaling_config.target_ongoing_requests == 6
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 3)
    assert config.graceful_shutdown_timeout_s >= 60 + HANDSHAKE_S
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 0}


def test_it_streams_token_by_token_and_passes_ids_and_errors_on(ray: Ray) -> None:
    echoed, count = pieces(ray.url, "one-of-ours")
    assert echoed == "one-of-ours"
    assert count > 5
    bad = httpx.post(
        f"{ray.url}/v1/chat/completions",
        json=STREAM | {"temperature": "warm"},
        timeout=60,
        trust_env=False,
    )
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "temperature"


def test_it_scales_up_with_the_load_and_down_without_losing_a_request(ray: Ray) -> None:
    async def scenario() -> tuple[Load, Load]:
        await until(lambda: ray.replicas(1), SCALE_S, "one replica")
        few = Load(ray.url, 2)
        async with running(few):  # goes on while replicas come and go
            many = Load(ray.url, CLIENTS)
            async with running(many):
                await until(lambda: ray.replicas(2), SCALE_S, "a second replica")
                await asyncio.sleep(5)
            before = len(few.outcomes)
            await until(lambda: ray.replicas(1), SCALE_S, "one replica again")
            assert len(few.outcomes) > before  # requests came while it went
        return few, many

    few, many = asyncio.run(scenario())
    outcomes = few.outcomes + many.outcomes
    assert len(outcomes) > CLIENTS
    assert [outcome for outcome in outcomes if not outcome.whole] == []


def test_a_replica_that_dies_is_replaced(ray: Ray) -> None:
    """Ray's own restart: the process goes, and another answers."""
    pids = replica_pids(ray.pid)
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)

    def another() -> bool:
        found = replica_pids(ray.pid)
        return bool(found) and found != pids

    wait_until(another, SCALE_S, "another replica")
    ray.wait_answering(f"{ray.url}/ready", START_S)
    wait_until(lambda: ray.replicas(1), SCALE_S, "one replica")


def replica_pids(driver: int) -> list[int]:
    """Processes that Ray named after a replica of our deployment, below the driver."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::ServeReplica:medusa-serve") and _below(int(folder.name), driver):
            found.append(int(folder.name))
    return sorted(found)


def _below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False
