"""Start-up measurement: what a decode step takes on this very device, by batch size and rows."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from engine.cache.blocks import BlockManager
from engine.config import MAX_TREE_NODES
from engine.graphs import CapturedRunner
from engine.medusa.draft import Draft, Drafter
from engine.medusa.records import considered_sizes
from engine.medusa.step_times import StepTimes
from engine.medusa.tree import Tree, TreeShape
from engine.runner import Runner
from engine.types import Request, SamplingParams, Sequence

__all__ = ["measure"]

log = logging.getLogger(__name__)

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_NODES = (1, 2, 4, 8, 16, 32, 64)

_CONTEXT = 96
"""Tokens in the cache of each measured sequence."""

_MOST_ROWS = 128
"""Steps of more rows are not measured but extrapolated: they take long and are rarely worth it."""

_LONGEST_S = 60.0
"""Seconds after which an eager runner measures no larger batch: their times follow from those of smaller
ones, and are corrected while serving. On a busy machine all of them may take minutes."""

_ROUNDS = 3

_IN_A_ROW = 3

_ENOUGH_S = 0.3
"""Seconds of steps of one size after which no more are made in a row, since long steps vary little."""

_ENOUGH_OF_BATCH_S = 10.0
"""Seconds of one batch size after which there are no more rounds of it."""

_WARM_S = 0.5
"""Seconds of steps before the first that counts: a process's first steps are slow, and those of the smallest
batches, which are measured first, would make larger trees look cheap."""

_BUSY_CYCLES = 8_000_000
"""Of a GPU's clock, at most 2 GHz."""

_STRIDE = 7919
"""From one token to the next of those that steps are measured with, a prime."""

_RAGGED = (2, 9)
"""Nodes of the one larger tree in the batch, which show what trees of different sizes cost."""


@torch.inference_mode()
def measure(
    runner: Runner,
    blocks: BlockManager,
    heads: Tree | None,
    *,
    max_num_seqs: int,
    max_step_tokens: int,
    max_model_len: int,
) -> StepTimes:
    """Time decode steps of made-up sequences, which leave nothing behind.

    Args:
        runner: all of its slots are free. If it has captured steps, they are what is timed.
        blocks: the pool's books; all blocks are free.
        heads: the heads' tree; None without heads.
        max_num_seqs: slots.
        max_step_tokens: bound on the rows of a step.
        max_model_len: bound on the context.

    Returns:
        For each batch size and number of nodes the fastest of a few rounds.
    """
    started = time.monotonic()
    log.info(
        "measuring decode steps for --tree auto: on a CPU half a minute, or two where it is busy; "
        "--tree 8 does without"
    )
    context = max(1, min(_CONTEXT, max_model_len // 2))
    buckets = runner.buckets if isinstance(runner, CapturedRunner) else None
    most_rows = min(_MOST_ROWS, max_step_tokens)
    points: dict[int, list[tuple[int, float]]] = {}
    drafts: dict[int, list[float]] = {}
    padding: dict[int, float] = {}
    uneven: dict[int, float] = {}
    for batch in _BATCHES if buckets is None else buckets.batches:
        sequences = _sequences(blocks, batch, context, runner.vocab_size) if batch <= max_num_seqs else None
        if sequences is None:
            break
        sizes = considered_sizes(heads)
        if batch == 1 and not isinstance(runner, CapturedRunner):
            _warm(runner, sequences)
        if isinstance(runner, CapturedRunner):
            points[batch], drafts[batch] = _captured(runner, sequences, sizes)
        else:
            points[batch], drafts[batch], padding[batch], uneven[batch] = _eager(
                runner, sequences, sizes, most_rows
            )
        for sequence in reversed(sequences):  # so that the free list ends as it began
            blocks.release(sequence.blocks)
        if buckets is None and batch > 1 and time.monotonic() - started > _LONGEST_S:
            break
    log.info("measured decode steps of up to %d sequences in %.1f s", max(points), time.monotonic() - started)
    return StepTimes(points, drafts, padding, uneven, context, buckets)


def _eager(
    runner: Runner, sequences: list[Sequence], sizes: list[int], most_rows: int
) -> tuple[list[tuple[int, float]], list[float], float, float]:
    """(rows, seconds) points, seconds of drafting each size of the heads' branch, of a padded cell, and of
    trees of different sizes whatever they are."""
    batch = len(sequences)
    shapes = [nodes for nodes in _NODES if nodes == 1 or batch * nodes <= most_rows]
    best = dict.fromkeys(shapes, float("inf"))
    cost = dict.fromkeys(sizes, float("inf"))
    ragged = dict.fromkeys(_RAGGED, float("inf"))
    started = time.monotonic()
    for _ in range(_ROUNDS):
        for nodes in shapes:
            best[nodes] = min(best[nodes], _step(runner, sequences, [nodes] * batch))
        for nodes in _RAGGED * _IN_A_ROW if batch > 1 else ():
            # As in serving, hardly one of them follows its like.
            took = _step(runner, sequences, [nodes, *[1] * (batch - 1)], in_a_row=1)
            ragged[nodes] = min(ragged[nodes], took)
        for size in cost:
            cost[size] = min(cost[size], _draft(runner, sequences, size))
        if time.monotonic() - started > _ENOUGH_OF_BATCH_S:
            break
    points = [(batch * nodes, best[nodes]) for nodes in shapes]
    if batch == 1:
        return points, list(cost.values()), 0.0, 0.0
    rows, cells = batch + np.array(_RAGGED) - 1, (batch - 1) * (np.array(_RAGGED) - 1)
    few, many = np.array([*ragged.values()]) - np.interp(rows, *np.array(points).T)
    padding = max(0.0, float((many - few) / (cells[1] - cells[0])))
    return points, list(cost.values()), padding, max(0.0, float(few - cells[0] * padding))


def _warm(runner: Runner, sequences: list[Sequence]) -> None:
    until = time.perf_counter() + _WARM_S
    while time.perf_counter() < until:
        for nodes in (1, 8):
            _step(runner, sequences, [nodes] * len(sequences))


def _captured(
    runner: CapturedRunner, sequences: list[Sequence], sizes: list[int]
) -> tuple[list[tuple[int, float]], list[float]]:
    """(rows, seconds) points of a batch's buckets, and seconds of drafting each size of the heads' branch."""
    batch = len(sequences)
    plain: dict[int, float] = {}
    drafting: dict[int, float] = {1: 0.0}
    for nodes in (nodes for size, nodes in sorted(runner.buckets) if size == batch):
        took = {
            heads: min(_replay(runner, sequences, nodes, heads) for _ in range(_ROUNDS))
            for heads in runner.drafts(nodes)
        }
        plain[nodes] = min(took.values())
        # Where there is no step without the heads, drafting is part of every step of that size.
        drafting[nodes] = max(0.0, took.get(True, plain[nodes]) - took.get(False, plain[nodes]))
    known, seconds = zip(*sorted(drafting.items()), strict=True)
    costs = [float(np.interp(1 + size, known, seconds)) if size else 0.0 for size in sizes]
    return [(batch * nodes, plain[nodes]) for nodes in sorted(plain)], costs


def _sequences(blocks: BlockManager, count: int, context: int, vocab_size: int = 1) -> list[Sequence] | None:
    """Sequences with room for their largest tree, each with another last token; None where the pool has none
    for so many."""
    made: list[Sequence] = []
    for slot in range(count):
        request = Request(f"measure-{slot}", (0,) * context, SamplingParams(temperature=0.0))
        tokens = [0] * context + [_STRIDE * MAX_TREE_NODES * slot % vocab_size]
        sequence = Sequence(request, 0, 0, tokens, context, context + MAX_TREE_NODES, slot, slot=slot)
        sequence.num_cached = context
        if not blocks.grow(sequence.blocks, context + MAX_TREE_NODES):
            for other in made:
                blocks.release(other.blocks)
            return None
        made.append(sequence)
    return made


def _step(runner: Runner, sequences: list[Sequence], nodes: list[int], *, in_a_row: int = _IN_A_ROW) -> float:
    """Seconds of a step that verifies chains. All tokens differ: what they are does not matter to the time,
    but a mixture's experts would else all be the same ones.

    As in serving, a step follows one of its own size: after another one it takes longer. So of `in_a_row` of
    them, or fewer of long ones, the fastest counts.
    """
    best = float("inf")
    enough = time.perf_counter() + _ENOUGH_S
    for _ in range(in_a_row):
        batch = runner.place(sequences)
        draft = _chains(batch.slots, nodes, runner.vocab_size)
        _wait(batch.slots.device)
        start = time.perf_counter()
        batch.begin()
        runner.targets_accept_compact(batch, runner.forward(batch, draft)).rows()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > enough:
            break
    return best


def _replay(runner: CapturedRunner, sequences: list[Sequence], nodes: int, heads: bool) -> float:
    """Seconds of a captured step of so many nodes each, on the device.

    It is kept busy until the host has said all of it: what the host takes would else be booked on steps that
    are shorter, and larger trees would look nearly free.
    """
    size, batch = (len(sequences), nodes), runner.place(sequences)
    _other_chains(runner, sequences)
    runner.targets_accept_compact(batch, runner.replay(batch, size, heads=heads)).rows()
    _keep_busy(batch.slots.device)
    batch = runner.place_again(sequences)
    _other_chains(runner, sequences)
    results = runner.targets_accept_compact(batch, runner.replay(batch, size, heads=heads))
    results.rows()  # for the host's memory that they take, which serving then finds, to be given back
    return results.seconds


def _other_chains(runner: CapturedRunner, sequences: list[Sequence]) -> None:
    """Let each draft other tokens, where there is a lookup; see `_step`."""
    for sequence in sequences if runner.lookup_size else ():
        first = MAX_TREE_NODES * sequence.slot + 1
        tokens = [_STRIDE * (first + node) % runner.vocab_size for node in range(runner.lookup_size)]
        runner.set_chain(sequence, tokens)


def _keep_busy(device: torch.device) -> None:
    """Let the device do nothing for some milliseconds."""
    if device.type == "cuda":
        torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]


def _chains(slots: torch.Tensor, nodes: list[int], vocab_size: int) -> Draft:
    places = MAX_TREE_NODES * slots.unsqueeze(1) + torch.arange(max(nodes), device=slots.device)
    tokens = _STRIDE * places % vocab_size
    shapes = [TreeShape(0, count - 1) for count in nodes]
    return Drafter(None, slots.device).draft(tokens[:, 0], tokens[:, 0], tokens[:, 1:], shapes)


def _draft(runner: Runner, sequences: list[Sequence], head_nodes: int) -> float:
    """Seconds of drafting so many nodes of the heads' branch."""
    if head_nodes == 0:
        return 0.0
    for sequence in sequences:
        sequence.head_nodes = head_nodes
    batch = runner.place(sequences)
    _wait(batch.slots.device)
    start = time.perf_counter()
    runner.draft(batch)
    _wait(batch.slots.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
