"""A real Prometheus with the deployed configuration scrapes two real replicas under load.

Every query of every panel returns data, every alert and recording rule evaluates, promtool's unit tests pass.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.common import free_port
from tests.system.support import DOCKER, Load, Nginx, Process, Replica, program, running, wait_until

PROMETHEUS = DOCKER / "prometheus"
PROMETHEUS_S = 15.0
SCRAPE = "1s"
WINDOW = "30s"
"""Stands for Grafana's $__rate_interval."""


class Prometheus(Process):
    """Prometheus with docker/prometheus; only targets and intervals differ."""

    def __init__(self, folder: Path, replicas: tuple[Replica, Replica]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
        for number, replica in enumerate(replicas, 1):
            text = text.replace(f"replica-{number}:8000", replica.address)
        text = text.replace("localhost:9090", f"127.0.0.1:{self.port}").replace(
            "_interval: 5s", f"_interval: {SCRAPE}"
        )
        text = text.replace("_interval: 15s", f"_interval: {SCRAPE}")
        (folder / "prometheus.yml").write_text(text)
        for name in ("rules.yml", "alerts.yml"):
            (folder / name).write_text((PROMETHEUS / name).read_text(encoding="utf-8"))
        command = [
            program("prometheus", "prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        super().__init__("prometheus", command, folder)

    def start(self) -> None:
        super().start()
        self.wait_answering(f"{self.url}/-/ready", PROMETHEUS_S)

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=20, trust_env=False)
        body = answer.json()
        assert body["status"] == "success", (parameters, body)
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector now; a scalar as one sample."""
        data = self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        found: list[dict[str, Any]] = data["result"]
        return found


def panel_queries() -> list[tuple[str, str]]:
    """(dashboard / panel / legend, PromQL with Grafana's variables filled in) of every query."""
    found = []
    for file in sorted((DOCKER / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", WINDOW).replace("$instance", ".+")
                found.append((f"{file.stem} / {panel['title']} / {target['legendFormat']}", expression))
    return found


@pytest.fixture(scope="module")
def loaded(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    replicas: tuple[Replica, Replica],
    seconds: float,
) -> Iterator[Prometheus]:
    """Prometheus, after load on both replicas and a refused request."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        Prometheus(folder, replicas) as prometheus,
        Nginx(tmp_path_factory.mktemp("nginx"), replicas) as nginx,
    ):

        async def scenario() -> float:
            for clients in (2, 8):
                async with running(Load(nginx.url, clients)):
                    await asyncio.sleep(max(seconds / 2, 8.0))
                    busy_until = time.time()
            return busy_until

        started = time.time()
        ended = asyncio.run(scenario())
        if pictures := request.config.getoption("--pictures"):
            command = [sys.executable, str(DOCKER / "grafana" / "pictures.py"), prometheus.url, pictures]
            command += ["--end", str(ended), "--minutes", str((ended - started) / 60)]
            for replica in replicas:
                command += ["--name", f"{replica.address}={replica.name}"]
            subprocess.run(command, check=True)
        yield prometheus


def test_it_scrapes_both_replicas_and_loads_every_rule(
    loaded: Prometheus, replicas: tuple[Replica, Replica]
) -> None:
    up = {
        sample["metric"]["instance"]: sample["value"][1] for sample in loaded.query('up{job="medusa-serve"}')
    }
    assert up == {replica.address: "1" for replica in replicas}
    rules = [rule for group in loaded.get("rules")["groups"] for rule in group["rules"]]
    text = (PROMETHEUS / "rules.yml").read_text() + (PROMETHEUS / "alerts.yml").read_text()
    assert len(rules) == text.count("- record:") + text.count("- alert:")
    wait_until(lambda: all_healthy(loaded), PROMETHEUS_S, "every rule was evaluated without error")


def all_healthy(prometheus: Prometheus) -> bool:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule for rule in rules if rule.get("lastError")] == []
    return all(rule["health"] == "ok" for rule in rules)


def test_every_panels_query_returns_data(loaded: Prometheus) -> None:
    queries = panel_queries()
    assert len(queries) > 50
    empty = []
    for name, expression in queries:
        values = [float(sample["value"][1]) for sample in loaded.query(expression)]
        if not values or all(value != value for value in values):  # nothing, or not a number
            empty.append(f"{name}: {expression}")
    assert empty == []


def test_recording_rules_have_values_for_both_replicas(
    loaded: Prometheus, replicas: tuple[Replica, Replica]
) -> None:
    rules = [rule for group in loaded.get("rules")["groups"] for rule in group["rules"]]
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert len(recorded) >= 6
    for name in recorded:
        assert {sample["metric"]["instance"] for sample in loaded.query(name)} == {
            r.address for r in replicas
        }, name
    lengths = [float(sample["value"][1]) for sample in loaded.query("medusa:acceptance_length:mean5m")]
    assert all(length >= 1 for length in lengths)


def test_no_alert_fires_on_healthy_replicas(loaded: Prometheus) -> None:
    assert loaded.query('ALERTS{alertstate="firing"}') == []


def test_an_alert_fires_when_its_replica_is_gone(
    loaded: Prometheus, replicas: tuple[Replica, Replica]
) -> None:
    """The expression only: the waiting time is promtool's to test."""
    first, _ = replicas
    first.stop()
    try:
        found = 'up{job="medusa-serve"} == 0'
        wait_until(lambda: loaded.query(found), PROMETHEUS_S, "Prometheus sees it")
        assert [sample["metric"]["instance"] for sample in loaded.query(found)] == [first.address]
        pending = 'ALERTS{alertname="MedusaReplicaDown",alertstate="pending"}'
        wait_until(lambda: loaded.query(pending), PROMETHEUS_S, "the alert is pending")
    finally:
        first.start()
        first.wait_ready()


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "--syntax-only", "prometheus.yml"],
        ["check", "rules", "rules.yml", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=["config", "rules", "unit tests"],
)
def test_promtool(arguments: list[str]) -> None:
    done = subprocess.run(
        [program("promtool", "prometheus"), *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
