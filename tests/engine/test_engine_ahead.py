"""The promises of test_engine.py and test_features.py for eager steps that are launched ahead."""

# ruff: noqa: F401
from __future__ import annotations

import pytest

from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_engine import (
    LOOKUP,
    SETTINGS,
    check_greedy,
    check_settings,
    test_a_failed_step_fails_its_own_requests_only,
    test_a_request_without_a_seed_gets_its_own,
    test_a_seed_gives_the_same_text_tree_on_or_off_alone_or_batched,
    test_a_trace_shows_the_step,
    test_abort_frees_everything_at_once,
    test_choices_differ_and_repeat,
    test_eos_stops_unless_ignored,
    test_few_tokens_are_few,
    test_one_choice_can_be_aborted,
    test_output_ends_exactly_at_the_context_limit,
    test_prompt_tokens_are_counted_once_a_request,
    test_prompt_tokens_are_counted_though_the_first_choice_is_dropped,
    test_stats_add_up,
    test_stop_ids_end_the_output_inside_an_accepted_run,
    test_values_that_are_not_finite_end_their_own_request_only,
)
from tests.engine.test_features import (
    test_a_prediction_is_followed_and_changes_nothing,
    test_a_prefix_is_reused_within_its_salt_only,
    test_a_request_caps_its_own_tree,
    test_choices_share_one_prefill,
    test_features_give_one_text_whatever_the_tree_and_the_batch,
    test_forbidden_and_forced_tokens,
    test_logprobs_are_transformers_raw_ones,
    test_logprobs_end_where_the_output_does,
    test_logprobs_of_a_single_possible_token_are_finite,
    test_typical_takes_more_and_greedy_stays_exact,
)


@pytest.fixture(autouse=True)
def _mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.MODE, "ahead", True)


@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_is_transformers_greedy(
    tiny: TinyModel, narrow: TinyModel, certain: TinyModel, settings: dict
) -> None:
    """What is launched ahead comes undone by who joins, and by who accepts more than was foreseen: hardly
    ever, often, or nearly always, of which the last two differ by the tree alone."""
    for model in (tiny, narrow, certain) if settings["tree"] in ("auto", 64) else (narrow,):
        check_settings(model, settings, 2)
    if "kv_cache_tokens" in settings:  # too few for who is there, if all are at once
        check_settings(narrow, settings, 0)


@pytest.mark.parametrize("settings", LOOKUP)
def test_greedy_with_lookup_alone_is_transformers_greedy(certain: TinyModel, settings: dict) -> None:
    engine = support.make_engine(certain.folder, **settings)
    check_greedy(certain, engine, 2)
    assert settings["tree"] == "auto" or engine.stats.accepted_by_source["lookup"] > 50
    assert engine.stats.accepted_by_source["head"] == 0
