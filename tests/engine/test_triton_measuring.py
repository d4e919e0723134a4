"""What kernels' measurements do beside measuring."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.testing

from engine.triton_measuring import milliseconds_in_graph

pytestmark = pytest.mark.cuda


def test_a_run_begins_when_what_it_reads_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's stream does not wait for the one on which the tensors are made."""
    seen: list[str] = []

    def bench(run: Any, *, rep: int, return_mode: str) -> float:
        run()
        return 0.25

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waited"))
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", bench)
    assert milliseconds_in_graph(lambda: seen.append("ran")) == 0.25
    assert seen == ["waited", "ran"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_sees_what_was_made_just_before() -> None:
    made = torch.zeros(1, device="cuda")
    found: list[torch.Tensor] = []
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    made += 1
    milliseconds_in_graph(lambda: found.append(made.clone()))
    assert found[0] == 1
