"""Prometheus metrics: the engine's plain counts read at scrape time, and two histograms kept here."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.stats import EngineStats
from engine.types import EngineClient

__all__ = ["Metrics"]

ACCEPTANCE_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
TPOT_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        engine: its `stats` are read at each scrape.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.time_to_first_token = Histogram(
            "medusa_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            buckets=TTFT_BUCKETS,
            registry=self._registry,
        )
        self.time_per_output_token = Histogram(
            "medusa_time_per_output_token_seconds",
            "Seconds per token after the first, mean over each finished choice.",
            buckets=TPOT_BUCKETS,
            registry=self._registry,
        )

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the format the Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _EngineCollector(Collector):
    """Turns `EngineStats` into metric families; the engine itself knows nothing of Prometheus."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield _counter("prompt_tokens", "Prompt tokens computed by prefill.", stats.prompt_tokens)
        yield _counter("generation_tokens", "Tokens emitted to requests.", stats.generation_tokens)
        yield _counter("spec_decode_num_drafts", "Draft trees verified.", stats.num_drafts)
        yield _counter(
            "spec_decode_num_draft_tokens", "Tree nodes verified, root not counted.", stats.draft_tokens
        )
        yield _accepted(stats)
        yield _counter("explored_steps", "Decode steps that tried another tree.", stats.explored_steps)
        yield _counter(
            "prefix_cache_queries", "Prompt tokens looked up for reuse.", stats.prefix_query_tokens
        )
        yield _counter("prefix_cache_hits", "Of these, tokens reused.", stats.prefix_hit_tokens)
        yield _counter("preemptions", "Sequences put back to waiting for want of blocks.", stats.preemptions)
        yield _gauge("tree_size", "Nodes of the last decode step's tree, root counted.", stats.tree_size)
        yield _gauge("tree_head_nodes", "Of these, nodes of the heads' branch.", stats.head_nodes)
        yield _gauge("num_requests_running", "Sequences that hold a slot.", stats.running)
        yield _gauge("num_requests_waiting", "Sequences that wait for a slot.", stats.waiting)
        yield _acceptance(stats)
        yield _blocks(stats)


def _counter(name: str, text: str, value: int) -> CounterMetricFamily:
    return CounterMetricFamily(f"medusa_{name}", text, value=value)


def _gauge(name: str, text: str, value: int) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"medusa_{name}", text, value=value)


def _accepted(stats: EngineStats) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "medusa_spec_decode_num_accepted_tokens",
        "Tree nodes accepted, root not counted, by what had drafted them.",
        labels=["source"],
    )
    for source, count in stats.accepted_by_source.items():
        family.add_metric([source], count)
    return family


def _acceptance(stats: EngineStats) -> HistogramMetricFamily:
    counts = list(stats.acceptance_counts)  # one copy, so that buckets and sum agree
    buckets = [(f"{bound:.1f}", float(sum(counts[: bound + 1]))) for bound in ACCEPTANCE_BUCKETS]
    return HistogramMetricFamily(
        "medusa_acceptance_length",
        "Tokens emitted per sequence and decode step, root counted: plain decoding is 1.",
        buckets=[*buckets, ("+Inf", float(sum(counts)))],
        sum_value=sum(length * count for length, count in enumerate(counts)),
    )


def _blocks(stats: EngineStats) -> GaugeMetricFamily:
    family = GaugeMetricFamily("medusa_kv_blocks", "K/V blocks by state.", labels=["state"])
    family.add_metric(["free"], stats.kv_blocks_free)
    family.add_metric(["cached"], stats.kv_blocks_cached)
    family.add_metric(["used"], stats.kv_blocks_total - stats.kv_blocks_free - stats.kv_blocks_cached)
    return family
