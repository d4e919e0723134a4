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
I = '{instance=~"$instance"}'  # noqa: E741
W = "$__rate_interval"


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


def rate(metric: str, by: str = "", more: str = "", window: str = W) -> str:
    """The summed rate of a counter on the chosen replicas."""
    return f'sum{f" by ({by})" if by else ""} (rate({metric}{{instance=~"$instance"{more}}}[{window}]))'


def quantiles(metric: str) -> dict[str, str]:
    """Median, 95th and 99th percentile of a histogram over all chosen replicas."""
    return {
        f"p{100 * q:.0f}": f"histogram_quantile({q}, {rate(metric + '_bucket', 'le')})"
        for q in (0.5, 0.95, 0.99)
    }


def per_replica(metric: str, q: float = 0.95) -> dict[str, str]:
    inner = rate(metric + "_bucket", "instance, le")
    return {"{{instance}}": f"histogram_quantile({q}, {inner})"}


def mean(metric: str) -> str:
    """Of a histogram's values, over all chosen replicas."""
    return f"{rate(metric + '_sum')} / {rate(metric + '_count')}"


ACCEPTED = "medusa_spec_decode_num_accepted_tokens_total"
DRAFTED = "medusa_spec_decode_num_draft_tokens_total"
PER_POSITION = "medusa_spec_decode_num_accepted_tokens_per_pos_total"
DRAFTS = "medusa_spec_decode_num_drafts_total"
DECODE = "medusa_step_duration_seconds"
LENGTH = "medusa_acceptance_length"

SERVING = [
    Panel(
        "Replicas ready",
        "Replicas that take requests.",
        {"ready": f"sum(medusa_ready{I})"},
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
        {"running": f"sum(medusa_num_requests_running{I})"},
        kind="stat",
        width=4,
    ),
    Panel(
        "Waiting",
        "Choices that wait for a slot.",
        {"waiting": f"sum(medusa_num_requests_waiting{I})"},
        kind="stat",
        width=4,
    ),
    Panel(
        "K/V pool in use",
        "The fullest replica's.",
        {"in use": f"max(medusa_kv_cache_usage_ratio{I})"},
        unit="percentunit",
        kind="stat",
        width=4,
    ),
    Panel(
        "Requests by status",
        "HTTP answers a second; 499: the client left first.",
        {"{{status}}": rate("medusa_http_requests_total", "status", ',method="POST"')},
        unit="reqps",
        stack=True,
    ),
    Panel(
        "Requests by replica",
        "What the load balancer gives each.",
        {"{{instance}}": rate("medusa_http_requests_total", "instance", ',method="POST"')},
        unit="reqps",
        stack=True,
    ),
    Panel(
        "Finish reasons",
        "Choices that ended, a second.",
        {"{{finished_reason}}": rate("medusa_request_success_total", "finished_reason")},
        unit="ops",
        stack=True,
    ),
    Panel(
        "Output tokens a second",
        "Per replica, stacked: the height is the total.",
        {"{{instance}}": rate("medusa_generation_tokens_total", "instance")},
        stack=True,
    ),
    Panel(
        "Prompt tokens a second",
        "Prefilled prompts, reused tokens included.",
        {"{{instance}}": rate("medusa_prompt_tokens_total", "instance")},
        stack=True,
    ),
    Panel(
        "Choices running and waiting",
        "Waiting ones queue for a slot.",
        {
            "running {{instance}}": f"medusa_num_requests_running{I}",
            "waiting {{instance}}": f"medusa_num_requests_waiting{I}",
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
        per_replica("medusa_time_to_first_token_seconds"),
        unit="s",
    ),
    Panel(
        "Time per output token by replica, p95",
        "As above.",
        per_replica("medusa_request_time_per_output_token_seconds"),
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
        {"{{instance}}": f"medusa_kv_cache_usage_ratio{I}"},
        unit="percentunit",
        top=1,
    ),
    Panel(
        "K/V blocks",
        "All replicas; cached ones are free for whoever needs them.",
        {"{{state}}": f"sum by (state) (medusa_kv_blocks{I})"},
        stack=True,
    ),
    Panel(
        "Prefix hits",
        "Share of prompt tokens whose K/V was reused.",
        {
            "all": f"{rate('medusa_prefix_cache_hits_total')} / {rate('medusa_prefix_cache_queries_total')}",
            "{{instance}}": f"{rate('medusa_prefix_cache_hits_total', 'instance')} / "
            f"{rate('medusa_prefix_cache_queries_total', 'instance')}",
        },
        unit="percentunit",
        top=1,
    ),
    Panel(
        "Preemptions",
        "Choices put back for want of K/V blocks, a second.",
        {"{{instance}}": rate("medusa_num_preemptions_total", "instance")},
        unit="ops",
    ),
    Panel(
        "Step parts",
        "Share of the engine's time.",
        {"{{phase}}": rate(f"{DECODE}_sum", "phase")},
        unit="percentunit",
        stack=True,
    ),
    Panel(
        "Memory",
        "Resident, of each server process.",
        {"{{instance}}": f"process_resident_memory_bytes{I}"},
        unit="bytes",
    ),
]

MEDUSA = [
    Panel(
        "Acceptance length now",
        "Tokens per choice and decode step, root counted: plain decoding is 1.",
        {"tokens": f"{rate(LENGTH + '_sum')} / {rate(LENGTH + '_count')}"},
        kind="stat",
        width=6,
    ),
    Panel(
        "Estimated speed-up",
        "Plain decoding's time for the same tokens over the time taken (tree auto).",
        {
            "times": f"{rate('medusa_plain_decode_seconds_total')} / "
            + rate(f"{DECODE}_sum", more=',phase="decode"')
        },
        kind="stat",
        width=6,
    ),
    Panel(
        "Tokens a step",
        "Tokens a decode step gives, the whole batch together.",
        {"tokens": f"{rate(LENGTH + '_sum')} / " + rate(f"{DECODE}_count", more=',phase="decode"')},
        kind="stat",
        width=6,
    ),
    Panel(
        "Drafts wasted",
        "Share of verified nodes not accepted. A tree wastes most of its nodes by design; what "
        "counts is the speed-up.",
        {"wasted": f"1 - {rate(ACCEPTED)} / {rate(DRAFTED)}"},
        unit="percentunit",
        kind="stat",
        width=6,
    ),
    Panel(
        "Acceptance length",
        "Mean, by replica.",
        {
            "{{instance}}": f"{rate(LENGTH + '_sum', 'instance')} / {rate(LENGTH + '_count', 'instance')}",
            "all": f"{rate(LENGTH + '_sum')} / {rate(LENGTH + '_count')}",
        },
        width=12,
    ),
    Panel(
        "Acceptance length, distribution",
        "Decode steps of a choice, by how many tokens they gave.",
        {"{{le}}": rate(LENGTH + "_bucket", "le")},
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
            "tree {{instance}}": f"avg_over_time(medusa_tree_size{I}[{W}])",
            "heads' nodes {{instance}}": f"avg_over_time(medusa_tree_head_nodes{I}[{W}])",
            "running {{instance}}": f"avg_over_time(medusa_num_requests_running{I}[{W}])",
        },
        width=12,
        right=("/running/",),
    ),
    Panel(
        "Tokens a step",
        "Tokens a decode step gives, the whole batch together.",
        {
            "{{instance}}": f"{rate(LENGTH + '_sum', 'instance')} / "
            + rate(f"{DECODE}_count", "instance", ',phase="decode"')
        },
        width=12,
    ),
    Panel(
        "Estimated speed-up",
        "Plain decoding's time for the same tokens over the time taken (tree auto). Below 1 "
        "trees cost more than they give.",
        {
            "{{instance}}": f"{rate('medusa_plain_decode_seconds_total', 'instance')} / "
            + rate(f"{DECODE}_sum", "instance", ',phase="decode"')
        },
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
        {
            "{{instance}}": f"{rate('medusa_explored_steps_total', 'instance')} / "
            + rate(f"{DECODE}_count", "instance", ',phase="decode"')
        },
        unit="percentunit",
        width=12,
    ),
    Panel(
        "Decode step",
        "How long one takes.",
        {
            f"p{100 * q:.0f}": f"histogram_quantile({q}, "
            + rate(f"{DECODE}_bucket", "le", ',phase="decode"')
            + ")"
            for q in (0.5, 0.95)
        },
        unit="s",
        width=12,
    ),
    Panel(
        "First drafts right",
        "Over half an hour; what the alert on falling acceptance looks at.",
        {"{{instance}}": f"medusa:first_draft_accepted:ratio30m{I}"},
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
