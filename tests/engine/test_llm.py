"""The offline engine: what transformers would say, what ended how, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ContextLengthError, RequestError
from engine.llm import LLM
from engine.types import FinishReason, Request, SamplingParams
from tests.support import greedy, greedy_reference, save_model, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    config = EngineConfig(
        model=str(folder), device="cpu", max_num_seqs=2, block_size=4, max_model_len=64, tree="off"
    )
    return LLM(config)


def test_outputs_are_the_models_in_the_order_asked(llm: LLM) -> None:
    model = tiny_llama()
    prompts = [[5, 6, 7], [9, 1], [30, 31, 32, 33]]  # one more than there are slots
    outputs = llm.generate([greedy(f"r{i}", prompt, 6 + i) for i, prompt in enumerate(prompts)])
    assert [output.request_id for output in outputs] == ["r0", "r1", "r2"]
    for i, (output, prompt) in enumerate(zip(outputs, prompts, strict=True)):
        assert output.token_ids == greedy_reference(model, prompt, 6 + i)
        assert output.finish_reason is FinishReason.LENGTH
        assert output.error is None
        # The first token is the prefill's, each other one a step of plain decoding.
        assert output.num_steps == output.num_decoded == 5 + i
    llm.check()


def test_times_are_of_each_output(llm: LLM) -> None:
    first, second, waited = llm.generate([greedy(name, [4, 5], 8) for name in "abc"])
    for output in (first, second, waited):
        assert output.ttft_s is not None
        assert output.tpot_s is not None
        assert 0 < output.ttft_s < output.seconds
        assert output.tpot_s == pytest.approx((output.seconds - output.ttft_s) / 7)
    assert waited.ttft_s is not None
    assert waited.ttft_s >= min(first.seconds, second.seconds)  # it got the slot of one that had ended


def test_one_output_a_choice(llm: LLM) -> None:
    request = Request("n", (3, 4, 5), SamplingParams(n=2, seed=1, max_tokens=5))
    outputs = llm.generate([request])
    assert [(output.index, len(output.token_ids)) for output in outputs] == [(0, 5), (1, 5)]


def test_a_single_token_has_no_time_per_token(llm: LLM) -> None:
    (output,) = llm.generate([greedy("one", [1, 2], 1)])
    assert len(output.token_ids) == 1
    assert output.tpot_s is None


def test_closed_early_it_leaves_nothing_behind(llm: LLM) -> None:
    steps = llm.steps([greedy(name, [8, 9], 40) for name in "abc"])
    assert next(steps)
    with pytest.raises(RuntimeError, match="one call at a time"):
        llm.generate([greedy("other", [1], 2)])
    steps.close()  # type: ignore[attr-defined]
    llm.check()
    assert llm.stats.running == llm.stats.waiting == 0
    assert len(llm.generate([greedy("a", [8, 9], 4)])[0].token_ids) == 4


def test_a_request_that_cannot_run_is_refused_before_any_runs(llm: LLM) -> None:
    before = llm.stats.num_steps
    with pytest.raises(ContextLengthError):
        llm.generate([greedy("a", [1, 2], 4), greedy("b", [1] * 60, 20)])
    with pytest.raises(RequestError, match="must differ"):
        llm.generate([greedy("a", [1, 2], 4), greedy("a", [3, 4], 4)])
    assert llm.stats.num_steps == before
    llm.check()
