"""Checkpoints of `torch.save`: one file, shards, the old format, and what must not be unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import WeightsError
from engine.model.files import TorchFile
from engine.model.weights import Checkpoint
from tests.support import greedy, greedy_reference, make_engine, run_all, save_model, tiny_llama

Tensors = dict[str, torch.Tensor]


def as_bin(folder: Path, *, shards: int = 1, **options: Any) -> Tensors:
    """The folder's model.safetensors as pytorch_model.bin instead, of `shards` files."""
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.get(name).clone() for name in sorted(checkpoint.names)}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return tensors
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        names = list(tensors)[number::shards]
        torch.save({name: tensors[name] for name in names}, folder / file, **options)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "before-1.6"])
def test_a_model_in_bin_files_runs(tmp_path: Path, shards: int, zip_format: bool) -> None:
    model = tiny_llama()
    save_model(model, tmp_path)
    tensors = as_bin(tmp_path, shards=shards, _use_new_zipfile_serialization=zip_format)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.get(name), tensor)
    outputs = run_all(make_engine(tmp_path), [greedy("r", [3, 14, 15], 8)])
    assert outputs["r", 0] == greedy_reference(model, [3, 14, 15], 8)


def test_safetensors_are_taken_before_bin(tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert "model.norm.weight" in Checkpoint(tmp_path).names


class Attack:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/medusa-serve-was-attacked"),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is refused.*more than tensors"):
        TorchFile(tmp_path / "pytorch_model.bin")
    assert not Path("/tmp/medusa-serve-was-attacked").exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 cut"])
def test_damaged_bin_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is (damaged|refused)"):
        TorchFile(tmp_path / "pytorch_model.bin")


def test_cut_bin_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is damaged"):
        TorchFile(file)


@pytest.mark.parametrize("value", [[torch.ones(1)], {"epoch": 3, "weight": torch.ones(1)}])
def test_other_objects_are_no_checkpoint(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="does not hold named tensors"):
        TorchFile(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps({"epoch": 3}, protocol=2))
    with pytest.raises(WeightsError):
        TorchFile(tmp_path / "y.bin")


def test_a_training_checkpoint_gives_its_state_dict(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "x.bin")
    assert list(TorchFile(tmp_path / "x.bin").names()) == ["weight"]
