"""What can be told of the image and the compose file without a Docker engine.

tests/system/test_image.py executes the Dockerfile's steps; here are its form and what must agree.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.lifecycle import HANDSHAKE_S
from server.protocol import KEEP_ALIVE_S
from server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
SCHEMA = json.loads(Path(__file__).with_name("compose-spec.json").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SETTINGS = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
PACKAGES = {"engine", "server", "training"}
OWN_VARIABLES = {"MEDUSA_CACHE"}  # read by engine/model/embedded.py
CLOSING_S = 5
"""Room between the end of a drain and the kill."""


def env_file() -> dict[str, str]:
    lines = (DOCKER / ".env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolate(value: Any, variables: dict[str, str]) -> Any:
    """Compose's `${NAME}` and `${NAME:-default}` in every string; fails on any other form."""
    if isinstance(value, dict):
        return {key: interpolate(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    if isinstance(value, str):
        filled = re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda m: variables.get(m[1], "") or m[2] or "", value)
        assert "$" not in filled, value
        return filled
    return value


def compose(**variables: str) -> dict[str, Any]:
    read = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    found: dict[str, Any] = interpolate(read, env_file() | variables)
    return found


def seconds(text: str) -> float:
    assert text.endswith("s"), text
    return float(text[:-1])


def hadolint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run(
        [program, "-"], input=dockerfile, capture_output=True, text=True, timeout=60, check=False
    )


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    found = hadolint(DOCKERFILE)
    assert found.returncode == 0, found.stdout
    assert hadolint(DOCKERFILE.replace("--yes ", "")).returncode != 0  # it does look


def test_every_base_image_has_an_exact_version() -> None:
    images = re.findall(r"^ARG \w+_BASE=(\S+)", DOCKERFILE, re.MULTILINE)
    images += [s["image"] for s in compose()["services"].values() if "build" not in s]
    assert len(images) == 5
    for image in images:
        assert re.search(r":[a-z]*-?v?\d[\w.-]*\d", image), image


def test_the_dockerfile_sets_settings_that_exist() -> None:
    names = set(re.findall(r"^(?:ENV)?\s+(MEDUSA_\w+)=", DOCKERFILE, re.MULTILINE))
    assert {"MEDUSA_HOST", "MEDUSA_CACHE"} <= names <= SETTINGS | OWN_VARIABLES


def context() -> set[str]:
    """What .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return {line[1:].rstrip("/") for line in lines if line.startswith("!")}


def test_the_build_context_holds_what_the_dockerfile_copies_and_nothing_else() -> None:
    allowed = context()
    assert allowed >= PACKAGES
    assert {"pyproject.toml", "constraints.txt", "configs", "README.md", "LICENSE"} <= allowed
    assert not {"tests", "benchmarks", ".venv", ".git"} & allowed


def wheel(folder: Path) -> set[str]:
    """The files of the wheel that this source folder gives."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_the_cuda_image_has_what_triton_compiles_its_launchers_with() -> None:
    base = DOCKERFILE.split("AS base-cuda")[1].split("\nFROM ")[0]
    assert {"gcc", "libc6-dev", "python3-dev"} <= set(base.split())
    assert "TRITON_CACHE_DIR=/cache/" in DOCKERFILE  # all else is read-only


def test_the_layer_of_dependencies_is_built_from_the_files_that_are_there_by_then(tmp_path: Path) -> None:
    copied = re.search(r"^COPY (.+) \./$", DOCKERFILE, re.MULTILINE)
    touched = re.search(r"^RUN touch (.+) \\$", DOCKERFILE, re.MULTILINE)
    assert copied is not None
    assert touched is not None
    for name in copied[1].split():
        shutil.copy(ROOT / name, tmp_path)
    for name in touched[1].split():
        (tmp_path / name).touch()
    assert all(".dist-info/" in name for name in wheel(tmp_path))


def test_the_context_gives_a_wheel_with_every_package_and_the_shipped_heads(tmp_path: Path) -> None:
    for name in context():
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    files = wheel(tmp_path)
    heads = "share/medusa-serve/smollm2-135m/medusa_lm_head.safetensors"
    assert any(name.endswith(f".data/data/{heads}") for name in files)
    modules = {str(path.relative_to(ROOT)) for top in PACKAGES for path in (ROOT / top).rglob("*.py")}
    assert modules == {name for name in files if name.endswith(".py")}


@pytest.mark.parametrize("variables", [{}, {"COMPOSE_PROFILES": "gpu", "MEDUSA_MODEL": "some/model"}])
def test_the_compose_file_is_valid(variables: dict[str, str]) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(compose(**variables))
    broken = compose()
    broken["services"]["nginx"]["read_onyl"] = True
    assert not jsonschema.Draft7Validator(SCHEMA).is_valid(broken)


def test_up_alone_starts_two_cpu_replicas_and_the_rest() -> None:
    profile = env_file()["COMPOSE_PROFILES"]
    started = {
        name
        for name, service in compose()["services"].items()
        if profile in service.get("profiles", [profile])
    }
    assert started == {"cpu-1", "cpu-2", "nginx", "prometheus", "grafana"}


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_profile_has_two_replicas_under_the_names_that_nginx_and_prometheus_use(profile: str) -> None:
    services = compose()["services"]
    replicas = [service for service in services.values() if service.get("profiles") == [profile]]
    aliases = [replica["networks"]["default"]["aliases"][0] for replica in replicas]
    assert aliases == ["replica-1", "replica-2"]
    upstreams = services["nginx"]["environment"]["NGINX_UPSTREAMS"]
    scraped = (DOCKER / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    for alias in aliases:
        assert f"server {alias}:8000 max_fails=0 resolve;" in upstreams
        assert f"{alias}:8000" in scraped


def test_what_compose_hands_to_replicas_are_settings_and_all_of_them_stand_in_the_env_file() -> None:
    services = compose()["services"]
    for name in ("cpu-1", "cpu-2", "gpu-1", "gpu-2"):
        given = {key for key in services[name]["environment"] if key.startswith(ENV_PREFIX)}
        assert given <= SETTINGS
    assert {key for key in env_file() if key.startswith(ENV_PREFIX)} == given - {"MEDUSA_DRAIN_TIMEOUT"}
    # Nothing set: every value is empty, which the settings read as unset.
    assert {services["cpu-1"]["environment"][key] for key in given - {"MEDUSA_DRAIN_TIMEOUT"}} == {""}


def test_every_mounted_file_exists_and_every_root_is_read_only() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./") and source != "./models":
                assert (DOCKER / source).exists(), volume


def test_docker_waits_for_the_drain() -> None:
    services = compose()["services"]
    drain = float(services["cpu-1"]["environment"]["MEDUSA_DRAIN_TIMEOUT"])
    for name in ("cpu-1", "cpu-2", "gpu-1", "gpu-2", "nginx"):
        assert seconds(services[name]["stop_grace_period"]) >= drain + HANDSHAKE_S + CLOSING_S, name
    assert seconds(services["nginx"]["environment"]["NGINX_SHUTDOWN_TIMEOUT"]) >= drain


def test_the_documentation_has_the_times_of_the_files() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = page.split("| | drain | before it | killed after |\n")[1].splitlines()
    stated = {
        row.split("|")[1].strip(" `"): [int(n) for n in re.findall(r"(\d+) s", row)] for row in rows[1:4]
    }
    pod = yaml.safe_load((DOCKER / "kubernetes" / "cpu" / "deployment.yaml").read_text())["spec"]["template"]
    pre_stop = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1]
    ray = yaml.safe_load((DOCKER / "ray" / "serve.yaml").read_text())["applications"][0]["args"]
    replica = compose()["services"]["cpu-1"]
    drain = int(replica["environment"]["MEDUSA_DRAIN_TIMEOUT"])
    assert stated["docker compose"] == [drain, seconds(replica["stop_grace_period"])]
    assert stated["Kubernetes"] == [drain, int(pre_stop), pod["spec"]["terminationGracePeriodSeconds"]]
    assert stated["Ray Serve"] == [ray["drain_timeout"], ray["drain_timeout"] + HANDSHAKE_S]


def test_nginx_closes_idle_connections_before_the_server_does() -> None:
    template = (DOCKER / "nginx" / "nginx.conf.template").read_text(encoding="utf-8")
    kept = re.search(r"keepalive_timeout (\d+)s", template)
    assert kept is not None
    assert int(kept[1]) < KEEP_ALIVE_S
    used = set(re.findall(r"\$\{(NGINX_\w+)\}", template))
    assert used <= compose()["services"]["nginx"]["environment"].keys() - os.environ.keys()


def test_nginx_takes_every_body_that_the_server_takes() -> None:
    size = compose()["services"]["nginx"]["environment"]["NGINX_MAX_BODY"]
    assert int(size.removesuffix("m")) * 2**20 >= Settings.model_fields["max_body_bytes"].default
