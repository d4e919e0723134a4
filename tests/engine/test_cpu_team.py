"""Kernels on torch's own threads: every task once, whatever the number of threads."""

from __future__ import annotations

import dis
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.registry import CPUDispatcher

import engine
from engine.cpu_team import JIT, Arguments, Team, floats, integers, task_kernel
from engine.model.quantize import blocked_runs_here

ROOT = Path(engine.__file__).parents[1]
OUT, SEEN, COUNT = 2, 3, 4


@njit(**JIT)
def _task(arguments, number):  # type: ignore[no-untyped-def]
    count = arguments[COUNT]
    integers(arguments[SEEN], (count,))[number] += 1
    total = np.float32(0.0)
    for i in range(1000):  # long enough that every thread gets some
        total += np.float32(i % (number + 1))
    floats(arguments[OUT], (count,))[number] = total


KERNEL = task_kernel(_task)


@pytest.mark.parametrize("tasks", [1, 2, 7, 1000])
def test_every_task_runs_once(threads: int, tasks: int) -> None:
    out, seen = np.zeros(tasks, dtype=np.float32), np.zeros(tasks, dtype=np.int64)
    arguments = Arguments()
    arguments[OUT], arguments[SEEN], arguments[COUNT] = out.ctypes.data, seen.ctypes.data, tasks
    team = Team()
    for turn in range(1, 4):
        team.run(KERNEL, arguments, tasks)
        assert seen.tolist() == [turn] * tasks
    assert out.tolist() == [float(sum(i % (n + 1) for i in range(1000))) for n in range(tasks)]


def test_it_is_the_team_of_torch() -> None:
    """The library that torch computes with has the entry; without it kernels run on one thread."""
    if torch.backends.openmp.is_available():
        assert Team().parallel


def test_one_thread_without_the_library() -> None:
    out, seen = np.zeros(9, dtype=np.float32), np.zeros(9, dtype=np.int64)
    arguments = Arguments()
    arguments[OUT], arguments[SEEN], arguments[COUNT] = out.ctypes.data, seen.ctypes.data, 9
    Team(library=None).run(KERNEL, arguments, 9)
    assert seen.tolist() == [1] * 9


SMALL = """
from numba import njit
from engine.cpu_team import JIT, integers, task_kernel


@njit(**JIT)
def task(arguments, number):
    integers(arguments[2], (1,))[0] += 1


kernel = task_kernel(task)
"""

ATTEND = "from engine.attention.cpu_kernels import attend; print(attend._cache_hits)"


def said(script: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_later_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is found in the folder of compiled ones by the second process that wants it."""
    import_module("engine.attention.cpu_kernels")  # compiles what no earlier process has
    assert said(ATTEND, tmp_path) == "1"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    (tmp_path / "small.py").write_text(SMALL)
    hits = [said("import small; print(small.kernel._cache_hits)", tmp_path) for _ in range(2)]
    assert hits == ["0", "1"]
    assert len(list(tmp_path.glob("numba/*/*/*._all_tasks-*.nbc"))) == 1


def compiled_functions() -> dict[str, CPUDispatcher]:
    """All of the engine's, by their full names."""
    root = Path(engine.__file__).parent
    names = {
        ".".join(("engine", *path.relative_to(root).with_suffix("").parts))
        for path in root.rglob("*.py")
        if b"numba" in path.read_bytes()
    }
    if not blocked_runs_here():
        names.remove("engine.model.int8_products")  # must not be imported there
    return {
        f"{name}.{key}": value
        for name in names
        for key, value in vars(import_module(name)).items()
        if isinstance(value, CPUDispatcher)
    }


def test_only_functions_that_store_nothing_may_round_as_they_like() -> None:
    """Others run in one of two compiled forms, after where their arrays lie: see `engine.cpu_team.SUMS`."""
    loose = {
        name: {instruction.opname for instruction in dis.get_instructions(function.py_func)}
        for name, function in compiled_functions().items()
        if function.targetoptions.get("fastmath")
    }
    assert loose, "some are"
    for name, operations in loose.items():
        assert not operations & {"STORE_SUBSCR", "STORE_SLICE"}, name
