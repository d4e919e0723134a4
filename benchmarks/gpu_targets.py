"""What the project promises of a GPU, each with what `benchmarks.gpu` has measured of it."""

from __future__ import annotations

from typing import Any

__all__ = ["targets"]

_STATES = {True: "reached", False: "not reached", None: "not measured"}


def targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per target: its text, what was measured, and whether that reaches it."""
    seven = _rows(parts, "llama-2-7b")
    small = _rows(parts, "smollm2-135m")
    plain = _row(seven, 1, 512, 1, False)
    tree = _row(seven, 1, 512, 64, True)
    step = _row(small, 1, 512, 1, False)
    products = None
    if step is not None and "products_ms" in step:
        products = step["ms"] / step["products_ms"]
    idle = (parts.get("idle") or {}).get("nodes 1", {}).get("idle_share")
    answers = parts.get("end_to_end") or {}
    first = {row["batch"]: row for row in answers.get("rows", [])}.get(1, {}).get("ratio_median")
    highest, emptying = (
        min((row["ratio_interval_95"][1] for row in answers.get(name, [])), default=None)
        for name in ("streams", "rows")
    )
    lost = [
        row["share_lost_median"]
        for name, case in (parts.get("http") or {}).items()
        if name.startswith("llama-2-7b") and name.endswith("in a process")  # as `serve` has it there
        for row in case.get("rows", [])
        if row["streams"] == 64
    ]
    parted = (parts.get("divergences") or {}).get("float32", {}).values()
    margin = max((row["largest_margin"] or 0.0 for row in parted), default=None)
    ratio = None if plain is None else plain.get("over_reading")
    growth = None if tree is None else tree.get("over_one_node")
    runs = [run["passed"] for run in (parts.get("tests") or {}).values() if isinstance(run, dict)]
    return [
        _target("the tests marked cuda pass", all(runs) if runs else None, bool),
        _target(
            "7B, batch 1, context 512: plain step over reading its bytes, at most 1.15", ratio, _most(1.15)
        ),
        _target("the same: N = 64 with drafting over N = 1, at most 1.10", growth, _most(1.10)),
        _target("SmolLM2, batch 1: step over its matrix products alone, at most 1.3", products, _most(1.3)),
        _target("7B, batch 8: share of a step in which the GPU idles, under 0.03", idle, _most(0.03)),
        _target("SmolLM2, shipped heads, batch 1: auto over off, at least 1.3", first, lambda x: x >= 1.3),
        _target(
            "the same, any number of streams: upper end of the 95 % interval, at least 1.0",
            highest,
            lambda x: x >= 1.0,
        ),
        _target("the same, batches that run empty, until the last answer ends", emptying, lambda x: x >= 1.0),
        _target(
            "7B over HTTP, 64 streams: share of tokens/s lost, at most 0.05",
            lost[0] if lost else None,
            _most(0.05),
        ),
        _target("float32: texts part only at ties, top-2 margin at most 1e-4", margin, _most(1e-4)),
    ]


def _target(text: str, measured: Any, reached: Any) -> dict[str, Any]:
    state = None if measured is None else bool(reached(measured))
    return {"target": text, "measured": measured, "state": _STATES[state]}


def _most(limit: float) -> Any:
    return lambda value: value <= limit


def _rows(parts: dict[str, Any], shape: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (parts.get("steps") or {}).get(shape, {}).get("rows", [])
    return found


def _row(
    rows: list[dict[str, Any]], batch: int, context: int, nodes: int, drafting: bool
) -> dict[str, Any] | None:
    wanted = {"batch": batch, "context": context, "nodes": nodes, "drafting": drafting}
    for row in rows:
        if "ms" in row and all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None
