"""Dashboards and rules name metrics that exist.

tests/system/test_prometheus.py has a real Prometheus evaluate them.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import METRICS

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))
    return found


RULES = [rule for group in load("rules.yml")["groups"] for rule in group["rules"]]
ALERTS = [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]
DASHBOARDS = runpy.run_path(str(GRAFANA / "dashboards.py"))["DASHBOARDS"]


def series() -> set[str]:
    """Every name that a query may use."""
    names = {rule["record"] for rule in RULES} | {"medusa_engine_process_resident_memory_bytes"}
    for metric in METRICS:
        parts = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.full_name + part for part in parts}
    return names


def expressions() -> Iterator[str]:
    for dashboard in DASHBOARDS.values():
        for panel in dashboard["panels"]:
            yield from (target["expr"] for target in panel["targets"])
    yield from (rule["expr"] for rule in RULES + ALERTS)


@pytest.mark.parametrize("expression", list(expressions()))
def test_queries_name_series_that_exist(expression: str) -> None:
    names = set(re.findall(r"\bmedusa[_:]\w+(?::\w+)*", expression.replace('"medusa-serve"', "")))
    assert names <= series()
    assert names or re.search(r"ALERTS|up\{|process_resident_memory_bytes", expression)


@pytest.mark.parametrize("name", ["serving", "medusa"])
def test_the_dashboards_are_what_their_script_writes(name: str) -> None:
    written = (GRAFANA / "dashboards" / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(written) == DASHBOARDS[name], "run python docker/grafana/dashboards.py"


@pytest.mark.parametrize("name", ["serving", "medusa"])
def test_panels_do_not_overlap_and_are_explained(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARDS[name]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["description"]
        assert panel["targets"]


def test_the_provisioned_data_source_is_the_one_that_panels_use() -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    source = provisioned["datasources"][0]
    scrape = load("prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    for dashboard in DASHBOARDS.values():
        for panel in dashboard["panels"]:
            assert panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_its_line_in_the_runbook_and_a_unit_test(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    assert f"### {name}\n" in OPERATIONS
    tests = [case for test in load("alerts_test.yml")["tests"] for case in test.get("alert_rule_test", [])]
    assert any(case["alertname"] == name and case["exp_alerts"] for case in tests), "never seen to fire"
    assert alert["labels"]["severity"] in ("warning", "critical")
