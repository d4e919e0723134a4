"""Draws the dashboards from Prometheus' own answers, for the docs: what Grafana would show, without Grafana.

python docker/grafana/pictures.py http://127.0.0.1:9090 docs/images --minutes 2
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

DASHBOARDS = Path(__file__).parent / "dashboards"
UNITS = {"percentunit": "%", "s": "s", "bytes": "MiB", "reqps": "1/s", "ops": "1/s"}
FACTORS = {"percentunit": 100.0, "bytes": 1 / 2**20}

Series = tuple[str, list[float], list[float]]


def query_range(url: str, expression: str, start: float, end: float, window: str) -> list[dict[str, Any]]:
    """Every series of an expression over a span, a point a second."""
    filled = expression.replace("$__rate_interval", window).replace("$instance", ".+")
    parameters: dict[str, str | float] = {"query": filled, "start": start, "end": end, "step": "1s"}
    answer = httpx.get(f"{url}/api/v1/query_range", params=parameters, timeout=30, trust_env=False)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def series_of(url: str, panel: dict[str, Any], start: float, end: float, window: str) -> list[Series]:
    """(legend, seconds since the start, values) of every series of a panel."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    found: list[Series] = []
    for target in panel["targets"]:
        for result in query_range(url, target["expr"], start, end, window):
            name = target["legendFormat"]
            for label, value in result["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            times = [point[0] - start for point in result["values"]]
            found.append(
                (name, times, [float(point[1]) * FACTORS.get(unit, 1.0) for point in result["values"]])
            )
    return found


def draw(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], "")
    axes.set_title(panel["title"], fontsize=9, loc="left")
    if panel["type"] == "stat":
        value = found[0][2][-1] if found else float("nan")
        axes.text(
            0.5, 0.4, f"{value:.3g} {unit}", fontsize=18, ha="center", va="center", transform=axes.transAxes
        )
        axes.set_axis_off()
        return
    if panel["type"] == "heatmap":
        heat(axes, found)
        return
    if panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal" and found:
        times = max((times for _, times, _ in found), key=len)
        rows = [[dict(zip(t, v, strict=True)).get(x, 0.0) for x in times] for _, t, v in found]
        axes.stackplot(times, rows, labels=[name for name, _, _ in found], alpha=0.7)
    else:
        for name, times, values in found:
            axes.plot(times, values, label=name, linewidth=1.2)
        axes.set_ylim(bottom=0)
    axes.set_ylabel(unit, fontsize=7)
    axes.tick_params(labelsize=7)
    if 0 < len(found) <= 14:
        axes.legend(fontsize=5.5, loc="upper left", ncols=2, framealpha=0.6)


def heat(axes: Axes, found: list[Series]) -> None:
    """Cumulative buckets as the rate in each."""
    buckets = sorted(found, key=lambda series: float(series[0]))
    length = min((len(values) for _, _, values in buckets), default=0)
    if length == 0:
        return
    cumulative = [values[-length:] for _, _, values in buckets]
    rows = [cumulative[0]] + [
        [max(0.0, b - a) for a, b in zip(low, high, strict=True)] for low, high in pairwise(cumulative)
    ]
    times = buckets[0][1][-length:]
    axes.pcolormesh([*times, times[-1] + 1], range(len(rows) + 1), rows, cmap="Blues")
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [name for name, _, _ in buckets], fontsize=6)
    axes.tick_params(axis="x", labelsize=7)


def picture(url: str, name: str, file: Path, start: float, end: float, window: str) -> None:
    """One dashboard, its panels where Grafana puts them."""
    dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(16, height * 0.38))
    grid = figure.add_gridspec(
        height, 24, hspace=2.5, wspace=4.0, left=0.04, right=0.99, top=0.96, bottom=0.03
    )
    for panel in panels:
        at = panel["gridPos"]
        axes = figure.add_subplot(grid[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]])
        draw(axes, panel, series_of(url, panel, start, end, window))
    figure.suptitle(f"{dashboard['title']} (x: seconds)", fontsize=12)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="Prometheus")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="up to now")
    parser.add_argument("--window", default="30s", help="for rates")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.time()
    for name in ("serving", "medusa"):
        file = args.folder / f"dashboard-{name}.png"
        picture(args.url, name, file, end - 60 * args.minutes, end, args.window)


if __name__ == "__main__":
    main()
