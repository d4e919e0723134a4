"""The metrics' values after traffic that is known."""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.fake import FakeEngine, FakeStep
from engine.stats import EngineStats
from engine.types import Request
from server import __version__
from server.metrics import METRICS, PREFIX
from tests.server.conftest import EOS_ID, MODEL, TEXT, Serve, chat_body, endless, ids, says, wait_until

ROOT = Path(__file__).parents[2]


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
    assert metrics["medusa_spec_decode_num_draft_tokens_total[('source', 'head')]"] == 2 * 5 * 7
    accepted = "medusa_spec_decode_num_accepted_tokens_total[('source', '{}')]"
    by_source = {source: metrics[accepted.format(source)] for source in ("head", "lookup", "prediction")}
    assert by_source == {"head": 2 * 4 * 2, "lookup": 0, "prediction": 0}
    assert positions(metrics, "head") == [8, 8, 0, 0]  # as many as there are heads
    assert positions(metrics, "lookup") == [0, 0, 0, 0]
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
    assert metrics["medusa_request_time_per_output_token_seconds_count"] == 2


def test_reuse_and_what_had_drafted_are_counted(serve: Serve) -> None:
    script = [FakeStep(ids("a"), cached_tokens=7), FakeStep(ids("bcd"), accepted_prediction_tokens=2)]
    engine = FakeEngine(lambda _r, _i: script, vocab_size=TEXT.vocab_size, draft_tokens=7)
    engine.stats.explored_steps = 3
    engine.stats.device_idle_seconds = 0.25
    server = serve(engine)
    server.chat(n=2)
    metrics = server.metrics()
    accepted = "medusa_spec_decode_num_accepted_tokens_total[('source', '{}')]"
    assert (metrics[accepted.format("head")], metrics[accepted.format("prediction")]) == (0, 4)
    assert positions(metrics, "prediction") == [2, 2, 0, 0]
    prompt = len(engine.submitted[0].prompt_token_ids)
    assert metrics["medusa_prefix_cache_queries_total"] == prompt
    assert metrics["medusa_prefix_cache_hits_total"] == 7
    assert metrics["medusa_explored_steps_total"] == 3
    assert metrics["medusa_device_idle_seconds_total"] == 0.25


def test_times_are_measured_in_seconds(serve: Serve) -> None:
    # Six steps of at least 20 ms; the first of them ends at the first token, 13 tokens follow.
    engine = FakeEngine(
        says("Hello, world!"), step_s=0.02, vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,)
    )
    server = serve(engine)
    server.chat()
    metrics = server.metrics()
    assert 0.02 <= metrics["medusa_time_to_first_token_seconds_sum"] < 0.3
    assert 5 * 0.02 / 13 <= metrics["medusa_request_time_per_output_token_seconds_sum"] < 0.1
    assert metrics["medusa_spec_decode_num_drafts_total"] == 0  # plain decoding drafts nothing
    assert metrics["medusa_acceptance_length_count"] == 5


def test_each_choice_has_a_rate_and_the_request_one_first_token(serve: Serve) -> None:
    server = serve(says("Hello"))
    server.chat(n=3)
    server.chat(max_tokens=1)  # one token has no rate
    metrics = server.metrics()
    assert metrics["medusa_request_time_per_output_token_seconds_count"] == 3
    assert metrics["medusa_time_to_first_token_seconds_count"] == 2


def test_each_request_is_told_by_its_times_lengths_and_end(serve: Serve) -> None:
    # One slot: the second choice waits for the first, six steps of 20 ms.
    engine = FakeEngine(
        says("Hello, world!"),
        step_s=0.02,
        max_num_seqs=1,
        vocab_size=TEXT.vocab_size,
        eos_token_ids=(EOS_ID,),
    )
    server = serve(engine)
    started = time.monotonic()
    server.chat(n=2)
    server.chat(max_tokens=4)
    most = 3 * (time.monotonic() - started)  # three choices, on a machine as busy as it is
    metrics = {name.removeprefix("medusa_"): value for name, value in server.metrics().items()}
    assert metrics["request_success_total[('finished_reason', 'stop')]"] == 2
    assert metrics["request_success_total[('finished_reason', 'length')]"] == 1
    prompt = len(engine.submitted[0].prompt_token_ids)
    assert (metrics["request_prompt_tokens_count"], metrics["request_prompt_tokens_sum"]) == (2, 2 * prompt)
    assert metrics["request_generation_tokens_count"] == 3
    assert metrics["request_generation_tokens_sum"] == 14 + 14 + 4
    assert metrics["request_queue_time_seconds_count"] == 3
    assert 6 * 0.02 <= metrics["request_queue_time_seconds_sum"] < most
    assert metrics["request_prefill_time_seconds_count"] == metrics["request_decode_time_seconds_count"] == 3
    assert (5 + 5 + 1) * 0.02 <= metrics["request_decode_time_seconds_sum"] < most
    assert metrics["e2e_request_latency_seconds_sum"] >= (6 + 12 + 2) * 0.02
    assert metrics["inter_token_latency_seconds_count"] == 5 + 5 + 1
    times = [f"request_{part}_time_seconds_sum" for part in ("queue", "prefill", "decode")]
    assert sum(metrics[name] for name in times) <= metrics["e2e_request_latency_seconds_sum"]


def test_choices_that_did_not_finish_are_counted_by_reason_only(serve: Serve) -> None:
    def reply(request: Request, _index: int) -> list[Any]:
        return [ids("a"), RuntimeError("no")] if request.sampling.n == 1 else [ids("a")] * 1000

    server = serve(FakeEngine(reply, step_s=0.005, vocab_size=TEXT.vocab_size))
    assert server.chat().status_code == 500
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, n=2)) as response:
        next(response.iter_lines())
    name = "medusa_request_success_total[('finished_reason', '{}')]"
    wait_until(lambda: server.metrics()[name.format("abort")] == 2)
    metrics = server.metrics()
    assert metrics[name.format("error")] == 1
    assert metrics["medusa_request_generation_tokens_count"] == 0
    assert metrics["medusa_e2e_request_latency_seconds_count"] == 0


def test_requests_are_counted_by_route_and_status(serve: Serve) -> None:
    server = serve(says("x"))
    server.chat()
    server.chat(n=0)
    for path in ("/v1/models/fake-model", "/v1/models/none", "/nowhere", "/elsewhere", "/health"):
        server.http.get(path)
    server.http.request("PROPFIND", "/health")
    metrics = server.metrics()
    counted = {
        tuple(value for _, value in ast.literal_eval(name.split("_total")[1])): value
        for name, value in metrics.items()
        if name.startswith("medusa_http_requests_total")
    }
    assert counted == {
        ("POST", "/v1/chat/completions", "200"): 1,
        ("POST", "/v1/chat/completions", "400"): 1,
        ("GET", "/v1/models/{name:path}", "200"): 1,
        ("GET", "/v1/models/{name:path}", "404"): 1,
        ("GET", "other", "404"): 2,
        ("GET", "/health", "200"): 1,
        ("other", "/health", "405"): 1,
    }


def test_what_runs_is_told(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.01, vocab_size=TEXT.vocab_size, kv_blocks=10)
    server = serve(engine)
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)):
        wait_until(lambda: engine.stats.running == 1)
        metrics = server.metrics()
        assert metrics["medusa_kv_cache_usage_ratio"] == pytest.approx(0.1)
    assert (metrics["medusa_ready"], metrics["medusa_healthy"]) == (1, 1)
    assert metrics["medusa_step_age_seconds"] == 0
    assert (metrics["medusa_num_slots"], metrics["medusa_kv_cache_capacity_tokens"]) == (8, 160)
    [build] = [name for name in metrics if name.startswith("medusa_build_info")]
    assert f"('version', '{__version__}')" in build
    [model] = [name for name in metrics if name.startswith("medusa_model_info")]
    for label in (("model_name", MODEL), ("architecture", "FakeForCausalLM"), ("tree", "off")):
        assert str(label) in model
    if sys.platform == "linux":
        assert metrics["process_resident_memory_bytes"] > 1e6
        assert metrics["process_open_fds"] > 3
    engine.die()
    assert server.metrics()["medusa_healthy"] == 0


def test_tokens_per_second_are_those_of_the_last_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, now = EngineStats(), 1000.0
    monkeypatch.setattr("engine.stats.time.monotonic", lambda: now)
    for second in range(30):
        now = 1000.0 + second
        stats.emitted(second)
        stats.emitted(1)
    now = 1030.2
    assert stats.tokens_per_second() == pytest.approx(sum(range(21, 31)) / 10)
    now = 1045.0
    assert stats.tokens_per_second() == 0


def test_the_table_in_the_docs_is_what_the_page_shows(serve: Serve) -> None:
    """Name, type, labels, unit and meaning: in the docs, in `METRICS`, and on a page after traffic."""
    page_text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = [line for line in page_text.split("## Metrics\n")[1].splitlines() if line.startswith("| `medusa_")]
    assert rows == [metric.row for metric in METRICS]

    engine = FakeEngine(
        says("Hello, world!"), vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,), draft_tokens=7
    )
    server = serve(engine)
    server.chat()
    page = {
        family.name: family
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        if not family.name.startswith("process_")
    }
    assert sorted(page) == sorted(PREFIX + metric.name for metric in METRICS)
    for metric in METRICS:
        family = page[PREFIX + metric.name]
        assert (family.type, family.documentation) == (metric.kind, metric.text)
        assert family.samples, metric.name
        for sample in family.samples:
            assert sorted(set(sample.labels) - {"le"}) == sorted(metric.labels)
    for metric in METRICS:  # Prometheus' convention: the unit is in the name where it has one
        for suffix in ("seconds", "tokens"):
            assert not metric.name.endswith(f"_{suffix}") or metric.unit in (suffix, "nodes"), metric.name


def positions(metrics: dict[str, float], source: str) -> list[float]:
    """Accepted tokens by position, of one source."""
    name = "medusa_spec_decode_num_accepted_tokens_per_pos_total[('position', '{}'), ('source', '{}')]"
    found = []
    while (value := metrics.get(name.format(len(found), source))) is not None:
        found.append(value)
    return found


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
