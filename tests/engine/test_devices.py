"""What goes to a device together arrives as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import devices
from engine.devices import sent_together, slot_rows

CPU = torch.device("cpu")


@pytest.fixture(params=["as it is", "packed"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Packed, as for a GPU, and unpacked here."""
    if request.param == "packed":
        monkeypatch.setattr(devices, "sent", lambda values, device: values)
        return torch.device("cuda")
    return CPU


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
