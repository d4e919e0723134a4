"""Speed-up against batch size as a picture, from a results file of `benchmarks.gpu`.

python -m benchmarks.gpu_picture benchmarks/results/gpu-nvidia-h100-80gb-hbm3.json \
    docs/images/speed-up-h100.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["draw", "series"]


def series(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the picture: label, x, y, the interval's ends where there is one, and whether simulated.

    Raises:
        ValueError: the results hold none.
    """
    parts = results["parts"]
    lines: list[dict[str, Any]] = []
    answers = parts.get("end_to_end") or {}
    for name, size, what in (
        ("streams", "streams", "each stream asks again when it is answered"),
        ("rows", "batch", "batches that run empty"),
    ):
        if rows := answers.get(name):
            lines.append(
                {
                    "label": f"{answers['model']}, its own heads: {what}",
                    "x": [row[size] for row in rows],
                    "y": [row["ratio_median"] for row in rows],
                    "low": [row["ratio_interval_95"][0] for row in rows],
                    "high": [row["ratio_interval_95"][1] for row in rows],
                    "simulated": False,
                }
            )
    simulated = (parts.get("simulated") or {}).get("rows", [])
    for context in sorted({row["context"] for row in simulated}):
        of_context = [row for row in simulated if row["context"] == context]
        lines.append(
            {
                "label": f"simulated: 7B, published Vicuna heads, context {context}",
                "x": [row["batch"] for row in of_context],
                "y": [row["speed_up"] for row in of_context],
                "simulated": True,
            }
        )
    if not lines:
        raise ValueError("the results hold neither end_to_end nor simulated rows")
    return lines


def draw(results: dict[str, Any], file: Path) -> None:
    """Write the picture (.svg or .png)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.0), layout="constrained")
    for line in series(results):
        style = "o--" if line["simulated"] else "o-"
        (drawn,) = axes.plot(line["x"], line["y"], style, label=line["label"])
        if "low" in line:
            axes.fill_between(line["x"], line["low"], line["high"], alpha=0.2, color=drawn.get_color())
    ticks = sorted({x for line in series(results) for x in line["x"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("sequences decoded together")
    axes.set_ylabel("tokens/s, tree auto over off (95 % interval)")
    axes.set_title(
        f"{results['device']}, bfloat16" if not results["tiny"] else f"{results['device']} (tiny run)"
    )
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what benchmarks.gpu wrote")
    parser.add_argument("picture", type=Path, help="the file to make, .svg or .png")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text(encoding="utf-8")), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
