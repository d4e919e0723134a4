"""Prometheus metrics: `METRICS` is the list of them, in the order of the table in docs/operations.md.

The engine's plain numbers are read at each scrape; what only the server knows is counted here. Suffixes are
vLLM's where it has the metric, so that its dashboards need another prefix and little else.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from itertools import pairwise
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from engine.client import EngineClient
from engine.stats import DRAFT_SOURCES, PHASES, EngineStats, Tally
from engine.types import EngineInfo
from server import __version__

__all__ = ["METRICS", "PREFIX", "FinishedReason", "Metric", "Metrics"]

PREFIX = "medusa_"

FinishedReason = Literal["stop", "length", "abort", "error", "timeout"]
"""Why a choice ended: `abort` is a client that left or a drain, `error` a failed step, `timeout` the
request's time limit."""

_FINISHED: tuple[FinishedReason, ...] = ("stop", "length", "abort", "error", "timeout")

_ACCEPTANCE = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0, 16.0)
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_TPOT = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

Value = float | Tally
Read = Callable[["_Source"], "Value | Iterable[tuple[tuple[str, ...], Value]]"]


@dataclass(frozen=True, slots=True)
class _Source:
    """What is read at scrape time: the engine's numbers, and what is counted once a choice and step."""

    stats: EngineStats
    info: EngineInfo
    model_name: str
    ready: bool
    healthy: bool
    inter_token_latency: Tally


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, as /metrics and docs/operations.md show it.

    Args:
        name: without the prefix, and without the `_total` of a counter.
        kind: Prometheus' type.
        unit: of its values.
        text: what it counts.
        labels: their names.
        buckets: of a histogram kept here.
        read: its value, or (label values, value) pairs, for what is read at scrape time; None for what the
            server counts itself.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    read: Read | None = None

    @property
    def full_name(self) -> str:
        """As queries write it; a histogram's samples add `_bucket`, `_sum` and `_count` to it."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")

    @property
    def row(self) -> str:
        """Its line in docs/operations.md."""
        labels = ", ".join(f"`{label}`" for label in self.labels)
        return f"| `{self.full_name}` | {self.kind} | {labels} | {self.unit} | {self.text} |"


def _counter(
    name: str, unit: str, text: str, read: Read | None = None, labels: tuple[str, ...] = ()
) -> Metric:
    return Metric(name, "counter", unit, text, labels, read=read)


def _gauge(name: str, unit: str, text: str, read: Read, labels: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "gauge", unit, text, labels, read=read)


def _seconds(name: str, text: str, buckets: tuple[float, ...], read: Read | None = None) -> Metric:
    return Metric(name, "histogram", "seconds", text, buckets=buckets, read=read)


def _kv_blocks(source: _Source) -> Iterator[tuple[tuple[str, ...], Value]]:
    stats = source.stats
    free, cached = stats.kv_blocks_free, stats.kv_blocks_cached
    yield ("free",), free
    yield ("cached",), cached
    yield ("used",), stats.kv_blocks_total - free - cached


def _accepted_per_position(source: _Source) -> Iterator[tuple[tuple[str, ...], Value]]:
    """Every position the drafts can reach, so that none appears only once it counts."""
    accepted, info = source.stats.accepted_at, source.info
    reach = max(info.num_heads, info.lookup)
    deepest = max((d for counts in accepted.values() for d, count in enumerate(counts) if count), default=0)
    for position in range(max(reach, deepest)):
        for name in DRAFT_SOURCES:
            yield (str(position), name), accepted[name][position + 1]


def _acceptance(source: _Source) -> Tally:
    counts = list(source.stats.acceptance_counts)  # one copy, so that buckets and sum agree
    tally, edges = Tally.of(_ACCEPTANCE), [0, *(int(bound) + 1 for bound in _ACCEPTANCE), len(counts)]
    tally.counts = [sum(counts[first:end]) for first, end in pairwise(edges)]
    tally.total = float(sum(length * count for length, count in enumerate(counts)))
    return tally


def _build(_source: _Source) -> Iterator[tuple[tuple[str, ...], Value]]:
    versions = (__version__, platform.python_version(), installed_version("torch"))
    yield (*versions, installed_version("transformers")), 1


_MODEL_LABELS = (
    "model_name",
    "architecture",
    "dtype",
    "quantization",
    "device",
    "tree",
    "heads",
    "lookup",
    "max_model_len",
)


def _model(source: _Source) -> Iterator[tuple[tuple[str, ...], Value]]:
    info = source.info
    values = (info.architecture, info.dtype, info.quantization, info.device, info.tree)
    numbers = (info.num_heads, info.lookup, info.max_model_len)
    yield (source.model_name, *values, *(str(number) for number in numbers)), 1


METRICS: tuple[Metric, ...] = (
    # Load
    _gauge("num_requests_running", "choices", "Choices that hold a slot.", lambda s: s.stats.running),
    _gauge("num_requests_waiting", "choices", "Choices that wait for a slot.", lambda s: s.stats.waiting),
    _gauge("num_slots", "choices", "Most choices that run together.", lambda s: s.info.max_num_seqs),
    _gauge(
        "generation_tokens_per_second",
        "tokens/s",
        "Tokens emitted per second, over the last ten seconds.",
        lambda s: s.stats.tokens_per_second(),
    ),
    _counter(
        "prompt_tokens",
        "tokens",
        "Tokens of prefilled prompts, once a request, reused ones included.",
        lambda s: s.stats.prompt_tokens,
    ),
    _counter(
        "generation_tokens", "tokens", "Tokens emitted to requests.", lambda s: s.stats.generation_tokens
    ),
    _counter(
        "num_preemptions",
        "choices",
        "Choices put back to waiting for want of K/V blocks.",
        lambda s: s.stats.preemptions,
    ),
    # K/V memory
    _gauge(
        "kv_cache_usage_ratio",
        "0 to 1",
        "Share of the K/V pool that running choices own; what is kept for reuse counts as free.",
        lambda s: s.stats.kv_usage,
    ),
    _gauge("kv_blocks", "blocks", "K/V blocks by state: free, cached or used.", _kv_blocks, ("state",)),
    _gauge(
        "kv_cache_capacity_tokens",
        "tokens",
        "Tokens the K/V pool has room for.",
        lambda s: s.info.kv_cache_tokens,
    ),
    _counter(
        "prefix_cache_queries",
        "tokens",
        "Prompt tokens looked up for reuse.",
        lambda s: s.stats.prefix_query_tokens,
    ),
    _counter(
        "prefix_cache_hits",
        "tokens",
        "Prompt tokens whose K/V was reused.",
        lambda s: s.stats.prefix_hit_tokens,
    ),
    # Speculation
    Metric(
        "acceptance_length",
        "histogram",
        "tokens",
        "Tokens emitted per choice and decode step, root counted: plain decoding is 1.",
        buckets=_ACCEPTANCE,
        read=_acceptance,
    ),
    _counter(
        "spec_decode_num_drafts",
        "trees",
        "Draft trees verified, one a choice and step; plain decoding has none.",
        lambda s: s.stats.num_drafts,
    ),
    _counter(
        "spec_decode_num_draft_tokens",
        "nodes",
        "Tree nodes verified, root not counted, by source: head, lookup, prediction or grammar.",
        lambda s: [((source,), count) for source, count in s.stats.drafted_by_source.items()],
        ("source",),
    ),
    _counter(
        "spec_decode_num_accepted_tokens",
        "nodes",
        "Tree nodes accepted, root not counted, by what had drafted them.",
        lambda s: [((source,), count) for source, count in s.stats.accepted_by_source.items()],
        ("source",),
    ),
    _counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "nodes",
        "The same by position too: 0 is the first token after the root, at depth 1.",
        _accepted_per_position,
        ("position", "source"),
    ),
    _gauge(
        "tree_size",
        "nodes",
        "Nodes of the last decode step's largest tree, root counted.",
        lambda s: s.stats.tree_size,
    ),
    _gauge(
        "tree_head_nodes",
        "nodes",
        "Of these, nodes of the heads' branch.",
        lambda s: s.stats.head_nodes,
    ),
    _counter(
        "explored_steps",
        "steps",
        "Decode steps that tried another tree than the best known one.",
        lambda s: s.stats.explored_steps,
    ),
    _counter(
        "plain_decode_seconds",
        "seconds",
        "What plain decoding would have taken for the same tokens, by the measured step times (tree auto "
        "only); divided by the decode phase's seconds it is the speed-up.",
        lambda s: s.stats.plain_decode_seconds,
    ),
    Metric(
        "step_duration_seconds",
        "histogram",
        "seconds",
        "Parts of an engine step: schedule, prefill (one value a pass), decode (up to the results on the "
        "host) and emit.",
        ("phase",),
        read=lambda s: [((phase,), s.stats.step_seconds[phase]) for phase in PHASES],
    ),
    _counter(
        "device_idle_seconds",
        "seconds",
        "In which a GPU had computed its decode step and the host had not launched the next one.",
        lambda s: s.stats.device_idle_seconds,
    ),
    # Requests
    _seconds("time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT),
    _seconds(
        "inter_token_latency_seconds",
        "Between the steps that gave a choice tokens; a step may give several.",
        _TPOT,
        lambda s: s.inter_token_latency,
    ),
    _seconds(
        "request_time_per_output_token_seconds",
        "(end - first token) / (tokens - 1) of each finished choice.",
        _TPOT,
    ),
    _seconds("e2e_request_latency_seconds", "From arrival to the end of each finished choice.", _SECONDS),
    _seconds(
        "request_queue_time_seconds", "From arrival to a slot, of each choice that got a token.", _SECONDS
    ),
    _seconds(
        "request_prefill_time_seconds", "From a slot to the first token, of each finished choice.", _SECONDS
    ),
    _seconds("request_decode_time_seconds", "From first to last token of each finished choice.", _SECONDS),
    Metric(
        "request_prompt_tokens",
        "histogram",
        "tokens",
        "Prompt length of each request with a finished choice.",
        buckets=_TOKENS,
    ),
    Metric(
        "request_generation_tokens",
        "histogram",
        "tokens",
        "Output length of each finished choice.",
        buckets=_TOKENS,
    ),
    _counter(
        "request_success",
        "choices",
        "Choices that ended, by reason: stop and length (these two are called finished here), abort (the "
        "client left, or a drain), error (a failed step), timeout.",
        labels=("finished_reason",),
    ),
    _counter(
        "http_requests",
        "requests",
        "HTTP requests answered, by route (other: no such path) and status (499: the client left first).",
        labels=("method", "path", "status"),
    ),
    _counter(
        "stream_steps_merged",
        "steps",
        "Steps whose text joined a waiting event because the client reads, or the server writes, more slowly "
        "than tokens come.",
    ),
    # The process
    _gauge("ready", "0 or 1", "Whether new requests are taken, as /ready says.", lambda s: float(s.ready)),
    _gauge("healthy", "0 or 1", "Whether the engine works, as /health says.", lambda s: float(s.healthy)),
    _gauge(
        "step_age_seconds",
        "seconds",
        "How long the engine step under way has taken so far; 0 between steps.",
        lambda s: s.stats.step_age(),
    ),
    _gauge("build_info", "1", "Versions.", _build, ("version", "python", "torch", "transformers")),
    _gauge("model_info", "1", "What is served.", _model, _MODEL_LABELS),
)
"""All of ours. The client library's are `process_…` and `medusa_engine_process_…` (on Linux)."""


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        engine: read at each scrape.
        model_name: the served name.
        ready, healthy: what /ready and /health answer.
    """

    def __init__(
        self,
        engine: EngineClient,
        model_name: str,
        *,
        ready: Callable[[], bool] | None = None,
        healthy: Callable[[], bool] | None = None,
    ) -> None:
        # They would be a second series for each of ours, which nothing here needs.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self.inter_token_latency = Tally.of(_TPOT)
        """Observed once a choice and step, which takes one of the client library several times as long."""

        def source() -> _Source:
            return _Source(
                stats=engine.stats,
                info=engine.info,
                model_name=model_name,
                ready=ready() if ready is not None else engine.ready,
                healthy=healthy() if healthy is not None else engine.healthy,
                inter_token_latency=self.inter_token_latency,
            )

        self._registry.register(_Collector(source))
        ProcessCollector(registry=self._registry)
        ProcessCollector(PREFIX + "engine", lambda: engine.pid or 0, registry=self._registry)  # 0: nothing
        own = {metric.name: metric for metric in METRICS if metric.read is None}

        def histogram(name: str) -> Histogram:
            metric = own.pop(name)
            return Histogram(PREFIX + name, metric.text, buckets=metric.buckets, registry=self._registry)

        def counter(name: str) -> Counter:
            metric = own.pop(name)
            return Counter(PREFIX + name, metric.text, metric.labels, registry=self._registry)

        self.time_to_first_token = histogram("time_to_first_token_seconds")
        self.queue_time = histogram("request_queue_time_seconds")
        self.stream_steps_merged = counter("stream_steps_merged")
        self._time_per_output_token = histogram("request_time_per_output_token_seconds")
        self._e2e = histogram("e2e_request_latency_seconds")
        self._prefill_time = histogram("request_prefill_time_seconds")
        self._decode_time = histogram("request_decode_time_seconds")
        self._prompt_tokens = histogram("request_prompt_tokens")
        self._generation_tokens = histogram("request_generation_tokens")
        success = counter("request_success")
        self._ended: dict[FinishedReason, Counter] = {reason: success.labels(reason) for reason in _FINISHED}
        self._http_requests = counter("http_requests")
        assert not own, own

    def prompt(self, tokens: int) -> None:
        """Count the prompt of a request whose first choice has finished."""
        self._prompt_tokens.observe(tokens)

    def finished(
        self,
        reason: FinishedReason,
        *,
        tokens: int,
        e2e_s: float,
        ttft_s: float,
        queue_s: float,
        decode_s: float,
    ) -> None:
        """Count a choice that ended.

        Args:
            reason: only of `stop` and `length` are the other values counted.
            tokens: of output.
            e2e_s: from arrival to now, in seconds like the others.
            ttft_s: from arrival to the first token.
            queue_s: from arrival to its slot.
            decode_s: from the first to the last token.
        """
        self._ended[reason].inc()
        if reason not in ("stop", "length"):
            return
        self._e2e.observe(e2e_s)
        self._prefill_time.observe(max(0.0, ttft_s - queue_s))
        self._decode_time.observe(decode_s)
        self._generation_tokens.observe(tokens)
        if tokens > 1:
            self._time_per_output_token.observe(decode_s / (tokens - 1))

    def http_request(self, method: str, path: str, status: int) -> None:
        """Count an answered request; `path` is its route's, so that their number is bounded."""
        self._http_requests.labels(method, path, str(status)).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the format the Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Collector(Collector):
    """Turns what is read at scrape time into metric families; the engine itself knows no Prometheus."""

    def __init__(self, source: Callable[[], _Source]) -> None:
        self._source = source

    def collect(self) -> Iterator[Family]:
        source = self._source()
        for metric in METRICS:
            if metric.read is not None:
                found = metric.read(source)
                pairs = [((), found)] if isinstance(found, int | float | Tally) else found
                yield _family(metric, pairs)


def _family(metric: Metric, values: Iterable[tuple[tuple[str, ...], Value]]) -> Family:
    name = PREFIX + metric.name
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, metric.text, labels=metric.labels)
        for labels, tally in values:
            assert isinstance(tally, Tally)
            histogram.add_metric(labels, _buckets(tally), sum_value=tally.total)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, metric.text, labels=metric.labels)
    for labels, value in values:
        assert not isinstance(value, Tally)
        family.add_metric(labels, value)
    return family


def _buckets(tally: Tally) -> list[tuple[str, float]]:
    counts = list(tally.counts)
    bounds = [*(str(bound) for bound in tally.bounds), "+Inf"]
    return [(bound, float(sum(counts[: i + 1]))) for i, bound in enumerate(bounds)]
