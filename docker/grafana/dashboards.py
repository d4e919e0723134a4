"""Writes dashboards/serving.json and dashboards/medusa.json: `python docker/grafana/dashboards.py`.

A panel is a title, a sentence and its queries; everything else of Grafana's format is said once here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
CHOSEN = '{instance=~"$instance"}'
"""The replicas chosen above the panels."""
WINDOW = "$__rate_interval"
POST, DECODING = ',method="POST"', ',phase="decode"'
"""Labels that narrow a rate."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: short.
        text: what it shows, under the (i).
        queries: PromQL by legend.
        unit: Grafana's name of it.
        kind: Grafana's panel type.
        width: of 24.
        top: the axis's highest value, where it is known.
        stack: add the series up.
    """

    title: str
    text: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    top: float | None = None
    stack: bool = False
    right: tuple[str, ...] = field(default=())


def rate(metric: str, by: str = "", more: str = "") -> str:
    """The summed rate of a counter on the chosen replicas."""
    return f'sum{f" by ({by})" if by else ""} (rate({metric}{{instance=~"$instance"{more}}}[{WINDOW}]))'


def each(by: str, metric: str, more: str = "") -> dict[str, str]:
    """The same, a series for each value of a label."""
    return {f"{{{{{by}}}}}": rate(metric, by, more)}


def quantiles(metric: str, more: str = "") -> dict[str, str]:
    """Median, 95th and 99th percentile of a histogram over all chosen replicas."""
    return {
        f"p{100 * q:.0f}": f"histogram_quantile({q}, {rate(metric + '_bucket', 'le', more)})"
        for q in (0.5, 0.95, 0.99)
    }


def p95_each(metric: str) -> dict[str, str]:
    """The 95th percentile of each replica."""
    return {"{{instance}}": f"histogram_quantile(0.95, {rate(metric + '_bucket', 'instance, le')})"}


def ratio(metric: str, to: str, by: str = "", more: str = "") -> str:
    """One counter's rate to another's, which `more` narrows."""
    return f"{rate(metric, by)} / {rate(to, by, more)}"


def mean(metric: str, by: str = "") -> str:
    """Of a histogram's values."""
    return ratio(f"{metric}_sum", f"{metric}_count", by)


ACCEPTED = "medusa_spec_decode_num_accepted_tokens_total"
DRAFTED = "medusa_spec_decode_num_draft_tokens_total"
PER_POSITION = "medusa_spec_decode_num_accepted_tokens_per_pos_total"
DRAFTS = "medusa_spec_decode_num_drafts_total"
STEP_S = "medusa_step_duration_seconds"
LENGTH = "medusa_acceptance_length"
MEMORY = f"process_resident_memory_bytes{CHOSEN}"
PREFIX_HITS = ("medusa_prefix_cache_hits_total", "medusa_prefix_cache_queries_total")
SPEED_UP = ("medusa_plain_decode_seconds_total", f"{STEP_S}_sum")
TOKENS_A_STEP = (f"{LENGTH}_sum", f"{STEP_S}_count")

SERVING = [
    Panel(
        "Replicas ready",
        "Replicas that take requests.",
        {"ready": f"sum(medusa_ready{CHOSEN})"},
        kind="stat",
        width=4,
    ),
    Panel(
        "Alerts firing",
        "See Prometheus' page of alerts.",
        {"firing": 'count(ALERTS{alertstate="firing"}) or vector(0)'},
        kind="stat",
        width=4,
    ),
    Panel(
        "Output",
        "Tokens emitted a second, all replicas.",
        {"tokens/s": rate("medusa_generation_tokens_total")},
        kind="stat",
        width=4,
    ),
    Panel(
        "Running",
        "Choices that decode now.",
        {"running": f"sum(medusa_num_requests_running{CHOSEN})"},
        kind="stat",
        width=4,
    ),
    Panel(
        "Waiting",
        "Choices that wait for a slot.",
        {"waiting": f"sum(medusa_num_requests_waiting{CHOSEN})"},
        kind="stat",
        width=4,
    ),
    Panel(
        "K/V pool in use",
        "The fullest replica's.",
        {"in use": f"max(medusa_kv_cache_usage_ratio{CHOSEN})"},
        unit="percentunit",
        kind="stat",
        width=4,
    ),
    Panel(
        "Requests by status",
        "HTTP answers a second; 499: the client left first.",
        each("status", "medusa_http_requests_total", POST),
        unit="reqps",
        stack=True,
    ),
    Panel(
        "Requests by replica",
        "What the load balancer gives each.",
        each("instance", "medusa_http_requests_total", POST),
        unit="reqps",
        stack=True,
    ),
    Panel(
        "Finish reasons",
        "Choices that ended, a second.",
        each("finished_reason", "medusa_request_success_total"),
        unit="ops",
        stack=True,
    ),
    Panel(
        "Output tokens a second",
        "Per replica, stacked: the height is the total.",
        each("instance", "medusa_generation_tokens_total"),
        stack=True,
    ),
    Panel(
        "Prompt tokens a second",
        "Prefilled prompts, reused tokens included.",
        each("instance", "medusa_prompt_tokens_total"),
        stack=True,
    ),
    Panel(
        "Choices running and waiting",
        "Waiting ones queue for a slot.",
        {
            "running {{instance}}": f"medusa_num_requests_running{CHOSEN}",
            "waiting {{instance}}": f"medusa_num_requests_waiting{CHOSEN}",
        },
    ),
    Panel(
        "Time to first token",
        "From arrival, all replicas.",
        quantiles("medusa_time_to_first_token_seconds"),
        unit="s",
    ),
    Panel(
        "Time per output token",
        "After the first, mean of each finished choice.",
        quantiles("medusa_request_time_per_output_token_seconds"),
        unit="s",
    ),
    Panel(
        "End to end",
        "From arrival to the end of each finished choice.",
        quantiles("medusa_e2e_request_latency_seconds"),
        unit="s",
    ),
    Panel(
        "Time to first token by replica, p95",
        "A replica that differs has other work or another machine.",
        p95_each("medusa_time_to_first_token_seconds"),
        unit="s",
    ),
    Panel(
        "Time per output token by replica, p95",
        "As above.",
        p95_each("medusa_request_time_per_output_token_seconds"),
        unit="s",
    ),
    Panel(
        "Where a request's time goes",
        "Mean seconds of the finished ones: waiting, prefill, decoding.",
        {name: mean(f"medusa_request_{name}_time_seconds") for name in ("queue", "prefill", "decode")},
        unit="s",
        stack=True,
    ),
    Panel(
        "K/V pool in use",
        "Share that running choices own; near 1 they get preempted.",
        {"{{instance}}": f"medusa_kv_cache_usage_ratio{CHOSEN}"},
        unit="percentunit",
        top=1,
    ),
    Panel(
        "K/V blocks",
        "All replicas; cached ones are free for whoever needs them.",
        {"{{state}}": f"sum by (state) (medusa_kv_blocks{CHOSEN})"},
        stack=True,
    ),
    Panel(
        "Prefix hits",
        "Share of prompt tokens whose K/V was reused.",
        {"all": ratio(*PREFIX_HITS), "{{instance}}": ratio(*PREFIX_HITS, "instance")},
        unit="percentunit",
        top=1,
    ),
    Panel(
        "Preemptions",
        "Choices put back for want of K/V blocks, a second.",
        each("instance", "medusa_num_preemptions_total"),
        unit="ops",
    ),
    Panel(
        "Step parts",
        "Share of an engine's time, mean of the replicas.",
        {"{{phase}}": f"avg by (phase) (rate({STEP_S}_sum{CHOSEN}[{WINDOW}]))"},
        unit="percentunit",
        stack=True,
    ),
    Panel(
        "Memory",
        "Resident, of each server, with its engine's process where it has one.",
        # Prometheus has this one of itself, too.
        {
            "{{instance}}": f"({MEMORY} + on (instance) medusa_engine_{MEMORY} or on (instance) {MEMORY}) "
            "and on (instance) medusa_ready"
        },
        unit="bytes",
    ),
]

MEDUSA = [
    Panel(
        "Acceptance length now",
        "Tokens per choice and decode step, root counted: plain decoding is 1.",
        {"tokens": mean(LENGTH)},
        kind="stat",
        width=6,
    ),
    Panel(
        "Estimated speed-up",
        "Plain decoding's time for the same tokens over the time taken (tree auto).",
        {"times": ratio(*SPEED_UP, more=DECODING)},
        kind="stat",
        width=6,
    ),
    Panel(
        "Tokens a step",
        "Tokens a decode step gives, the whole batch together.",
        {"tokens": ratio(*TOKENS_A_STEP, more=DECODING)},
        kind="stat",
        width=6,
    ),
    Panel(
        "Drafts wasted",
        "Share of verified nodes not accepted. A tree wastes most of its nodes by design; what "
        "counts is the speed-up.",
        {"wasted": f"1 - {ratio(ACCEPTED, DRAFTED)}"},
        unit="percentunit",
        kind="stat",
        width=6,
    ),
    Panel(
        "Acceptance length",
        "Mean, by replica.",
        {"{{instance}}": mean(LENGTH, "instance"), "all": mean(LENGTH)},
        width=12,
    ),
    Panel(
        "Acceptance length, distribution",
        "Decode steps of a choice, by how many tokens they gave.",
        each("le", f"{LENGTH}_bucket"),
        kind="heatmap",
        width=12,
    ),
    Panel(
        "Accepted by depth",
        "Share of trees accepted to a depth; 0 is the first token after the root.",
        {"{{position}}": f"{rate(PER_POSITION, 'position')} / scalar({rate(DRAFTS)})"},
        unit="percentunit",
        width=12,
    ),
    Panel(
        "Accepted by depth and source",
        "The same, by what had drafted the accepted node.",
        {"{{position}} {{source}}": f"{rate(PER_POSITION, 'position, source')} / scalar({rate(DRAFTS)})"},
        unit="percentunit",
        width=12,
    ),
    Panel(
        "Tree size against batch size",
        "Nodes a choice; choices running. A busy server takes smaller trees.",
        {
            "tree {{instance}}": f"avg_over_time(medusa_tree_size{CHOSEN}[{WINDOW}])",
            "heads' nodes {{instance}}": f"avg_over_time(medusa_tree_head_nodes{CHOSEN}[{WINDOW}])",
            "running {{instance}}": f"avg_over_time(medusa_num_requests_running{CHOSEN}[{WINDOW}])",
        },
        width=12,
        right=("/running/",),
    ),
    Panel(
        "Tokens a step",
        "Tokens a decode step gives, the whole batch together.",
        {"{{instance}}": ratio(*TOKENS_A_STEP, "instance", DECODING)},
        width=12,
    ),
    Panel(
        "Estimated speed-up",
        "Plain decoding's time for the same tokens over the time taken (tree auto). Below 1 "
        "trees cost more than they give.",
        {"{{instance}}": ratio(*SPEED_UP, "instance", DECODING)},
        width=12,
    ),
    Panel(
        "Drafted and accepted",
        "Nodes a second, by source.",
        {"drafted {{source}}": rate(DRAFTED, "source"), "accepted {{source}}": rate(ACCEPTED, "source")},
        width=12,
    ),
    Panel(
        "Drafts wasted",
        "Share of verified nodes that were not accepted, by source.",
        {"{{source}}": f"1 - {rate(ACCEPTED, 'source')} / ({rate(DRAFTED, 'source')} > 0)"},
        unit="percentunit",
        top=1,
        width=12,
    ),
    Panel(
        "Steps that explore",
        "Decode steps that tried a larger tree than the best known one.",
        {"{{instance}}": ratio("medusa_explored_steps_total", f"{STEP_S}_count", "instance", DECODING)},
        unit="percentunit",
        width=12,
    ),
    Panel(
        "Decode step",
        "How long one takes.",
        quantiles(STEP_S, DECODING),
        unit="s",
        width=12,
    ),
    Panel(
        "GPU waits for the host",
        "Share of the time in which it had computed its decode step and the next one was not there: a faster "
        "CPU, or fewer other processes on it, would help.",
        {"{{instance}}": f"rate(medusa_device_idle_seconds_total{CHOSEN}[{WINDOW}])"},
        unit="percentunit",
        width=12,
    ),
    Panel(
        "First drafts right",
        "Over half an hour; what the alert on falling acceptance looks at.",
        {"{{instance}}": f"medusa:first_draft_accepted:ratio30m{CHOSEN}"},
        unit="percentunit",
        width=12,
    ),
]


def panel_json(panel: Panel, number: int, x: int, y: int, height: int) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "fillOpacity": 30 if panel.stack else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stack else "none"},
        }
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.top is not None:
        defaults["max"] = panel.top
    overrides = [
        {
            "matcher": {"id": "byRegexp", "options": name},
            "properties": [
                {"id": "custom.axisPlacement", "value": "right"},
                {"id": "custom.axisLabel", "value": name.strip("/")},
            ],
        }
        for name in panel.right
    ]
    heat = panel.kind == "heatmap"
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi"},
    }
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "none"}
    elif heat:
        options = {
            "calculate": False,
            "yAxis": {"unit": "short"},
            "color": {"scheme": "Blues", "mode": "scheme"},
            "cellGap": 1,
            "tooltip": {"mode": "single"},
        }
    return {
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expr,
                "legendFormat": legend,
                "format": "heatmap" if heat else "time_series",
            }
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def dashboard(uid: str, title: str, panels: list[Panel]) -> dict[str, Any]:
    """The dashboard's JSON: panels from left to right, a new row where one does not fit."""
    placed, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > 24:
            x, y = 0, y + height
        height = 4 if panel.kind == "stat" else 8
        placed.append(panel_json(panel, number, x, y, height))
        x += panel.width
    return {
        "uid": uid,
        "title": title,
        "tags": ["medusa-serve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [
            {"type": "dashboards", "tags": ["medusa-serve"], "title": "medusa-serve", "asDropdown": False}
        ],
        "templating": {
            "list": [
                {
                    "name": "instance",
                    "label": "Replica",
                    "type": "query",
                    "datasource": SOURCE,
                    "refresh": 2,
                    "query": "label_values(medusa_ready, instance)",
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".+",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": placed,
    }


DASHBOARDS = {
    "serving": dashboard("medusa-serving", "Serving", SERVING),
    "medusa": dashboard("medusa-medusa", "Medusa", MEDUSA),
}

if __name__ == "__main__":
    for name, content in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
