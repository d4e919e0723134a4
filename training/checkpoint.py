"""A run's state on disk, so that it goes on exactly where it was killed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError

__all__ = ["RunLog", "RunState", "load_checkpoint", "recorded_settings", "save_checkpoint"]

_FILE = "checkpoint.pt"


@dataclass(slots=True)
class RunState:
    """Where a run stands, besides its tensors.

    Args:
        step: optimizer steps done.
        best: best score so far, tokens per step replayed on held-out answers.
        best_step: when that was.
        stale: looks since then.
        seconds: spent so far.
        tokens: positions learned from.
        loss_sum: over the steps since the last look.
        loss_steps: how many those are.
        config: the run's settings.
    """

    step: int = 0
    best: float = 0.0
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    tokens: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    config: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: RunState, tensors: dict[str, Any]) -> None:
    """Write state and tensors; a kill at any moment leaves the old checkpoint or the new one."""
    partial = folder / f"{_FILE}.partial"
    torch.save({"state": asdict(state), **tensors}, partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(folder / _FILE)


def load_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[RunState, dict[str, Any]] | None:
    """State and tensors, or None where there is no checkpoint.

    Raises:
        ConfigError: unreadable, or of a run with other settings; the text names them.
    """
    file = folder / _FILE
    if not file.is_file():
        return None
    state, loaded = _read(file, "remove it to start anew")
    different = [name for name, value in config.items() if state.config.get(name) != value]
    if different:
        values = ", ".join(
            f"{name} {state.config.get(name)!r} then, {config[name]!r} now" for name in different
        )
        raise ConfigError(
            f"{file} is of a run with other settings: {values}; give the same, or name another --output"
        )
    return state, loaded


def recorded_settings(folder: Path) -> dict[str, Any]:
    """Settings of the run that left its checkpoint in `folder`; empty where there is none.

    Raises:
        ConfigError: the checkpoint is unreadable.
    """
    file = folder / _FILE
    if not file.is_file():
        return {}
    # Mapped: the tensors beside the settings may be gigabytes.
    return _read(file, "remove it, or say --held-out", mmap=True)[0].config


def _read(file: Path, remedy: str, *, mmap: bool = False) -> tuple[RunState, dict[str, Any]]:
    try:
        loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        state = RunState(**loaded.pop("state"))
    except Exception as error:  # torch.load raises a dozen types; all mean that nobody can go on from it
        raise ConfigError(f"cannot read {file} ({error}); {remedy}") from error
    return state, loaded


class RunLog:
    """JSON lines, one per look at the held-out answers.

    Args:
        file: appended to; lines past `step`, which a killed run wrote after its checkpoint, are cut off.
        step: where the run goes on.
    """

    def __init__(self, file: Path, step: int) -> None:
        self._file = file
        lines = self.read(file) if step else []
        text = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        file.write_text(text, encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @staticmethod
    def read(file: Path) -> list[dict[str, Any]]:
        """The whole lines of a log; a kill may have cut the last one."""
        found = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found
