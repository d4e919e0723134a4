"""A container's limits: in files as the kernel writes them, and in a group of this machine's kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine.limits import available_bytes, cpus, give_back_memory, limit_threads

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
CORES = cpus(Path("/nowhere"))


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {64 << 20} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def second(
    path: str, *, quota: str = "max", most: str = "max", used: int = 0, files: int = 0
) -> dict[str, str]:
    """A group of cgroup v2."""
    folder = f"sys/fs/cgroup/{path}"
    return {
        f"{folder}/cpu.max": f"{quota} 100000\n",
        f"{folder}/memory.max": f"{most}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon {used - files}\nfile {files}\nactive_file {files // 4}\n"
        f"inactive_file {files - files // 4}\n",
    }


def test_without_groups_it_is_the_machine_that_tells(tmp_path: Path) -> None:
    assert available_bytes(tree(tmp_path, {})) == 64 * GIB
    assert cpus(tmp_path) == CORES
    assert available_bytes(tmp_path / "nowhere") == 1 << 62


def test_a_containers_own_limits(tmp_path: Path) -> None:
    files = second("", quota="100000", most=str(4 * GIB), used=3 * GIB, files=2 * GIB)
    tree(tmp_path, files | {"proc/self/cgroup": "0::/\n"})
    assert available_bytes(tmp_path) == 3 * GIB  # files' pages are given up
    assert cpus(tmp_path) == 1


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = second("a", quota="150000", most=str(2 * GIB), used=GIB) | second(
        "a/b", most=str(8 * GIB), used=GIB
    )
    tree(tmp_path, files | second("a/b/c") | second("other", most="1") | {"proc/self/cgroup": "0::/a/b/c\n"})
    assert available_bytes(tmp_path) == GIB
    assert cpus(tmp_path) == 1  # and a half


def test_what_is_more_than_the_machine_has_bounds_nothing(tmp_path: Path) -> None:
    files = second("", quota="100000000", most=str(999 * GIB))
    tree(tmp_path, files | {"proc/self/cgroup": "0::/\n"})
    assert available_bytes(tmp_path) == 64 * GIB
    assert cpus(tmp_path) == CORES


def test_more_taken_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    tree(tmp_path, second("", most="100", used=200) | {"proc/self/cgroup": "0::/\n"})
    assert available_bytes(tmp_path) == 0


@pytest.mark.parametrize("inside", ["docker/1f/", ""])  # as the host sees it, and as many containers do
def test_the_first_version_of_groups(tmp_path: Path, inside: str) -> None:
    cpu, memory = f"sys/fs/cgroup/cpu/{inside}", f"sys/fs/cgroup/memory/{inside}"
    files = {
        f"{cpu}cpu.cfs_quota_us": "199999\n",
        f"{cpu}cpu.cfs_period_us": "100000\n",
        f"{memory}memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{memory}memory.usage_in_bytes": f"{GIB}\n",
        f"{memory}memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}\ntotal_active_file 8\n",
        "proc/self/cgroup": "12:memory:/docker/1f\n7:cpu,cpuacct:/docker/1f\n1:name=systemd:/\n0::/\n",
    }
    assert available_bytes(tree(tmp_path, files)) == GIB + GIB // 4 + 8
    assert cpus(tmp_path) == 1


def test_no_limit_in_the_first_version(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096\n",
        "proc/self/cgroup": "12:memory:/\n7:cpu:/\n",
    }
    assert available_bytes(tree(tmp_path, files)) == 64 * GIB
    assert cpus(tmp_path) == CORES


def test_threads_are_as_many_as_the_quota_has_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.limits._cores", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limit_threads(tree(tmp_path, {}))
    assert "OMP_NUM_THREADS" not in os.environ
    tree(tmp_path, second("", quota="320000") | {"proc/self/cgroup": "0::/\n"})
    limit_threads(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.fixture
def groups() -> Iterator[list[Path]]:
    """Of this machine's kernel: one core's time, and 3 GiB of memory."""
    first, name = Path("/sys/fs/cgroup/memory").is_dir(), f"medusa-test-{os.getpid()}"
    limits = {
        "cpu": ("cpu.cfs_quota_us", "100000") if first else ("cpu.max", "100000 100000"),
        "memory": ("memory.limit_in_bytes" if first else "memory.max", str(3 * GIB)),
    }
    made: list[Path] = []
    try:
        for controller, (file, limit) in limits.items():
            folder = Path("/sys/fs/cgroup") / (controller if first else "") / name
            if folder not in made:
                folder.mkdir()
                made.append(folder)
            (folder / file).write_text(limit)
    except OSError as error:
        for folder in made:
            folder.rmdir()
        pytest.skip(f"needs to be allowed to make a control group: {error}")
    yield made
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def test_a_command_in_a_group_of_the_kernel(groups: list[Path]) -> None:
    code = (
        "import os, pathlib, sys\n"
        "for folder in sys.argv[1:]: (pathlib.Path(folder) / 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from engine.limits import *\n"
        "from server.cli import main\n"
        "sys.argv = ['medusa-serve', '--version']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules  # which looks for its number of threads once\n"
        "import torch\n"
        "print(cpus(), torch.get_num_threads(), available_bytes())"
    )
    command = [sys.executable, "-c", code, *map(str, groups)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    usable, threads, left = map(int, done.stdout.splitlines()[-1].split())
    assert (usable, threads) == (1, 1)
    assert GIB < left < 3 * GIB  # torch is in it


def test_what_lies_between_what_is_in_use_is_given_back() -> None:
    blocks = [b"x" * (64 << 10) for _ in range(640)]
    kept = blocks[::10]
    del blocks
    before = resident_bytes()
    give_back_memory()
    assert resident_bytes() < before - (20 << 20)
    assert len(kept) == 64


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
