"""SamplingParams as vLLM's users write them."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, replace
from typing import Any

import pytest

from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from engine.vllm_names import SAMPLING

VLLMS = re.findall(
    r"\w+",
    """
    n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop
    stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids
    logprob_token_ids flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens
    include_stop_str_in_output output_kind structured_outputs logit_bias allowed_token_ids extra_args
    bad_words skip_reading_prefix_cache thinking_token_budget repetition_detection truncate_prompt_tokens
    best_of guided_decoding logits_processors use_beam_search length_penalty early_stopping
    """,
)
"""Its fields of the last releases, without those that are not for users."""


@pytest.mark.parametrize("name", VLLMS)
def test_each_of_vllms_fields_is_here_or_says_what_takes_its_place(name: str) -> None:
    known = {field.name for field in fields(SamplingParams)}
    assert (name in known) != (name in SAMPLING)
    if name in SAMPLING:
        with pytest.raises(RequestError, match=f"^{name} is not supported: "):
            SamplingParams(**{name: object()})
        for value in (None, *SAMPLING[name].passes):
            assert SamplingParams(**{name: value}) == SamplingParams()


def test_values_may_be_as_vllm_has_them() -> None:
    written = SamplingParams(
        top_k=-1, seed=-1, stop="x", stop_token_ids=[1, 2], logit_bias={3: 1.0}, bad_words=[[4, 5]]
    )
    assert written == SamplingParams(
        stop=("x",), stop_token_ids=(1, 2), logit_bias=((3, 1.0),), bad_words=((4, 5),)
    )
    assert hash(written)
    assert replace(written) == written
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, bad_words=None) == SamplingParams()
    strings = SamplingParams(bad_words=["a"])
    assert replace(strings, n=2).bad_strings == ("a",)
    assert SamplingParams(bad_words="no way").bad_strings == ("no way",)  # not its letters


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_none_is_as_good_as_the_default(name: str) -> None:
    values: dict[str, Any] = {name: None}
    assert SamplingParams(**values) == SamplingParams()


def test_a_temperature_is_what_float32_holds() -> None:
    """As an infinity it would make NaN of what is forbidden, and token 0 of every draw."""
    assert SamplingParams(temperature=3e38).temperature == 3e38
    for value in (1e39, float("inf"), float("nan"), -1e-9):
        with pytest.raises(RequestError, match=r"^temperature must be in \[0, 3e\+38\], got "):
            SamplingParams(temperature=value)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_empty_strings_are_refused_by_the_name_that_they_were_given(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be") as found:
        SamplingParams(**{name: ["a", ""]})
    assert found.value.param == name


def test_its_signature_is_that_of_its_fields() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == [f.name for f in fields(SamplingParams)]
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        SamplingParams(temprature=1)
