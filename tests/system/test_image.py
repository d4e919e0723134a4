"""The Dockerfile's steps, executed in a clean Debian, and the server run there as the image runs it.

Where no Docker engine runs, root can do what it would: debootstrap gives the CPU base image's distribution,
each RUN runs in a chroot of it, and the entry point is started as PID 1 of a PID namespace, on a read-only
root, as the image's user. Needs root, debootstrap and the network.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from benchmarks.common import free_port
from tests.system.support import MODEL, ROOT, START_S, Process, answers, program

pytestmark = pytest.mark.minutes

SUITE = "bookworm"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Stage:
    """A build stage: its file system, and what instructions have set."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    args: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    exec_forms: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest of the line) without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def substitute(text: str, values: dict[str, str]) -> str:
    """`${NAME}` and `$NAME`, as Docker fills them in outside RUN."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), text)


class Builder:
    """Builds the stages that the last one needs.

    Args:
        base: a fresh file system of the CPU base image's distribution.
        folder: where the stages go.
        args: build arguments.
    """

    def __init__(self, base: Path, folder: Path, **args: str) -> None:
        self._base, self._folder, self._given = base, folder, args
        self._global: dict[str, str] = {}
        self._stages: dict[str, Stage] = {}

    def build(self) -> Stage:
        stage: Stage | None = None
        for name, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
            if name == "FROM":
                source, _, alias = substitute(rest, self._global).partition(" AS ")
                stage = self._from(source, alias)
            elif stage is None:
                self._arg(self._global, rest)
            elif stage.root != Path():  # else a stage for another variant
                self._do(stage, name, rest)
        assert stage is not None
        return stage

    def _from(self, source: str, alias: str) -> Stage:
        if "cuda" in source or "cuda" in alias:
            return Stage(Path())
        parent = self._stages.get(source)
        stage = Stage(self._folder / alias)
        if parent is None:
            assert source == self._global["CPU_BASE"]
            assert f"debian:{SUITE}" in source
        else:
            stage.env, stage.user, stage.folder = dict(parent.env), parent.user, parent.folder
        subprocess.run(["cp", "-a", parent.root if parent else self._base, stage.root], check=True)
        self._stages[alias] = stage
        return stage

    def _arg(self, values: dict[str, str], rest: str) -> None:
        name, _, default = rest.partition("=")
        values[name] = self._given.get(name, default or self._global.get(name, ""))

    def _do(self, stage: Stage, name: str, rest: str) -> None:
        values = stage.args | stage.env
        if name == "ARG":
            self._arg(stage.args, rest)
        elif name == "RUN":
            mounts = f"mount -t proc proc {stage.root}/proc"
            for index in _local_indexes():
                mounts += f" && mkdir -p {stage.root}{index} && mount --bind {index} {stage.root}{index}"
            inside = shlex.quote(f"cd {stage.folder} && {rest}")
            command = [
                "unshare",
                "--mount",
                "sh",
                "-c",
                f"{mounts} && exec chroot {stage.root} sh -c {inside}",
            ]
            done = subprocess.run(
                command, env=self._environment(stage), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        elif name == "COPY":
            self._copy(stage, shlex.split(rest))
        elif name == "WORKDIR":
            stage.folder = rest
            (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name in ("ENV", "LABEL"):
            target = stage.env if name == "ENV" else stage.labels
            target |= dict(pair.split("=", 1) for pair in shlex.split(substitute(rest, values)))
        elif name == "USER":
            stage.user = rest
        elif name == "VOLUME":
            stage.volumes.append(rest)
        elif name in ("ENTRYPOINT", "CMD"):
            stage.exec_forms[name] = json.loads(rest)  # the exec form: no shell between signals and server
        elif name == "HEALTHCHECK":
            stage.exec_forms[name] = json.loads(rest.split("CMD ", 1)[1])
        else:
            assert name in ("EXPOSE", "STOPSIGNAL"), name

    def _environment(self, stage: Stage) -> dict[str, str]:
        """What Docker gives, and how this machine reaches the package registries."""
        proxies = {k: v for k, v in os.environ.items() if re.match(r"(?i)(https?|no)_proxy$|PIP_", k)}
        return {"HOME": "/root", **proxies, **stage.args, **stage.env}

    def _copy(self, stage: Stage, words: list[str]) -> None:
        *sources, destination = [word for word in words if not word.startswith("--")]
        origin = next((word.split("=")[1] for word in words if word.startswith("--from=")), None)
        target = stage.root / (
            stage.folder.lstrip("/") if destination in (".", "./") else destination.lstrip("/")
        )
        for source in sources:
            if origin is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(
                    ["cp", "-a", self._stages[origin].root / source.lstrip("/"), target], check=True
                )
            elif source == ".":
                self._copy_context(target)
            elif (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, target)

    def _copy_context(self, target: Path) -> None:
        """What .dockerignore lets through."""
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
            if line.startswith("!") and (source := ROOT / line[1:].rstrip("/")).exists():
                ignored = shutil.ignore_patterns("__pycache__", "*.py[cod]")
                if source.is_dir():
                    shutil.copytree(source, target / source.name, dirs_exist_ok=True, ignore=ignored)
                else:
                    shutil.copy(source, target)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if os.geteuid() != 0:
        pytest.fail(
            "needs root (chroot, mount); run `sudo make test-system` or deselect tests/system/test_image.py"
        )
    folder = tmp_path_factory.mktemp("image")
    base = folder / "debian"
    subprocess.run(
        [program("debootstrap", "debootstrap"), "--variant=minbase", SUITE, str(base)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for name in ("etc/resolv.conf", "etc/hosts"):
        shutil.copy(f"/{name}", base / name)
    _let_in_this_machines_registries(base)
    yield Builder(base, folder, TORCH_INDEX=os.environ.get("TORCH_INDEX", "")).build()
    shutil.rmtree(folder, ignore_errors=True)


def _let_in_this_machines_registries(base: Path) -> None:
    """This machine's settings of pip and apt, and its certificates: a build behind a mirror needs them."""
    for name in ("etc/pip.conf", "root/.config/pip/pip.conf", "root/.pip/pip.conf"):
        if (source := Path("/") / name).exists():
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, base / name)
    for name in ("etc/apt/apt.conf.d", "etc/ssl/certs", "usr/local/share/ca-certificates"):
        if (source := Path("/") / name).is_dir():
            shutil.copytree(source, base / name, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def _local_indexes() -> list[str]:
    """Folders of this machine that pip's configuration names as sources."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    named = re.findall(
        r"(?:file://|[' ])(/[\w/.-]+)", f"{done.stdout} {os.environ.get('PIP_FIND_LINKS', '')}"
    )
    folders = {path.removesuffix("/simple").rstrip("/") for path in named}
    return sorted(path for path in folders if Path(path).is_dir())


class Container(Process):
    """The image's entry point as PID 1, on a read-only root with /cache and /tmp writable, as its user."""

    def __init__(self, image: Stage, cache: Path, **env: str) -> None:
        self.image = image
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = shlex.join(image.exec_forms["ENTRYPOINT"] + image.exec_forms["CMD"])
        root = image.root
        script = (
            f"mount --bind {root} {root} && mount -o remount,ro,bind {root}"
            f" && mount --bind {cache} {root}/cache && mount -t tmpfs tmpfs {root}/tmp"
            f" && mount -t proc proc {root}/proc && mount --bind /dev {root}/dev"
            f" && exec chroot --userspec={image.user} {root} sh -c 'cd {image.folder} && exec {command}'"
        )
        given = {
            "PATH": "/usr/bin:/bin",
            **image.env,
            "MEDUSA_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        words = [f"{name}={value}" for name, value in given.items()]
        inner = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "env", "-i", *words]
        super().__init__("container", [*inner, "/bin/sh", "-c", script], cache.parent)

    def server_pid(self) -> int:
        """PID 1 of the namespace, as seen from outside: unshare's child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0])


@pytest.fixture
def cache(tmp_path: Path, image: Stage) -> Path:
    """The volume, with the owner that the image gave it."""
    folder = tmp_path / "cache"
    folder.mkdir()
    owner = (image.root / "cache").stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    return folder


def test_the_steps_give_a_server_that_is_not_root_and_labelled(image: Stage) -> None:
    assert image.user == "10001:10001"
    assert (image.root / "cache").stat().st_uid == 10001
    assert image.volumes == ["/cache"]
    assert image.labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert image.labels["medusa-serve.variant"] == "cpu"
    done = subprocess.run(
        ["chroot", "--userspec=10001:10001", str(image.root), "/opt/venv/bin/medusa-serve", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"medusa-serve {image.labels['org.opencontainers.image.version']}")
    assert not list(image.root.glob("opt/venv/**/tests/system"))


def test_it_serves_from_a_read_only_root_and_sigterm_ends_it(image: Stage, cache: Path) -> None:
    options = {"MEDUSA_MAX_NUM_SEQS": "2", "MEDUSA_KV_CACHE_TOKENS": "4096", "MEDUSA_MAX_MODEL_LEN": "1024"}
    with Container(image, cache, **options) as container:
        container.wait_answering(f"{container.url}/ready", START_S)
        pid = container.server_pid()
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^Uid:\s+10001\s+10001", status, re.MULTILINE)
        assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)  # it is PID 1
        answer = httpx.post(
            f"{container.url}/v1/chat/completions",
            json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
            timeout=60,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        health = image.exec_forms["HEALTHCHECK"]
        check = [
            "chroot",
            "--userspec=10001:10001",
            str(image.root),
            "env",
            f"MEDUSA_PORT={container.port}",
            *health,
        ]
        assert subprocess.run(check, check=False).returncode == 0
        started = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        assert container.wait(30) in (0, 128 + signal.SIGTERM)
        assert time.monotonic() - started < 15
        assert subprocess.run(check, check=False, stderr=subprocess.DEVNULL).returncode != 0
        assert (cache / "medusa-serve").is_dir()
        assert not answers(f"{container.url}/health")


def test_sigterm_ends_it_while_it_loads(image: Stage, cache: Path) -> None:
    with Container(image, cache) as container:
        time.sleep(3)
        assert container.running, container.log.read_text()
        os.kill(container.server_pid(), signal.SIGTERM)
        container.wait(10)
