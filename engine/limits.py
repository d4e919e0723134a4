"""What this process may take of its machine: a container's limits (Linux control groups), else all of it.

`docker run --cpus 2 --memory 4g`, Kubernetes' limits and systemd's CPUQuota and MemoryMax change neither how
many cores nor how much free memory the machine shows. A process with a thread for each of 64 cores and two
cores' time stands still most of the time, and one that takes all that looks free is killed without a word.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["available_bytes", "cpus", "give_back_memory", "limit_threads"]

NO_BOUND = 1 << 62


def cpus(root: Path = Path("/")) -> int:
    """Cores whose time this process may use, at least one; of a fraction of a core nothing.

    Args:
        root: where /proc and /sys are found.
    """
    return max(1, min([_cores(), *_quotas(root)]))


def limit_threads(root: Path = Path("/")) -> None:
    """Have torch, which looks at cores alone, start no more threads than a container's quota has time for.

    To be called before torch is imported. Where OMP_NUM_THREADS is set, that is how many.

    Args:
        root: where /proc and /sys are found.
    """
    if (usable := cpus(root)) < _cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable))


def give_back_memory() -> None:
    """To the system, what was freed and the C library keeps: after something large, not in between."""
    with suppress(AttributeError, OSError, TypeError):  # another C library's
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(root: Path = Path("/")) -> int:
    """Host memory that can be had without swapping, page cache included; `NO_BOUND` where nothing tells.

    Args:
        root: where /proc and /sys are found.
    """
    lines = _read(root / "proc/meminfo").splitlines()
    free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([NO_BOUND, *free, *_memory_left(root)]))


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[int]:
    for group in _groups(root, ""):  # cgroup v2: "200000 100000" or "max 100000", in microseconds
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdecimal():
            yield int(quota) // int(period)
    for group in _groups(root, "cpu"):
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.strip().isdecimal():  # -1: no limit
            yield int(quota) // int(period)


def _memory_left(root: Path) -> Iterator[int]:
    """Of each group's limit, what is not taken. Files' pages are counted there, and given up on demand."""
    for controller, limit, used, prefix in (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        for group in _groups(root, controller):
            most, taken = _read(group / limit).strip(), _read(group / used).strip()
            if not (most.isdecimal() and taken.isdecimal()):  # "max": no limit
                continue
            statistics = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            cache = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield int(most) - int(taken) + cache


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those above, each of which may have a limit.

    Args:
        controller: of cgroup v1, or "" for v2.
    """
    mount = root / "sys/fs/cgroup" / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # A container without a namespace of groups is told the host's path and shown its own group.
            group = mount / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
