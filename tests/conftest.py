"""Triton's interpreter where there is no GPU, before any test imports Triton; and long files first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

LONG = (
    "test_end_to_end.py",
    "engine/attention/test_triton.py",
    "test_fake_cuda.py",
    "test_end_to_end_operations.py",
    "test_end_to_end_process.py",
    "test_end_to_end_features.py",
    "benchmarks/test_gpu.py",
    "engine/test_engine_captured.py",
    "engine/test_engine.py",
    "engine/test_engine_ahead.py",
    "engine/model/test_fused_triton.py",
    "engine/test_prefill_captured.py",
    "engine/test_random_serving.py",
    "engine/medusa/test_wrong_times.py",
    "engine/test_constrained.py",
)
"""Files that take longest, up to a minute: as the last one each would leave a core idle for that long.

The second needs hardly a kernel of numba's: beside the first, which in a fresh clone compiles most of them,
another file would compile the same.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` tells xdist to keep this order, which has files with most tests first on its own."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
