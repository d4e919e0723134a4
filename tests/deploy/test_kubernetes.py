"""The manifests: valid for the API, and their times add up with the server's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.lifecycle import HANDSHAKE_S
from server.metrics import METRICS
from server.routes import health
from server.settings import ENV_PREFIX, Settings

FOLDER = Path(__file__).parents[2] / "docker" / "kubernetes" / "cpu"
OLDEST = "1.29"
"""The oldest Kubernetes that the manifests are held against; the newest is the package's own."""


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return found


KUSTOMIZATION = load("kustomization.yaml")
POD = load("deployment.yaml")["spec"]["template"]["spec"]
SERVER = POD["containers"][0]


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", KUSTOMIZATION["resources"])
def test_every_manifest_is_valid(name: str, version: str) -> None:
    kubernetes_validate.validate(load(name), version, strict=True)


def test_the_validation_sees_a_mistake() -> None:
    broken = load("deployment.yaml")
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


def settings() -> dict[str, str]:
    return dict(literal.split("=", 1) for literal in KUSTOMIZATION["configMapGenerator"][0]["literals"])


def test_the_config_map_holds_settings_of_the_server() -> None:
    assert {name.removeprefix(ENV_PREFIX).lower() for name in settings()} <= Settings.model_fields.keys()


def test_the_grace_period_is_enough_for_pre_stop_and_drain() -> None:
    command = SERVER["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    pre_stop, drain = float(command[1]), float(settings()["MEDUSA_DRAIN_TIMEOUT"])
    assert POD["terminationGracePeriodSeconds"] >= pre_stop + drain + HANDSHAKE_S + 5
    # The pod leaves the Service while it still serves.
    probe = SERVER["readinessProbe"]
    assert pre_stop >= probe["periodSeconds"] * probe["failureThreshold"] + 5


def test_each_probe_asks_its_own_path() -> None:
    paths = {name: SERVER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert set(paths.values()) <= {route.path for route in health.router.routes}  # type: ignore[attr-defined]
    assert SERVER["ports"][0]["containerPort"] == 8000


def test_the_selectors_find_the_pods() -> None:
    labels = load("deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        load("deployment.yaml")["spec"]["selector"]["matchLabels"],
        load("service.yaml")["spec"]["selector"],
        load("disruption.yaml")["spec"]["selector"]["matchLabels"],
        POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_the_autoscaler_scales_on_a_metric_that_the_server_and_the_adapter_have() -> None:
    name = load("autoscaler.yaml")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    rule = load("../prometheus-adapter.yaml")["rules"]["custom"][0]
    assert name == rule["name"]["as"] == rule["name"]["matches"]
    assert rule["seriesQuery"].startswith(name + "{")
    assert name in {metric.full_name for metric in METRICS}


def test_what_is_mounted_is_what_the_image_writes_to() -> None:
    mounted = {mount["mountPath"] for mount in SERVER["volumeMounts"]}
    assert mounted == {"/cache", "/tmp"}
    assert SERVER["securityContext"]["readOnlyRootFilesystem"]
    dockerfile = (FOLDER.parents[2] / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}" in dockerfile


def test_the_gpu_variant_changes_only_the_image_and_the_resources() -> None:
    overlay = load("../gpu/kustomization.yaml")
    (patch,) = yaml.safe_load(overlay["patches"][0]["patch"])
    assert patch["path"] == "/spec/template/spec/containers/0/resources"
    deployment = load("deployment.yaml")
    deployment["spec"]["template"]["spec"]["containers"][0]["resources"] = patch["value"]
    kubernetes_validate.validate(deployment, OLDEST, strict=True)
    assert patch["value"]["limits"]["nvidia.com/gpu"] == "1"
