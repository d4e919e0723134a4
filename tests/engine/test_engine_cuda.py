"""The promises of test_engine.py and test_features.py on a GPU: real graphs, launched ahead, and eager steps.

In float32, against the same references. `cuda` marks them; where there is no GPU they are skipped.

Nearly all of their time is Triton's compiler's. Measuring attention's tiles compiles every candidate, in each
of the processes that start at once, so most tests take the first candidates, and the two last measure.
"""

# ruff: noqa: F401
from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CapturedRunner
from engine.loader import load
from engine.types import Request, SamplingParams
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_constrained import PATTERNS, PROMPTS, ask, greedy_reference, regex
from tests.engine.test_engine import (
    test_a_seed_gives_the_same_text_tree_on_or_off_alone_or_batched,
    test_abort_frees_everything_at_once,
    test_greedy_is_transformers_greedy,
    test_greedy_with_lookup_alone_is_transformers_greedy,
    test_values_that_are_not_finite_end_their_own_request_only,
)
from tests.engine.test_features import (
    test_a_prediction_is_followed_and_changes_nothing,
    test_features_give_one_text_whatever_the_tree_and_the_batch,
    test_forbidden_and_forced_tokens,
    test_logprobs_are_transformers_raw_ones,
    test_typical_takes_more_and_greedy_stays_exact,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True, params=["captured", "eager"])
def _mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How engines run; "served": captured, and after all that a start measures."""
    from engine.attention import triton_tuning  # Triton comes with CUDA builds of torch

    monkeypatch.setitem(support.MODE, "cuda", True)
    monkeypatch.setitem(support.MODE, "captured", request.param != "eager")
    if request.param != "served":
        monkeypatch.setattr(triton_tuning, "tuned_tiles", lambda *_, **__: {})


@pytest.mark.parametrize("_mode", ["served"], indirect=True)
def test_default_buckets_are_captured_and_timed(narrow: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings = {"heads": str(narrow.heads), "device": "cuda", "dtype": "float32", "kv_cache_tokens": 16384}
    engine = Engine(load(EngineConfig(model=str(narrow.folder), **settings), progress=False))
    assert isinstance(engine._runner, CapturedRunner)
    assert engine._ahead
    sizes = list(engine._runner.buckets)
    assert len(engine._runner._second) == 2 * (len(sizes) + len(engine._runner.prompts.chunks))
    assert len(engine._runner._first) == sum(1 if nodes == 1 else 2 for _, nodes in sizes)
    assert "captured" in caplog.text
    engine.check()


@pytest.mark.parametrize("_mode", ["served"], indirect=True)
def test_prompts_find_their_kernels_compiled(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever length, alone and with others, behind a prefix or not: Triton has done its work before."""
    from triton import knobs

    engine = support.make_engine(narrow.folder, heads=str(narrow.heads), dtype="bfloat16", tree=8)
    compiled: list[str] = []

    def note(**about: Any) -> None:
        compiled.append(about["repr"])

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    for count, longest in ((1, 20), (1, 450), (3, 40), (8, 120), (8, 12)):
        for first in range(1, 30, 4):
            lengths = [first + (longest - first) * i // count for i in range(count)]
            prompts = [[(first + i * i) % 12 for i in range(max(1, length))] for length in lengths]
            support.run_all(engine, [support.greedy(f"{i}", prompt, 3) for i, prompt in enumerate(prompts)])
    assert not compiled


@pytest.mark.parametrize("_mode", ["captured"], indirect=True)
def test_prompts_in_graphs_give_what_each_gives_without(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever length, alone and with others, behind a prefix or not, greedy and sampled."""
    # Measured, it is the device that takes longer where other tests use it.
    monkeypatch.setattr(CapturedRunner, "_share_of_launching", lambda *_: 1.0)
    settings: dict[str, Any] = {"heads": str(narrow.heads), "tree": 8, "max_num_seqs": 16}
    engine = support.make_engine(narrow.folder, **settings)
    runner = engine._runner
    assert isinstance(runner, CapturedRunner)
    assert runner.prompts.tokens[-1] >= 512
    samplings = [
        SamplingParams(temperature=0.0, max_tokens=4),
        SamplingParams(temperature=0.8, seed=3, max_tokens=4, presence_penalty=0.5, logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=0),
    ]
    requests = []
    for i, length in enumerate((1, 2, 15, 16, 17, 40, 64, 100, 190, 300, 301, 450, 33, 7, 128, 129)):
        prompt = tuple((j * j + i % 4) % 12 for j in range(length))
        requests.append(Request(f"{i}", prompt, samplings[i % 3]))
    eager = support.make_engine(narrow.folder, enforce_eager=True, **settings)
    wanted = {}
    for request in requests:
        wanted |= support.run_all(eager, [request])
    assert support.run_all(engine, requests) == wanted
    assert support.run_all(engine, requests, arrive_every=1) == wanted


def test_answers_follow_their_grammar(narrow: TinyModel) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    requests = [ask(f"r{i}", i, params, pattern) for i, pattern in enumerate(PATTERNS)]
    wanted = {
        (f"r{i}", 0): greedy_reference(narrow, PROMPTS[i], regex(pattern), 30)
        for i, pattern in enumerate(PATTERNS)
    }
    for settings in ({"tree": 33, "heads": str(narrow.heads)}, {"tree": "off"}):
        engine = support.make_engine(narrow.folder, **settings)
        assert support.run_all(engine, requests, arrive_every=1) == wanted
