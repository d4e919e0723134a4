"""Which device a setting names; what goes to one together arrives as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import devices
from engine.devices import device_named, sent_together, slot_rows
from engine.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(params=["as it is", "packed"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Packed, as for a GPU, and unpacked here."""
    if request.param == "packed":
        monkeypatch.setattr(devices, "sent", lambda values, device: values)
        return torch.device("cuda")
    return CPU


@pytest.mark.parametrize("gpus", [0, 2])
def test_auto_is_a_gpu_where_there_is_one(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_named("auto") == torch.device("cuda" if gpus else "cpu")
    assert device_named("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "gpus", "reason"),
    [
        ("tpu9", 2, "not one torch knows; use 'cpu' or 'cuda'"),
        ("mps", 2, "not supported; use 'cpu' or 'cuda'"),
        ("cuda", 0, "sees no GPU here"),
        ("cuda:1", 0, "sees no GPU here"),
        ("cuda:2", 2, "sees no such GPU here, only 2"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_by_its_name(
    name: str, gpus: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=f"device '{name}' .*{reason}"):
        device_named(name)


def test_each_arrives_in_its_dtype_and_shape(device: torch.device) -> None:
    values = [
        np.arange(5),
        np.array([[0.25, -1.5], [3.0, 1e-8], [7.0, 9.0]], dtype=np.float32).T,
        np.array([3], dtype=np.int32),
        np.zeros((0, 4), dtype=np.int64),
        np.array([2**63 - 1, -1]),
    ]
    found = sent_together(*values, device=device)
    for tensor, value in zip(found, values, strict=True):
        assert tensor.dtype == torch.from_numpy(value).dtype
        assert tensor.numpy().tolist() == value.tolist()


def test_rows_of_slots_begin_where_kernels_load_sixteen_bytes() -> None:
    rows = slot_rows(3, 17, torch.float32, CPU)
    assert rows.shape == (3, 17)
    assert not rows.any()
    assert all(row.is_contiguous() and row.data_ptr() % 16 == rows.data_ptr() % 16 for row in rows.unbind())
