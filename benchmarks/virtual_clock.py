"""`tree: auto` against `tree: off` by a virtual clock: the real engine on a device whose times are a table.

    python -m benchmarks.virtual_clock --output benchmarks/results/virtual-clock-h100.json
    python -m benchmarks.virtual_clock --batches 16 --rounds 12 --seed 3
    python -m benchmarks.virtual_clock --host benchmarks/results/host-cost-cpu.json --slower 3.3

What a policy of the tree is worth on a GPU, without one and without noise. The model answers each prompt
once, on this machine, and it is noted at every token what the heads and the lookup would draft there and what
of it comes true: at temperature 0 the text is the same whatever the trees, so any policy can be replayed from
that. The engine then schedules, chooses and learns as it does with captured steps launched ahead; what it
launches computes nothing, gives what was noted, and puts the clock forward by what the table says. The
measurement at the start sees the same table. What the host takes is not on the clock; with `--host` it is,
beside what the device does: for each decode step what `benchmarks.host_cost` measured for as many sequences,
and with `--slower F` F times that, as on a slower host. (The CPU time that it takes here changes by half from
run to run, with what else the machine does.) Launching costs nothing, where CUDA takes some tens of
microseconds.

Two loads: batches that run empty (all prompts at once; until the last answer ends, and until each does on the
average), and streams, each of which asks again when it is answered (tokens per second of decoding).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import (
    ROOT,
    add_model,
    engine_config,
    hardware,
    new_parser,
    numbers,
    positive,
    print_result,
    ratio_interval,
    read_items,
)
from benchmarks.host_cost import HostCost
from engine.batch import Batch, Verified
from engine.engine import Engine
from engine.flight import HostTime
from engine.graphs import CapturedRunner
from engine.loader import Loaded, load
from engine.medusa.draft import Drafter
from engine.medusa.lookup import Lookup
from engine.medusa.tree import TreeShape
from engine.runners import make_chooser
from engine.scheduler import Chunk
from engine.step_results import PromptResults, Results, StepRow
from engine.types import Request, SamplingParams, Sequence as Running, TokenDelta
from training.backbone import EngineBackbone

__all__ = ["Record", "Times", "VirtualEngine", "main", "record", "run_empty", "streams"]

_PROMPTS = [ROOT / "benchmarks" / "data" / name for name in ("questions.jsonl", "summaries.jsonl")]

_BEYOND = 40
"""Tokens noted behind those that are asked for: a step launched ahead may go on behind an answer's end."""

_H100_MS = {
    1: (0.44, 0.50, 0.545, 0.59, 0.63, 0.75, 1.00),
    2: (0.48, 0.56, 0.60, 0.65, 0.76, 0.98, 1.20),
    4: (0.534, 0.61, 0.665, 0.80, 0.88, 1.20, 1.50),
    8: (0.60, 0.69, 0.80, 0.95, 1.20, 1.45, 1.90),
    16: (0.693, 0.87, 1.05, 1.25, 1.30, 1.65),
    32: (0.90, 1.12, 1.26, 1.35, 1.65),
    64: (1.225, 1.40, 1.48, 1.65),
}
"""Milliseconds of SmolLM2's captured steps on an H100, drafting included, by sequences and nodes (1, 2, …).

Measured (results/gpu-nvidia-h100-80gb-hbm3.json and its earlier versions): one node at 1, 4, 16 and 64
sequences, end to end; and at 512 tokens the curve of one sequence, and 16 with 8 and 16 nodes. The rest lies
between them so that the trees `auto` chose there come out as often, and steps take on the average what they
took (0.60 / 0.65 / 0.94 / 1.48 ms at 1 / 4 / 16 / 64 at once)."""


@dataclass(frozen=True, slots=True)
class Times:
    """What a device takes; the defaults are much as an H100's for SmolLM2.

    Args:
        step_ms: for each bucket of sequences, of steps with 1, 2, 4, … nodes.
        draft_ms: what of it drafting by the heads takes, where there are more nodes than one.
        per_token: share of a step more for each token of context beyond `context`.
        prompts_ms: of a pass over prompts, and for each of their tokens.
    """

    step_ms: dict[int, tuple[float, ...]]
    draft_ms: float = 0.04
    context: int = 400
    per_token: float = 0.13 / 360
    prompts_ms: tuple[float, float] = (1.6, 0.0025)

    def step_s(self, batch: int, nodes: int, *, heads: bool, context: int) -> float:
        """Seconds of a step in that bucket, whose longest sequence has so many tokens."""
        row = next(row for size, row in sorted(self.step_ms.items()) if size >= batch)
        took = row[(nodes - 1).bit_length()] - (self.draft_ms if nodes > 1 and not heads else 0.0)
        return took / 1e3 * (1.0 + self.per_token * (context - self.context))

    def prompts_s(self, tokens: int) -> float:
        return (self.prompts_ms[0] + self.prompts_ms[1] * tokens) / 1e3


# -- what is noted ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt's greedy answer, and what would be drafted behind each of its tokens.

    Args:
        answer: [T] tokens, the end-of-text token not heeded.
        masks: [T], of the trees under each: bits of the heads' nodes that come true, the root's the lowest.
        chains: [T], the lookup's chain and the kind of its match.
    """

    answer: list[int]
    masks: list[int]
    chains: list[tuple[list[int], int]]


@torch.inference_mode()
def record(loaded: Loaded, prompts: Sequence[tuple[int, ...]], tokens: int) -> dict[tuple[int, ...], Record]:
    """The prompts' records.

    Args:
        loaded: a model with heads, and a pool that nobody else uses.
        tokens: of each answer.

    Raises:
        ValueError: the pool's blocks are not those that `EngineBackbone` takes.
    """
    if loaded.pool.block_size != 16:
        raise ValueError(f"a record takes blocks of 16 tokens, not of {loaded.pool.block_size}")
    engine, answers = Engine(loaded), {str(i): [] for i in range(len(prompts))}  # type: dict[str, list[int]]
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, sampling))
    while engine.has_work:
        for delta in engine.step():
            answers[delta.request_id] += delta.token_ids
    found = {}
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        hidden = EngineBackbone(loaded).hidden([[*prompt, *answer]])[len(prompt) - 1 : -1]
        found[prompt] = Record(answer, _masks(loaded, hidden, answer), _chains(loaded, prompt, answer))
    return found


def _masks(loaded: Loaded, hidden: torch.Tensor, answer: list[int]) -> list[int]:
    """See `Record`; `hidden` [T, hidden] are the states that each token was drawn from."""
    if loaded.heads is None:
        return [1] * len(answer)
    drafter, tree = Drafter(loaded.heads, hidden.device), loaded.heads.tree
    roots = torch.tensor(answer, device=hidden.device)
    parts = zip(roots.split(32), hidden.split(32), strict=True)
    guesses = torch.cat([drafter.guess(*part, tree.size - 1) for part in parts]).tolist()
    found = []
    for at, row in enumerate(guesses):
        mask = 1
        for node, (path, guess) in enumerate(zip(tree.paths, row, strict=True), start=1):
            came = at + len(path) < len(answer) and guess == answer[at + len(path)]
            mask |= (mask >> tree.parents[node] & came) << node
        found.append(mask)
    return found


def _chains(loaded: Loaded, prompt: tuple[int, ...], answer: list[int]) -> list[tuple[list[int], int]]:
    if not loaded.info.lookup:
        return [([], 0)] * len(answer)
    tokens, device = [*prompt, *answer], torch.device("cpu")
    lookup = Lookup(size=loaded.info.lookup, max_num_seqs=1, max_tokens=len(tokens) + 1, device=device)
    lookup.admit([Running(Request("", prompt), 0, 0, tokens, len(prompt), len(tokens), 0, slot=0)])
    found = []
    for at in range(len(prompt), len(tokens)):
        made = lookup.propose(torch.tensor([0]), torch.tensor([at]), max_length=at)
        found.append((made.tokens[0, : int(made.count)].tolist(), int(made.kind)))
    return found


# -- the device ------------------------------------------------------------------------------------


class HostClock:
    """Seconds of the host: what it works, and where it waits."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def work(self, seconds: float) -> None:
        self._now += seconds

    def wait(self, end: float) -> None:
        self._now = max(self._now, end)


class _Known(Results):
    """Results that were known when the step was launched, to be had when the clock says `end`."""

    def __init__(
        self, packed: torch.Tensor, depth: int, seconds: float, clock: HostClock, end: float
    ) -> None:
        super().__init__(packed, depth, started=0.0, begun=None)
        self._took, self._clock, self._end = seconds, clock, end

    @property
    def seconds(self) -> float:
        return self._took

    def wait(self) -> None:
        self._clock.wait(self._end)

    def values(self) -> NDArray[np.int64]:
        self.wait()
        return super().values()


def _packed(rows: list[StepRow], lookup: int) -> tuple[torch.Tensor, int]:
    """The rows as a device gives them, see `Results`, with chains of up to `lookup` tokens; their depth."""
    depth = max(row.length for row in rows)
    found = torch.zeros(len(rows), 5 + depth + (2 + lookup if lookup else 0), dtype=torch.int64)
    for i, row in enumerate(rows):
        mask = row.nodes - (1 << 64) if row.nodes >> 63 else row.nodes
        values = [1, row.length, row.last, mask, *row.tokens, *[0] * (depth - row.length)]
        values += [row.kind, len(row.chain), *row.chain] if lookup else []
        found[i, : len(values)] = torch.tensor(values)
    return found, depth


class _NoGraph:
    def capture(self, run: Callable[[], None]) -> None:
        """Nothing is recorded."""

    def replay(self) -> None:
        """Nothing is done."""


class VirtualEngine(Engine):
    """An engine whose steps are replayed from records, by a clock of its own.

    Args:
        loaded: on the CPU; of the model only the sizes and the heads' tree matter.
        records: of the prompts it will be asked.
        times: the device's.
        host: what the host takes; nothing by default.
    """

    def __init__(
        self,
        loaded: Loaded,
        records: dict[tuple[int, ...], Record],
        times: Times,
        *,
        host: HostCost | None = None,
    ) -> None:
        self.records, self.times, self.clock, self._host_cost = records, times, HostClock(), host
        self.prefill_s = 0.0
        self._busy_until = 0.0
        self.nodes: list[int] = []
        """Of the largest tree of each step."""
        self._depths = [0, *(len(path) for path in loaded.heads.tree.paths)] if loaded.heads else [0]
        self._at: dict[int, int] = {}
        super().__init__(loaded, ahead=True, graph=_NoGraph)
        self._host = HostTime(overlaps=host is not None, clock=self.clock.now)
        self._replace_device()
        # Measured again, by the device's times.
        self._chooser = self._scheduler._chooser = make_chooser(loaded, self._runner)

    @property
    def clock_s(self) -> float:
        """Seconds on the clock: now, and where the host takes nothing, when the device will be done."""
        return self.clock.now() if self._host_cost else self._busy_until

    def _launched(self, rows: list[StepRow], seconds: float) -> _Known:
        """What takes the device so long."""
        packed, depth = _packed(rows, self.info.lookup)
        self._busy_until = max(self._busy_until, self.clock.now()) + seconds
        return _Known(packed, depth, seconds, self.clock, self._busy_until if self._host_cost else 0.0)

    def _replace_device(self) -> None:
        runner, drafted = self._runner, False
        assert isinstance(runner, CapturedRunner)
        replay = runner.replay

        def replayed(batch: Batch, size: tuple[int, int], *, heads: bool) -> Verified:
            nonlocal drafted
            drafted = heads
            return replay(batch, size, heads=heads)

        def results(batch: Batch, verified: Verified) -> Results:
            bucket = verified.bucket  # type: ignore[attr-defined]
            took = self.times.step_s(bucket.batch, bucket.nodes, heads=drafted, context=batch.max_length)
            self.nodes.append(max(shape.num_nodes for shape in batch.different))
            rows = [self._row(*each) for each in zip(batch.sequences, batch.shapes, strict=True)]
            if self._host_cost:
                self.clock.work(self._host_cost.of(len(rows)))
            return self._launched(rows, took)

        def prompts(chunks: list[Chunk]) -> PromptResults:
            runner._admit([chunk.sequence for chunk in chunks if chunk.first])
            took = self.times.prompts_s(sum(chunk.size for chunk in chunks))
            self.prefill_s += took
            known = self._launched([self._first_row(chunk.sequence) for chunk in chunks], took)
            return PromptResults(known, [chunk.draws for chunk in chunks], self.info.lookup > 0)

        runner.replay = replayed  # type: ignore[method-assign]
        runner.targets_accept_compact = results  # type: ignore[method-assign]
        runner.launches = lambda _: True  # type: ignore[method-assign]
        runner.launch = prompts  # type: ignore[method-assign]
        runner.together = lambda chunks: [chunks] if chunks else []  # type: ignore[method-assign]

    def _first_row(self, sequence: Running) -> StepRow:
        """What a pass over its prompt gives a sequence."""
        found = self.records[sequence.request.prompt_token_ids]
        self._at[sequence.slot] = 0
        return StepRow(True, 0, 0, 1, found.answer[:1], *(found.chains[0] if self.info.lookup else ([], 0)))

    def _row(self, sequence: Running, shape: TreeShape) -> StepRow:
        """What the step gives a sequence. The device knows where it stands; the host is a step behind."""
        found = self.records.get(sequence.request.prompt_token_ids)
        if found is None:  # made up, to be measured
            return StepRow(True, 0, 0, 1, [0], [], 0)
        at, heads = self._at[sequence.slot], 1 + shape.head_nodes
        mask, length, last = found.masks[at] & (1 << heads) - 1, 0, 0
        for node in range(1, heads):
            if mask >> node & 1 and self._depths[node] > length:
                length, last = self._depths[node], node
        matched, chain = 0, found.chains[at][0][: shape.lookup_nodes]
        while matched < len(chain) and chain[matched] == found.answer[at + 1 + matched]:
            mask |= 1 << heads + matched
            matched += 1
        if matched > length:
            length, last = matched, heads + matched - 1
        self._at[sequence.slot] = end = at + 1 + length
        proposed = found.chains[end] if self.info.lookup else ([], 0)
        return StepRow(True, length, last, mask, found.answer[at + 1 : end + 1], *proposed)


# -- loads -----------------------------------------------------------------------------------------


def _sound(deltas: list[TokenDelta]) -> Iterator[TokenDelta]:
    for delta in deltas:
        if delta.error is not None:
            raise RuntimeError(f"a request failed: {delta.error}")
        yield delta


def run_empty(engine: VirtualEngine, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[float]:
    """Seconds until each of these answers ends, all asked for at once."""
    sampling, start, ended = (
        SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        engine.clock_s,
        [],
    )
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, sampling))
    while engine.has_work:
        for delta in _sound(engine.step()):
            if delta.finish_reason is not None:
                ended.append(engine.clock_s - start)
    return ended


def streams(engine: VirtualEngine, prompts: Sequence[tuple[int, ...]], count: int, tokens: int) -> float:
    """Tokens per second of decoding, so many streams at a time, until one is left without a prompt."""
    sampling, asked, live, decoded = SamplingParams(temperature=0.0, max_tokens=tokens), 0, 0, 0
    start = engine.clock_s - engine.prefill_s
    while live == count or asked < len(prompts):
        while live < count and asked < len(prompts):
            engine.add(Request(str(asked), prompts[asked], sampling))
            asked, live = asked + 1, live + 1
        for delta in _sound(engine.step()):
            decoded += len(delta.token_ids) if delta.num_steps else 0
            live -= delta.finish_reason is not None
    took = engine.clock_s - engine.prefill_s - start
    for number in range(asked):
        engine.abort(str(number))
    return decoded / took


def compare(
    engines: dict[str, VirtualEngine], prompts: Sequence[tuple[int, ...]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each load, of "auto" to "off"."""
    rows: list[dict[str, Any]] = []
    for load_, batch in [(name, batch) for name in ("runs empty", "streams") for batch in args.batches]:
        rng, rates, means = random.Random(args.seed), {n: [] for n in engines}, {n: [] for n in engines}  # type: ignore[var-annotated]
        for number in range(-1, args.rounds):
            chosen = [rng.choice(prompts) for _ in range(batch * (1 if load_ == "runs empty" else 3))]
            for name, engine in engines.items():
                if number == 0:
                    engine.nodes.clear()
                if load_ == "streams":
                    found = streams(engine, chosen, batch, args.new_tokens), 1.0
                else:
                    ended = run_empty(engine, chosen, args.new_tokens)
                    found = 1.0 / max(ended), 1.0 / statistics.fmean(ended)
                if number >= 0:
                    rates[name].append(found[0])
                    means[name].append(found[1])
        row = {"load": load_, "batch": batch, **ratio_interval(rates["auto"], rates["off"])}
        if load_ == "runs empty":
            row["until_each_ends"] = ratio_interval(means["auto"], means["off"])
        shares = Counter(engines["auto"].nodes)
        row["tree_sizes"] = {str(n): round(c / shares.total(), 3) for n, c in shares.most_common(5)}
        rows.append(row)
        print(row, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--prompts", type=Path, nargs="+", default=_PROMPTS, help="MT-bench-shaped JSONL")
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=positive, default=12)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts of each round")
    parser.add_argument(
        "--host", type=Path, metavar="FILE", help="count what the host takes: of benchmarks.host_cost"
    )
    parser.add_argument("--slower", type=float, default=1.0, metavar="F", help="so many times")
    parser.add_argument("--output", type=Path, help="where the result goes, too")
    args = parser.parse_args(argv)
    if args.host is None and args.slower != 1.0:
        parser.error("--slower says by how much the host of --host FILE is slower")
    most = max(args.batches)
    settings = {"max_num_seqs": most, "max_model_len": 1024, "kv_cache_tokens": 1024 * most}
    settings |= {"prefix_caching": False, "max_prefill_tokens": 2048, "dtype": "float32", "device": "cpu"}

    def loaded(tree: str) -> Loaded:
        return load(engine_config([], model=args.model, tree=tree, **settings), progress=False)

    model = loaded("auto")
    texts = [item.prompt for path in args.prompts for item in read_items(path)]
    prompts = [tuple(model.text.encode_chat([{"role": "user", "content": text}])) for text in texts]
    records, times = (
        record(model, prompts, args.new_tokens + _BEYOND),
        Times(_H100_MS),
    )
    del model
    engines = {
        tree: VirtualEngine(
            loaded(tree),
            records,
            times,
            host=HostCost.read(args.host, tree, args.slower) if args.host is not None else None,
        )
        for tree in ("auto", "off")
    }
    result = {
        "benchmark": "virtual_clock",
        "simulated": "step times are a table, much as an H100's; what the host takes is "
        + ("what benchmarks.host_cost measured, so many times" if args.host else "not counted"),
        "host": args.slower if args.host is not None else 0.0,
        "model": args.model,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "seed": args.seed,
        "rows": compare(engines, prompts, args),
        "hardware": hardware(),
    }
    print_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
