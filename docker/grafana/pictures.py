"""Draws the dashboards from Prometheus' own answers, for the docs: what Grafana would show, without Grafana.

python docker/grafana/pictures.py http://127.0.0.1:9090 docs/images --minutes 2
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from PIL import Image

DASHBOARDS = Path(__file__).parent / "dashboards"
UNITS = {"percentunit": "%", "s": "s", "bytes": "MiB", "reqps": "1/s", "ops": "1/s"}
FACTORS = {"percentunit": 100.0, "bytes": 1 / 2**20}

Series = tuple[str, list[float], list[float]]
"""Legend, seconds since the start, values."""
Query = Callable[[dict[str, Any]], list[Series]]


def query_range(url: str, expression: str, start: float, end: float, window: str) -> list[dict[str, Any]]:
    """Every series of an expression over a span, a point a second."""
    filled = expression.replace("$__rate_interval", window).replace("$instance", ".+")
    parameters: dict[str, str | float] = {"query": filled, "start": start, "end": end, "step": "1s"}
    answer = httpx.get(f"{url}/api/v1/query_range", params=parameters, timeout=30, trust_env=False)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def series_of(
    panel: dict[str, Any], *, url: str, start: float, end: float, window: str, names: dict[str, str]
) -> list[Series]:
    """Every series of a panel; `names` says what instances are called in it."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    found: list[Series] = []
    for target in panel["targets"]:
        for result in query_range(url, target["expr"], start, end, window):
            legend = target["legendFormat"]
            for label, value in result["metric"].items():
                legend = legend.replace(f"{{{{{label}}}}}", names.get(value, value))
            times = [point[0] - start for point in result["values"]]
            values = [float(point[1]) * FACTORS.get(unit, 1.0) for point in result["values"]]
            found.append((legend, times, values))
    return sorted(found)


def draw(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit = UNITS.get(defaults["unit"], "")
    axes.set_title(f"{panel['title']}{f', {unit}' if unit else ''}", fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    if panel["type"] == "stat":
        value = found[0][2][-1] if found else float("nan")
        axes.text(0.5, 0.4, f"{value:.3g}", fontsize=18, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
    elif panel["type"] == "heatmap":
        heat(axes, found)
    else:
        lines(axes, panel, found)
        if "max" in defaults:
            axes.set_ylim(0, FACTORS.get(defaults["unit"], 1.0) * defaults["max"])
        else:
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def lines(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    """Time series, stacked or not, some on an axis of their own to the right; a legend below."""
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    right = [re.compile(o["matcher"]["options"].strip("/")) for o in panel["fieldConfig"]["overrides"]]
    other = axes.twinx() if right else axes
    drawn: dict[str, Artist] = {}
    if stacked and found:
        times = max((times for _, times, _ in found), key=len)
        rows = [[dict(zip(t, v, strict=True)).get(x, 0.0) for x in times] for _, t, v in found]
        areas = axes.stackplot(times, rows, alpha=0.7)
        drawn = {name: area for (name, _, _), area in zip(found, areas, strict=True)}
    for number, (name, times, values) in enumerate([] if stacked else found):
        on_right = any(pattern.search(name) for pattern in right)
        where, style = (other, "--") if on_right else (axes, "-")
        (drawn[name],) = where.plot(
            times, values, style, color=f"C{number % 10}", linewidth=1.2, clip_on=False
        )
    if right:
        other.set_ylim(bottom=0)
        other.set_ylabel(f"{right[0].pattern} (dashed)", fontsize=7)
        other.tick_params(labelsize=7)
    # Grafana lists all; here those that are ever anything but zero, where there are many.
    some = {name for name, _, values in found if len(found) <= 6 or any(value > 0 for value in values)}
    shown = {name: artist for name, artist in drawn.items() if name in some}
    axes.legend(
        shown.values(),
        shown.keys(),
        fontsize=6.5,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        ncols=4,
        frameon=False,
        columnspacing=1.0,
        handlelength=1.2,
    )


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


def picture(name: str, file: Path, query: Query) -> None:
    """One dashboard, its panels where Grafana puts them."""
    dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 1
    figure = plt.figure(figsize=(16, height * 0.36))
    for panel in panels:
        at = panel["gridPos"]
        left, right = (
            (at["x"] + 0.9) / 24,
            (at["x"] + at["w"] - (0.9 if panel["fieldConfig"]["overrides"] else 0.2)) / 24,
        )
        top, bottom = 1 - (at["y"] + 1.9) / height, 1 - (at["y"] + at["h"] - 0.6) / height
        draw(figure.add_axes((left, bottom, right - left, top - bottom)), panel, query(panel))
    figure.suptitle(f"{dashboard['title']} (x: seconds)", fontsize=12, y=1 - 0.3 / height, va="top")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        file, optimize=True
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="Prometheus")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="up to the end")
    parser.add_argument("--window", default="30s", help="for rates")
    parser.add_argument("--name", action="append", default=[], metavar="INSTANCE=NAME", help="in the legends")
    parser.add_argument("--end", type=float, default=time.time(), help="Unix time, now if not said")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    query = functools.partial(
        series_of,
        url=args.url,
        start=args.end - 60 * args.minutes,
        end=args.end,
        window=args.window,
        names=dict(name.split("=", 1) for name in args.name),
    )
    for name in ("serving", "medusa"):
        picture(name, args.folder / f"dashboard-{name}.png", query)


if __name__ == "__main__":
    main()
