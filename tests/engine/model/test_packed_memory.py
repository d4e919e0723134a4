"""Products with packed weights do not keep memory for each number of rows that they have met."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from engine.model.layers import Linear

PROGRAM = """
import os
import torch
from benchmarks.soak import rss_mib
from engine.model.layers import Linear

torch.set_num_threads(1)
shapes = ((64, 96), (64, 64), (64, 192), (96, 64))
linears = [Linear(*shape, bias=False, dtype=torch.float32) for shape in shapes]
for linear in linears:
    linear.weight.normal_()
    linear.pack()
first = 0.0
for rows in range(1, 251):
    for linear in linears:
        linear(torch.ones(rows, linear.in_features))
    if rows == 50:
        first = rss_mib(os.getpid())
print(rss_mib(os.getpid()) - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_numbers_of_rows_do_not_add_up() -> None:
    linear = Linear(64, 64, bias=False, dtype=torch.float32)
    linear.weight.normal_()
    linear.pack()
    if linear.packed is None:
        pytest.skip("torch without oneDNN")
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    # 200 more numbers of rows with four shapes: without a bound 380 MiB.
    assert float(ran.stdout) < 40
