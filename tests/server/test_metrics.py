"""The metrics' values after traffic that is known."""

from __future__ import annotations

import pytest

from engine.fake import FakeEngine, FakeStep
from tests.server.conftest import EOS_ID, TEXT, Serve, chat_body, endless, ids, says, wait_until


def test_values_after_known_traffic(serve: Serve) -> None:
    # Per request: 1 token from prefill, then steps of 3, 3, 3, 3 and the EOS alone.
    engine = FakeEngine(
        says("Hello, world!"), vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,), draft_tokens=7
    )
    server = serve(engine)
    for stream in (True, False):
        server.chat(stream=stream)
    prompt = len(engine.submitted[0].prompt_token_ids)
    metrics = server.metrics()
    assert metrics["medusa_prompt_tokens_total"] == 2 * prompt
    assert metrics["medusa_generation_tokens_total"] == 2 * 14
    assert metrics["medusa_spec_decode_num_drafts_total"] == 2 * 5
    assert metrics["medusa_spec_decode_num_draft_tokens_total"] == 2 * 5 * 7
    accepted = "medusa_spec_decode_num_accepted_tokens_total[('source', '{}')]"
    by_source = {source: metrics[accepted.format(source)] for source in ("head", "lookup", "prediction")}
    assert by_source == {"head": 2 * 4 * 2, "lookup": 0, "prediction": 0}
    assert (metrics["medusa_tree_size"], metrics["medusa_tree_head_nodes"]) == (8, 7)
    assert metrics["medusa_explored_steps_total"] == 0
    assert metrics["medusa_num_requests_running"] == metrics["medusa_num_requests_waiting"] == 0
    assert metrics["medusa_acceptance_length_count"] == 2 * 5
    assert metrics["medusa_acceptance_length_sum"] == 2 * 13
    buckets = {
        name: value for name, value in metrics.items() if name.startswith("medusa_acceptance_length_bucket")
    }
    bounds = ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0", "7.0", "8.0", "12.0", "16.0", "+Inf"]
    expected = [2, 2, *[10] * 9]
    assert buckets == {
        f"medusa_acceptance_length_bucket[('le', '{bound}')]": value
        for bound, value in zip(bounds, expected, strict=True)
    }
    assert metrics["medusa_time_to_first_token_seconds_count"] == 2
    assert 0 < metrics["medusa_time_to_first_token_seconds_sum"] < 5
    assert metrics["medusa_time_per_output_token_seconds_count"] == 2


def test_reuse_and_what_had_drafted_are_counted(serve: Serve) -> None:
    script = [FakeStep(ids("a"), cached_tokens=7), FakeStep(ids("bcd"), accepted_prediction_tokens=2)]
    engine = FakeEngine(lambda _r, _i: script, vocab_size=TEXT.vocab_size, draft_tokens=7)
    engine.stats.explored_steps = 3
    server = serve(engine)
    server.chat(n=2)
    metrics = server.metrics()
    accepted = "medusa_spec_decode_num_accepted_tokens_total[('source', '{}')]"
    assert (metrics[accepted.format("head")], metrics[accepted.format("prediction")]) == (0, 4)
    prompt = len(engine.submitted[0].prompt_token_ids)
    assert metrics["medusa_prefix_cache_queries_total"] == prompt
    assert metrics["medusa_prefix_cache_hits_total"] == 7
    assert metrics["medusa_explored_steps_total"] == 3


def test_times_are_measured_in_seconds(serve: Serve) -> None:
    # Six steps of at least 20 ms; the first of them ends at the first token, 13 tokens follow.
    engine = FakeEngine(
        says("Hello, world!"), step_s=0.02, vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,)
    )
    server = serve(engine)
    server.chat()
    metrics = server.metrics()
    assert 0.02 <= metrics["medusa_time_to_first_token_seconds_sum"] < 0.3
    assert 5 * 0.02 / 13 <= metrics["medusa_time_per_output_token_seconds_sum"] < 0.1
    assert metrics["medusa_spec_decode_num_drafts_total"] == 0  # plain decoding drafts nothing
    assert metrics["medusa_acceptance_length_count"] == 5


def test_each_choice_has_a_rate_and_the_request_one_first_token(serve: Serve) -> None:
    server = serve(says("Hello"))
    server.chat(n=3)
    server.chat(max_tokens=1)  # one token has no rate
    metrics = server.metrics()
    assert metrics["medusa_time_per_output_token_seconds_count"] == 3
    assert metrics["medusa_time_to_first_token_seconds_count"] == 2


def test_running_waiting_and_blocks(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.01, max_num_seqs=2, vocab_size=TEXT.vocab_size, kv_blocks=10)
    server = serve(engine)
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, n=3)):
        wait_until(lambda: engine.stats.running == 2)
        metrics = server.metrics()
        assert (metrics["medusa_num_requests_running"], metrics["medusa_num_requests_waiting"]) == (2, 1)
        blocks = {
            state: metrics[f"medusa_kv_blocks[('state', '{state}')]"] for state in ("free", "used", "cached")
        }
        assert blocks == {"free": 8, "used": 2, "cached": 0}


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_content_type_follows_the_accept_header(serve: Serve, accept: str) -> None:
    response = serve(says("x")).http.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith(accept.split(";")[0])
    assert response.text.endswith("# EOF\n") == ("openmetrics" in accept)
