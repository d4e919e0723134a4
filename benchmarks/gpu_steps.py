"""Parts of `benchmarks.gpu` about decode steps: their time by shape, batch, context and nodes, and idling.

Steps are the engine's own, of sequences whose prompts are made up: their K/V are random, which costs a
step as much as real ones. What is drafted is hardly ever accepted then, so each step emits about one token.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.gpu_run import Run, ms
from benchmarks.gpu_shapes import SHAPES, TINY, Bytes, Shape, write_folder
from engine.cache.blocks import BlockManager
from engine.config import MAX_TREE_NODES, EngineConfig
from engine.cuda_graphs import RecordedGraph, cuda_graphs
from engine.engine import Engine
from engine.errors import MedusaError
from engine.loader import Loaded, load
from engine.medusa.buckets import Buckets
from engine.medusa.heads import HeadDrafter
from engine.model.layers import Linear
from engine.scheduler import Chunk
from engine.step_results import Prefilled
from engine.types import Request, SamplingParams

__all__ = ["idle", "load_shape", "made_up_engine", "sampled_steps", "step_times", "steps"]

TREE_FILE = ROOT / "configs" / "trees" / "vicuna_7b_stage1.json"
NODES = (1, 8, 16, 32, 64)
BATCHES = (1, 4, 16, 64)
CONTEXTS = (512, 4096)

_ROOM = 0.85
"""Share of the device's free memory that a K/V pool may take here."""


class FreeDrafter(HeadDrafter):
    """Drafts without computing anything: what is left of a step is verification."""

    def __init__(self, drafter: HeadDrafter) -> None:
        self.tree, self.accepted, self._device, self._bigram = drafter.tree, None, drafter._device, None

    def guess(self, root: Tensor | None, hidden: Tensor, nodes: int) -> Tensor:
        del root
        tokens = torch.arange(nodes, device=self._device)  # alike, they would choose the same experts
        return tokens.expand(len(hidden), -1).contiguous()


@contextmanager
def load_shape(
    run: Run, shape: Shape, *, tokens: int | None = None, **settings: Any
) -> Iterator[tuple[Loaded, str]]:
    """A shape with random weights and heads on the device; SmolLM2 itself where its files are there.

    Args:
        tokens: of its K/V pool; as many as fit if None.

    Yields:
        What is loaded, and "real" or "random" for its weights.
    """
    values: dict[str, Any] = {
        "device": str(run.device),
        "dtype": "float32" if run.tiny else "bfloat16",
        "tree": 64,
        "tree_file": str(TREE_FILE),
        "lookup": "off",
        "max_num_seqs": 64,
        "max_model_len": 128 if run.tiny else 4096 + 512,
        "prefix_caching": False,
        "attention": "auto" if run.cuda else "sdpa",  # the CPU's own cannot be captured
        **settings,
    }
    if tokens is not None:
        values["kv_cache_tokens"] = tokens
    elif run.tiny:
        values["kv_cache_tokens"] = 2048
    else:
        values["gpu_memory_utilization"] = _ROOM
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(shape, Path(temporary) / shape.name)
        values["heads"] = str(folder / "heads.safetensors")
        kind = "real"
        try:
            if shape.name != "smollm2-135m":
                raise LookupError
            loaded = load(EngineConfig(model="smollm2-135m", **values), progress=False)
        except (LookupError, MedusaError):  # the files are not here, which is fine for timing
            kind = "random"
            config = EngineConfig(model=str(folder), load_format="dummy", **values)
            loaded = load(config, progress=False)
        # Attention over zeros is quicker than over numbers.
        loaded.pool.data.normal_()
        try:
            yield loaded, kind
        finally:
            del loaded
            run.free()


@contextmanager
def made_up_engine(
    loaded: Loaded,
    *,
    batch: int,
    context: int,
    nodes: int,
    drafting: bool,
    sampling: dict[str, Any] | None = None,
) -> Iterator[Engine]:
    """An engine in which `batch` sequences of `context` tokens decode, with trees of `nodes` each.

    Its buffers and graphs take gigabytes: afterwards they are gone, before the next one is made.

    Raises:
        ValueError: the pool does not hold them.
        RuntimeError: a step failed; the text says how.
    """
    heads = loaded.heads if nodes > 1 else None
    if heads is not None and not drafting:
        heads = FreeDrafter(heads)
    blocks = BlockManager(loaded.pool.num_blocks, loaded.pool.block_size)
    if batch * -(-(context + _STEPS + 2 * MAX_TREE_NODES) // loaded.pool.block_size) > blocks.total:
        raise ValueError(f"the K/V of {batch} x {context} tokens do not fit")
    info = replace(
        loaded.info,
        tree="off" if nodes == 1 else str(nodes),
        tree_size=nodes,
        num_heads=0 if heads is None else loaded.info.num_heads,
        max_num_seqs=batch,
    )
    most = max(512, batch * nodes)
    made = replace(loaded, info=info, heads=heads, blocks=blocks, max_step_tokens=most)
    # Only the graphs that these steps take, each made when it is first needed.
    graph = cuda_graphs(loaded.pool.device) if loaded.captured else None
    graph = RecordedGraph if loaded.pool.device.type == "cpu" else graph
    engine = Engine(made, ahead=True, graph=graph, buckets=Buckets((batch,), (nodes,), batch * nodes))
    _skip_prefill(engine, batch * context)
    try:
        _start(engine, batch, context, sampling or {"temperature": 0.0})
        yield engine
    finally:
        for sequence in list(engine._scheduler):
            engine.abort(sequence.request.request_id)
        engine.check()
        # The stand-in for prefill refers to the runner, which would so wait for the garbage collector.
        del engine._runner.prefill, engine._runner.launch
        del engine._runner


def _start(engine: Engine, batch: int, context: int, values: dict[str, Any]) -> None:
    """Add the sequences, which are sampled so, and step until all of them decode."""
    sampling = SamplingParams(**values, max_tokens=_STEPS, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(batch):
        prompt = torch.randint(engine.info.vocab_size, (context,), generator=generator).tolist()
        engine.add(Request(str(number), tuple(prompt), sampling))
    for _ in range(2 + batch):
        deltas = engine.step()
        if errors := [delta.error for delta in deltas if delta.error is not None]:
            raise RuntimeError(errors[0])
        if len(deltas) == batch and all(delta.num_steps for delta in deltas):
            break


_STEPS = 96
"""Most tokens that a made-up sequence emits."""


def _skip_prefill(engine: Engine, tokens: int) -> None:
    """Let prompts be taken at once, and as if their K/V were in the pool."""
    runner = engine._runner

    def prefill(chunks: list[Chunk]) -> list[Prefilled]:
        for chunk in chunks:
            chunk.sequence.num_cached = chunk.end
            runner.place([chunk.sequence])
        return [Prefilled(first=c.sequence.token_ids[-1] if c.last else None) for c in chunks]

    runner.prefill = runner.launch = prefill  # type: ignore[method-assign]
    engine._scheduler._max_prefill_tokens = max(tokens, engine._scheduler._max_prefill_tokens)


def step_times(run: Run, engine: Engine, batch: int, *, count: int, budget: float = 1.5) -> list[float]:
    """Seconds of decode steps in which all sequences take part, by the clock: what a user waits for."""
    count = 3 if run.tiny else count
    found: list[float] = []
    started = time.perf_counter()
    for number in range(count + 4):
        began = time.perf_counter()
        deltas = engine.step()  # it waits for the device by itself, and for no more than it has to
        took = time.perf_counter() - began
        if len(deltas) != batch or not all(delta.num_steps for delta in deltas):
            break
        if number >= 4 or run.tiny:
            found.append(took)
        if time.perf_counter() - started > budget and len(found) >= 5:
            break
    if not found:
        raise RuntimeError("no decode step had the whole batch in it")
    return found


def steps(run: Run) -> dict[str, Any]:
    """Step times by shape, batch, context and nodes, and what of them is reading."""
    read = run.parts.get("ceilings", {}).get("read_bytes_per_s")
    found: dict[str, Any] = {}
    shapes = [TINY] if run.tiny else [SHAPES[name] for name in run.args.shapes]
    for number, shape in enumerate(shapes):
        # What is left is shared among the shapes; a part of it is kept for the parts that follow.
        share = max(20.0, run.left() * run.args.steps_share / (len(shapes) - number))
        until = time.monotonic() + (1e9 if run.tiny else share)
        rows: list[dict[str, Any]] = []
        with load_shape(run, shape, tokens=_tokens(run)) as (loaded, kind):
            size = Bytes.of(loaded)
            found[shape.name] = {
                "weights": kind,
                "bytes": {f: getattr(size, f) for f in Bytes.__slots__},
                "rows": rows,
            }
            for batch, context in _cases(run):
                if time.monotonic() > until:
                    rows.append({"batch": batch, "context": context, "skipped": "no time left"})
                    continue
                rows += _case(run, loaded, size, batch, context, read)
                run.record("steps", found)
        del loaded  # its pool takes most of the memory, and the next one's is allocated before it lets go
        run.free()
    return found


def _cases(run: Run) -> list[tuple[int, int]]:
    """(batch, context), what matters most first."""
    if run.tiny:
        return [(1, 24), (2, 24)]
    if run.args.cases:
        return list(run.args.cases)
    return [(batch, context) for context in CONTEXTS for batch in BATCHES]


def _tokens(run: Run) -> int | None:
    """Of a pool for the chosen cases; None is as many as fit."""
    if not run.args.cases:
        return None
    block = 64  # or fewer
    return (
        max(
            batch * (-(-(context + _STEPS + 2 * MAX_TREE_NODES) // block) + 1) * block
            for batch, context in run.args.cases
        )
        + 5120
    )


def _case(
    run: Run, loaded: Loaded, size: Bytes, batch: int, context: int, read: float | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    base: float | None = None
    for nodes in (1, 4) if run.tiny else run.args.nodes or NODES:
        for drafting in _drafting(run, nodes):
            case: dict[str, Any] = {"batch": batch, "context": context, "nodes": nodes, "drafting": drafting}
            row = dict(case)
            rows.append(row)
            try:
                with made_up_engine(loaded, **case) as engine:
                    times = step_times(run, engine, batch, count=30)
                    if (batch, context) == _cases(run)[0]:
                        row["kernels_us"] = _kernels(run, engine)
            except torch.AcceleratorError:
                raise  # the device is lost
            except (ValueError, RuntimeError) as error:  # no room for it
                row["skipped"] = str(error)[:200]
                print(row, flush=True)
                continue
            seconds = statistics.median(times)
            base = seconds if nodes == 1 else base
            num_bytes = size.step(batch, context, nodes, drafting=drafting)
            row |= {"ms": ms(seconds), "ms_mean": ms(statistics.fmean(times)), "steps": len(times)}
            row["bytes"] = num_bytes
            if base is not None:
                row["over_one_node"] = round(seconds / base, 4)
            if read:
                row["over_reading"] = round(seconds / (num_bytes / read), 4)
            if context == _cases(run)[0][1] and not drafting and nodes in (1, 4, 64):
                row["products_ms"] = ms(_products(run, loaded, batch * nodes))
            print({name: value for name, value in row.items() if name != "kernels_us"}, flush=True)
    return rows


def _kernels(run: Run, engine: Engine, count: int = 10) -> dict[str, list[float]]:
    """What a step takes longest with: microseconds of it, and how many launches, by kernel."""
    found: dict[str, list[float]] = {}
    for name, begin, end in _ran(run, engine, count):
        total = found.setdefault(name[:80], [0.0, 0.0])
        total[0] += (end - begin) / 1000 / count
        total[1] += 1 / count
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:14]
    return {name: [round(us, 2), round(launches, 1)] for name, (us, launches) in longest}


def _drafting(run: Run, nodes: int) -> tuple[bool, ...]:
    """Whether to time a size without drafting, with it, or both."""
    if nodes == 1:
        return (False,)
    return (False, True) if run.tiny or nodes in (16, 64) else (True,)


@torch.inference_mode()
def _products(run: Run, loaded: Loaded, rows: int) -> float:
    """Seconds of a graph of the model's matrix products alone, lm_head included, over so many rows."""
    linears = [module for module in loaded.decoder.modules() if isinstance(module, Linear)]
    inputs = {linear: linear.in_features for linear in linears}
    given = {
        size: torch.empty(rows, size, dtype=loaded.pool.dtype, device=run.device).normal_()
        for size in set(inputs.values())
    }

    def work() -> None:
        for linear, size in inputs.items():
            linear(given[size])

    return run.timed(run.captured(torch.inference_mode()(work)))


_SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "filters": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
    # Random weights make flat distributions: no few tokens come into question, which is the slow way.
    "wide nucleus": {"temperature": 1.5, "top_p": 0.95},
    "everything": {"temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.5, "logit_bias": ((7, 1.0),)},
}


def sampled_steps(run: Run) -> dict[str, Any]:
    """What sampling costs: steps of 16 nodes by what their requests ask for, over greedy ones."""
    found: dict[str, Any] = {}
    shapes = [TINY] if run.tiny else [SHAPES[name] for name in ("smollm2-135m", "llama-3.1-8b")]
    nodes, context = (4, 24) if run.tiny else (16, 512)
    for shape in shapes:
        rows: list[dict[str, Any]] = []
        with load_shape(run, shape, tokens=2048 if run.tiny else 64 * 1024) as (loaded, _):
            for batch in (1, 2) if run.tiny else (1, 16, 32):
                row: dict[str, Any] = {"batch": batch, "nodes": nodes, "context": context}
                for name, sampling in _SAMPLINGS.items():
                    case = {"batch": batch, "context": context, "nodes": nodes, "drafting": True}
                    with made_up_engine(loaded, **case, sampling=sampling) as engine:
                        row[f"{name} ms"] = ms(statistics.median(step_times(run, engine, batch, count=20)))
                rows.append(row)
                print(shape.name, row, flush=True)
        del loaded  # see `steps`
        found[shape.name] = rows
        run.record("sampled_steps", found)
    return found


def idle(run: Run) -> dict[str, Any]:
    """The share of a step in which the device has nothing to do, at batch 8 of the 7B shape."""
    found: dict[str, Any] = {}
    batch = 2 if run.tiny else 8
    shape = TINY if run.tiny else SHAPES["llama-2-7b"]
    with load_shape(run, shape, tokens=2048 if run.tiny else 8192 + 4096) as (loaded, _):
        for nodes in (1, 4) if run.tiny else (1, 64):
            context = 24 if run.tiny else 512
            case: dict[str, Any] = {"batch": batch, "context": context, "nodes": nodes}
            with made_up_engine(loaded, **case, drafting=True) as engine:
                wall = statistics.fmean(step_times(run, engine, batch, count=20))
                busy, span = _profile(run, engine, count=2 if run.tiny else 15)
            found[f"nodes {nodes}"] = {
                "batch": batch,
                "step_ms": ms(wall),
                "busy_ms": ms(busy),
                # The profiler slows the host down, so the truth lies between the two.
                "idle_share": round(max(0.0, 1.0 - busy / wall), 4),
                "idle_share_profiled": round(1.0 - busy / span, 4),
            }
            print(found[f"nodes {nodes}"], flush=True)
    return found


def _profile(run: Run, engine: Engine, count: int) -> tuple[float, float]:
    """Seconds a step: in which anything ran on the device, and from the first to the last of it."""
    spans = sorted((begin, end) for _, begin, end in _ran(run, engine, count))
    return covered(spans) / 1e9 / count, (max(end for _, end in spans) - spans[0][0]) / 1e9 / count


def _ran(run: Run, engine: Engine, count: int) -> list[tuple[str, int, int]]:
    """What ran on the device in so many steps: names, and nanoseconds of beginning and end.

    Raises:
        RuntimeError: nothing did.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    kind, activity = (
        (DeviceType.CUDA, ProfilerActivity.CUDA) if run.cuda else (DeviceType.CPU, ProfilerActivity.CPU)
    )
    with profile(activities=[activity]) as profiler:
        for _ in range(count):
            engine.step()
        run.synchronize()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    found = [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == kind and event.duration_ns() > 0
    ]
    if not found:
        raise RuntimeError("the profiler saw nothing run on the device")
    return found


def covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union of sorted intervals."""
    total, end = 0, spans[0][0]
    for start, stop_ in spans:
        total += max(0, stop_ - max(start, end))
        end = max(end, stop_)
    return total
