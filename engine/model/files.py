"""Files of tensors in the formats models come in, behind one small interface."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.errors import WeightsError

__all__ = ["SafetensorsFile", "TensorFile", "TorchFile"]


class TensorFile(Protocol):
    """Named tensors that are read when asked for."""

    def names(self) -> Iterable[str]:
        """Of all its tensors."""

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU; it may be a view of the file, so do not write to it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it where the format allows."""


class SafetensorsFile:
    """A .safetensors file: the header is read at once, tensors from a memory map.

    Raises:
        WeightsError: it is damaged or incomplete.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def names(self) -> Iterable[str]:
        names: list[str] = self._file.keys()
        return names

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())


class TorchFile:
    """A .bin file of `torch.save`. Only tensors are unpickled (`weights_only`), so no code of the file runs.

    Raises:
        WeightsError: it is damaged, or holds something else than named tensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # The format of torch before 1.6 is no zip and cannot be mapped.
                state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise WeightsError(
                f"{path} is refused: it is damaged, or holds more than tensors ({reason}); use the model's "
                "safetensors"
            ) from error
        except (RuntimeError, OSError, ValueError, EOFError, LookupError) as error:
            raise _damaged(path, error) from error
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise WeightsError(f"{path} does not hold named tensors only, so it is no checkpoint of a model")
        self._tensors: dict[str, torch.Tensor] = state

    def names(self) -> Iterable[str]:
        return self._tensors

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)


def _damaged(path: Path, error: Exception) -> WeightsError:
    size = path.stat().st_size
    hint = " (a Git LFS pointer, not the file: run `git lfs pull`)" if size < 1024 else ""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return WeightsError(
        f"{path} is damaged or incomplete: {reason}{hint}; it has {size} bytes; download it again"
    )
