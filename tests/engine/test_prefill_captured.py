"""The promises of test_prefill_together.py where passes over prompts are captured; a recorded graph stands in
place of CUDA's."""

# ruff: noqa: F403
from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.prompt_runner import PromptRunner
from engine.step_results import Prefilled
from engine.types import Request, SamplingParams
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_prefill_together import *
from tests.engine.test_prefill_together import PROMPTS, SAMPLINGS, engine, outputs, shown

IN_TURN = {
    "test_all_of_it_is_captured",
    "test_one_that_fails_costs_no_other",
    "test_who_comes_back_brings_its_root",
}
"""Where steps in turn may do otherwise than those launched ahead, as a GPU's are."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    modes = {"ahead": True, "in turn": False} if metafunc.function.__name__ in IN_TURN else {"ahead": True}
    metafunc.parametrize("_mode", modes.values(), ids=modes.keys(), indirect=True)


@pytest.fixture(autouse=True)
def _mode(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setitem(support.MODE, "captured", True)
    monkeypatch.setitem(support.MODE, "ahead", request.param)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What captured runners do not have graphs for."""
    found: list[str] = []
    forward, first = PromptRunner._chunks_forward, PromptRunner._first_tokens

    def noted_pass(self: PromptRunner, chunks: list[Any]) -> torch.Tensor:
        found.append("pass")
        return forward(self, chunks)

    def noted_end(self: PromptRunner, *arguments: Any) -> list[Prefilled]:
        found.append("end")
        return first(self, *arguments)

    monkeypatch.setattr(PromptRunner, "_chunks_forward", noted_pass)
    monkeypatch.setattr(PromptRunner, "_first_tokens", noted_end)
    return found


def everything(max_tokens: int = 14) -> list[Request]:
    return [
        Request(f"{i}", tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling))
        for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
    ]


def runner_of(made: Engine) -> CapturedRunner:
    assert isinstance(made._runner, CapturedRunner)
    return made._runner


@pytest.mark.parametrize("lookup", ["on", "off"])
def test_all_of_it_is_captured(
    narrow: TinyModel, passes: list[list[int]], eager: list[str], lookup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives what eager steps give."""
    made = engine(narrow, lookup=lookup)
    found = outputs(made, everything())
    assert len(passes) >= 2
    assert not eager
    monkeypatch.setitem(support.MODE, "captured", False)
    wanted = outputs(engine(narrow, lookup=lookup), everything())
    assert {key: shown(deltas) for key, deltas in found.items()} == {
        key: shown(deltas) for key, deltas in wanted.items()
    }


def test_beyond_what_is_captured_only_the_end_is(
    narrow: TinyModel, passes: list[list[int]], eager: list[str]
) -> None:
    wanted = outputs(engine(narrow), everything())
    made = engine(narrow)
    runner_of(made).prompts = runner_of(made).prompts.up_to(32)
    passes.clear()
    found = outputs(made, everything())
    assert eager == ["pass"] * sum(sum(sizes) > 32 for sizes in passes) != []
    assert {key: shown(deltas) for key, deltas in found.items()} == {
        key: shown(deltas) for key, deltas in wanted.items()
    }


def test_who_comes_back_brings_its_root(narrow: TinyModel, passes: list[list[int]], eager: list[str]) -> None:
    """After preemption a prompt's last chunk draws nothing."""
    wanted = outputs(engine(narrow), everything(30))
    made = engine(narrow, kv_cache_tokens=144, max_model_len=80, block_size=8, prefix_caching=False)
    found = outputs(made, everything(30))
    assert made.stats.preemptions
    assert "end" in eager
    assert {key: shown(deltas) for key, deltas in found.items()} == {
        key: shown(deltas) for key, deltas in wanted.items()
    }


def test_fillers_are_no_longer_than_a_sequence(
    narrow: TinyModel, passes: list[list[int]], eager: list[str]
) -> None:
    """Else they would be rotated by what is behind the table's end."""
    requests = [Request(f"{i}", (3, 1, i), SamplingParams(temperature=0.0, max_tokens=3)) for i in range(8)]
    requests.append(
        Request("long", tuple(i % 12 for i in range(35)), SamplingParams(temperature=0.0, max_tokens=3))
    )
    settings = {"max_model_len": 40, "max_num_seqs": 16}
    made = engine(narrow, **settings)
    buckets = runner_of(made).prompts.all()
    assert any(bucket.fillers > 1 for bucket in buckets)
    assert all(bucket.longest <= 40 for bucket in buckets)
    found = outputs(made, requests)
    assert not eager
    one_by_one = engine(narrow, **settings)
    for request in requests:
        alone = outputs(one_by_one, [request])
        assert shown(found[request.request_id, 0]) == shown(alone[request.request_id, 0])


def test_a_large_model_has_them_up_to_where_the_device_takes_longer(
    narrow: TinyModel, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runner_of(engine(narrow))
    assert made._most_prompt_tokens() == made.prompts.tokens[-1]  # nothing is measured on a CPU
    monkeypatch.setattr(made, "_device", torch.device("cuda"))
    monkeypatch.setattr(
        made,
        "_share_of_launching",
        lambda bucket: {16: 1.0, 32: 0.9, 64: 0.81, 128: 0.79}.get(bucket.tokens, 1),
    )
    assert made._most_prompt_tokens() == 64
