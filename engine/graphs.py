"""Captured steps: the two halves of a decode step as CUDA graphs, one pair for each bucket of shapes.

A graph repeats kernels on the same memory, so everything that differs from step to step is read from
buffers allocated once: slots and tree shapes are copied into one before each step; block tables, lengths,
roots and sampling parameters are in the slots' tensors anyway. The halves are the eager step's own
functions (`Runner.draft_forward`, `Runner.targets_accept_compact`) on these buffers. Between the two a host
may change the logits.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from engine.config import MAX_TREE_NODES
from engine.errors import CaptureError
from engine.medusa.accept import accept
from engine.medusa.buckets import Buckets
from engine.medusa.draft import Draft
from engine.medusa.tree import Topology, TreeShape
from engine.runner import Batch, Runner, Verified
from engine.sampler import verify_all, verify_greedy
from engine.step_results import Results

__all__ = ["Bucket", "CapturedRunner", "CudaGraph", "Graph", "RecordedGraph", "cuda_graphs"]

log = logging.getLogger(__name__)


class Graph(Protocol):
    """Work recorded once and repeated on the same memory."""

    def capture(self, run: Callable[[], None]) -> None:
        """Record `run`, which may be run once or twice meanwhile."""

    def replay(self) -> None:
        """Do it again."""


class CudaGraph:
    """A graph on the device.

    Args:
        pool: memory (`torch.cuda.graph_pool_handle()`) that graphs share which never run at the same time.
        stream: on which to capture; graphs that share memory share this too.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph, self._pool, self._stream = torch.cuda.CUDAGraph(), pool, stream

    def capture(self, run: Callable[[], None]) -> None:
        """See `Graph.capture`. The first run loads kernels and makes workspaces, which a capture must not."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        # The event loop and the metrics run in other threads: what they do is no concern of the capture.
        with torch.cuda.graph(
            self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """Makes graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return lambda: CudaGraph(pool, stream)


class RecordedGraph:
    """A graph for any device, which holds code to the rules of CUDA graphs; for tests.

    `capture` runs the code once and notes every operator with its arguments; `replay` runs the operators
    again, not the code, so what the code would decide anew stays decided, as on CUDA. Tensors made inside
    are made anew. One from outside is the same memory at each replay, and has to be there still: it is not
    kept alive.

    Raises:
        RuntimeError: on capture, the code reads a tensor from the host, makes one of the host's values, or
            has a shape that depends on values; on replay, a tensor it used is gone.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def capture(self, run: Callable[[], None]) -> None:
        run()  # as on CUDA, where the first run fills caches
        recorder = _Recorder()
        with _NoHostAccess(), recorder:
            run()
        self._calls = recorder.calls

    def replay(self) -> None:
        made: dict[int, Tensor] = {}
        for call in self._calls:
            args, kwargs = tree_unflatten([_value(argument, made) for argument in call.arguments], call.spec)
            results, _ = tree_flatten(call.operator(*args, **kwargs))
            for key, result in zip(call.results, results, strict=True):
                if key is not None:
                    made[key] = result


@dataclass(frozen=True, slots=True)
class _Made:
    """The tensor that an earlier call of the recording has made."""

    key: int


@dataclass(frozen=True, slots=True)
class _Call:
    operator: Callable[..., Any]
    arguments: list[Any]
    spec: TreeSpec
    results: list[int | None]


def _value(argument: Any, made: dict[int, Tensor]) -> Any:
    if isinstance(argument, _Made):
        return made[argument.key]
    if isinstance(argument, weakref.ref):
        found = argument()
        if found is None:
            raise RuntimeError("a tensor that the graph uses is gone")
        return found
    return argument


_HOST_ACCESS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "tensor",
    "as_tensor",
    "from_numpy",
}
"""Functions of torch that copy between host and device."""

_HOST_READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "bincount",
    "lift_fresh",
}
"""Operators that copy, or whose result's shape depends on values."""


class _NoHostAccess(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _HOST_ACCESS:
            raise RuntimeError(f"{func.__name__} in a captured step")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self._made: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no two tensors of the recording have one id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        arguments, spec = tree_flatten((args, kwargs or {}))
        masked = name.startswith("index") and any(
            isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
            for value in tree_flatten(args[1])[0]
        )
        if name in _HOST_READS or masked:
            raise RuntimeError(f"{func} in a captured step")
        noted = [self._note(value) for value in arguments]
        out = func(*args, **(kwargs or {}))
        given = {id(value) for value in arguments if isinstance(value, Tensor)}
        results: list[int | None] = []
        for result in tree_flatten(out)[0]:
            if not isinstance(result, Tensor) or (id(result) in given and id(result) not in self._made):
                results.append(None)  # written in place
                continue
            results.append(self._made.setdefault(id(result), len(self._made)))
            self._alive.append(result)
        self.calls.append(_Call(func, noted, spec, results))
        return out

    def _note(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _Made(self._made[id(value)]) if id(value) in self._made else weakref.ref(value)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps of `batch` sequences with `nodes` nodes each, in trees of at most `depth`."""

    batch: int
    nodes: int
    depth: int


@dataclass(frozen=True, slots=True)
class _Captured(Verified):
    """`Verified` in the graphs' buffers: the next step writes over it.

    Args:
        bucket: whose first half has run.
    """

    bucket: Bucket


class CapturedRunner(Runner):
    """A `Runner` that replays graphs where a batch fits one of the buckets, and is eager where not.

    Every bucket has three or four graphs: the first half with the heads, where they draft, and without,
    where the lookup does or nothing; the second half for greedy batches, in which nobody asks for more,
    and for all others. All of them share buffers and memory. A batch smaller than its bucket is filled up
    with sequences of one node in a spare slot, which writes to block 0 and begins anew each step.

    Args:
        graph: makes graphs.
        buckets: shapes to capture.
        arguments: those of `Runner`.
    """

    def __init__(self, *args: Any, graph: Callable[[], Graph], buckets: Buckets, **arguments: Any) -> None:
        super().__init__(*args, **arguments, spare_slots=1, captured=True)
        self.buckets = buckets
        self._graph = graph
        self._spare = len(self._root) - 1
        self._max_length = arguments["max_model_len"]
        self._sampling.allocate()
        if self._lookup is not None:
            self._lookup.allocate_predictions()
        self._first: dict[tuple[Bucket, bool], Graph] = {}
        self._second: dict[tuple[Bucket, bool], Graph] = {}

        rows, config, width = buckets.max_rows, self._decoder.config, 4 + MAX_TREE_NODES
        width += 2 + self._lookup.size if self._lookup is not None else 0

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._inputs = buffer(torch.int64, max(buckets.batches) + 5 * rows)
        self._tokens, self._node_rows = buffer(torch.int64, rows), buffer(torch.int64, rows)
        self._valid = buffer(torch.bool, rows)
        self._row_of = torch.arange(rows, device=self._device)
        self._states = buffer(self._pool.dtype, rows, config.hidden_size)
        self._logits = buffer(self._decoder.logits_dtype, rows, config.vocab_size)
        self._packed = buffer(torch.int64, max(buckets.batches) * width)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every bucket.

        Raises:
            CaptureError: one cannot be captured; the text says what to do.
        """
        started = time.perf_counter()
        for batch, nodes in self.buckets:
            bucket = self._bucket(batch, nodes)
            for heads in self.drafts(nodes):
                self._first_half(bucket, heads)
            for anything in (False, True):
                self._second_half(bucket, anything)
        count = len(self._first) + len(self._second)
        log.info("captured %d graphs of decode steps in %.1f s", count, time.perf_counter() - started)

    def drafts(self, nodes: int) -> list[bool]:
        """Whether trees of so many nodes may come without the heads (False), with them (True), or both."""
        heads = self._drafter.most_heads > 0 and nodes > 1
        return [False] * (nodes == 1 or self._lookup is not None) + [True] * heads

    @torch.inference_mode()
    def draft_forward(self, batch: Batch) -> Verified:
        """See `Runner.draft_forward`."""
        found = self.buckets.find(len(batch.shapes), max(shape.num_nodes for shape in batch.shapes))
        if found is None:
            return super().draft_forward(batch)
        return self.replay(batch, found, heads=any(shape.head_nodes for shape in batch.shapes))

    @torch.inference_mode()
    def replay(self, batch: Batch, size: tuple[int, int], *, heads: bool) -> Verified:
        """The first half in a bucket of that size, with or without drafting by the heads."""
        bucket = self._bucket(*size)
        graph = self._first_half(bucket, heads)
        self._fill(bucket, heads, [sequence.slot for sequence in batch.sequences], batch.shapes)
        graph.replay()
        found = self._verified(bucket)
        return _Captured(found.draft, found.hidden, found.logits, found.rows, bucket)

    @torch.inference_mode()
    def targets_accept_compact(self, batch: Batch, verified: Verified) -> Results:
        """See `Runner.targets_accept_compact`."""
        if not isinstance(verified, _Captured):
            return super().targets_accept_compact(batch, verified)
        anything = any(
            not request.sampling.greedy or request.sampling.adjusts or request.prediction_token_ids
            for request in (sequence.request for sequence in batch.sequences)
        )
        self._second_half(verified.bucket, anything).replay()
        packed = self._packed_rows(verified.bucket)[: len(batch.sequences)]
        if self._device.type == "cpu":
            packed = packed.clone()  # the next step writes to it, perhaps before this one's is read
        return Results(packed, verified.bucket.depth, started=batch.started, begun=batch.begun)

    def _bucket(self, batch: int, nodes: int) -> Bucket:
        most = self._most(nodes, heads=True)
        return Bucket(
            batch, nodes, max(self._drafter.depth(TreeShape(most.head_nodes, 0)), most.lookup_nodes)
        )

    def _most(self, nodes: int, *, heads: bool) -> TreeShape:
        """What is on offer for a tree of so many nodes: nodes of the heads, and of the lookup chain."""
        return TreeShape(
            min(nodes - 1, self._drafter.most_heads) if heads else 0,
            min(nodes - 1, self._lookup.size) if self._lookup is not None else 0,
        )

    def _first_half(self, bucket: Bucket, heads: bool) -> Graph:
        key = bucket, heads
        if key not in self._first:
            self._first[key] = self._make(bucket, lambda: self._draft_forward(bucket, heads))
        return self._first[key]

    def _second_half(self, bucket: Bucket, anything: bool) -> Graph:
        key = bucket, anything
        if key not in self._second:
            self._second[key] = self._make(bucket, lambda: self._targets_accept_compact(bucket, anything))
        return self._second[key]

    def _make(self, bucket: Bucket, run: Callable[[], None]) -> Graph:
        """A graph of `run`, captured with nobody in it."""
        before = self._inputs.clone()
        self._fill(bucket, False, [], [])
        graph = self._graph()
        try:
            graph.capture(run)
        except Exception as error:
            raise CaptureError(
                f"cannot capture the decode step of {bucket.batch} sequences with {bucket.nodes} nodes: "
                f"{error}; --enforce-eager runs without captured steps, and if memory was short, lower "
                "gpu_memory_utilization, max_num_seqs or max_step_tokens"
            ) from error
        self._inputs.copy_(before)
        return graph

    def _fill(self, bucket: Bucket, heads: bool, slots: list[int], shapes: list[TreeShape]) -> None:
        """What the graphs read: slots and shapes, and of those who fill the batch up."""
        missing = bucket.batch - len(slots)
        most = self._most(bucket.nodes, heads=heads)
        grid = self._drafter.grid([*shapes, *[TreeShape(0, 0)] * missing], most.head_nodes, bucket.nodes)
        values = torch.tensor([*slots, *[self._spare] * missing])
        staged = torch.cat((values, torch.from_numpy(grid).flatten()))
        if self._device.type == "cuda":
            staged = staged.pin_memory()
        self._inputs[: len(staged)].copy_(staged, non_blocking=True)

    def _slots_and_grid(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        slots = self._inputs[: bucket.batch]
        grid = self._inputs[bucket.batch : bucket.batch * (1 + 5 * bucket.nodes)]
        return slots, grid.view(5, bucket.batch, bucket.nodes)

    def _verified(self, bucket: Bucket) -> Verified:
        """The first half's results."""
        _, grid = self._slots_and_grid(bucket)
        count, shape = bucket.batch * bucket.nodes, (bucket.batch, bucket.nodes)
        _, parents, depths, ancestors, _ = grid.unbind()
        topology = Topology(parents, depths, ancestors, self._valid[:count].view(shape), bucket.depth)
        tokens, row_of = self._tokens[:count].view(shape), self._row_of[:count].view(shape)
        draft = Draft(tokens, topology, None, row_of, padded=True)
        rows = self._node_rows[:count].view(shape)
        return Verified(draft, self._states[:count], self._logits[:count], rows)

    def _packed_rows(self, bucket: Bucket) -> Tensor:
        width = 5 + bucket.depth + (2 + self._lookup.size if self._lookup is not None else 0)
        return self._packed[: bucket.batch * width].view(bucket.batch, width)

    def _static_batch(self, slots: Tensor, anything: bool) -> Batch:
        predicted: dict[int, int] = {}
        if anything and self._lookup is not None:
            predicted = dict.fromkeys(range(len(slots)), self._lookup.longest_prediction)
        return Batch([], [], slots, self._lengths[slots], self._max_length, predicted, adjusted=anything)

    def _draft_forward(self, bucket: Bucket, heads: bool) -> None:
        """What the graph of a first half holds."""
        slots, grid = self._slots_and_grid(bucket)
        draft = self._drafter.fixed(
            root=self._root[slots],
            hidden=self._hidden[slots],
            chain=self._lookup.tokens[slots] if self._lookup is not None else None,
            most=self._most(bucket.nodes, heads=heads),
            grid=grid,
            max_depth=bucket.depth,
        )
        found, kept = self.forward(self._static_batch(slots, False), draft), self._verified(bucket)
        kept.draft.tokens.copy_(draft.tokens)
        kept.draft.topology.valid.copy_(draft.topology.valid)
        kept.rows.copy_(found.rows)
        kept.hidden.copy_(found.hidden)
        kept.logits.copy_(found.logits)

    def _targets_accept_compact(self, bucket: Bucket, anything: bool) -> None:
        """What the graph of a second half holds."""
        slots, _ = self._slots_and_grid(bucket)
        batch, verified = self._static_batch(slots, anything), self._verified(bucket)
        draft, logits = verified.draft, verified.logits
        if anything:
            targets = verify_all(logits, draft.tokens, draft.topology, self._sampling.all_rows(slots))
        else:
            best = logits.argmax(-1).view_as(draft.tokens)
            targets = verify_greedy(best, draft.tokens, draft.topology)
        accepted = accept(draft.tokens, targets, draft.topology)
        self.compact(batch, verified, accepted)
        self._packed_rows(bucket).copy_(self.report(batch, accepted))
        self._lengths[self._spare :].zero_()
