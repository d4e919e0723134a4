"""`tree: auto` against `tree: off`, and against every fixed size: does it find the best, and never cost much?

    python -m benchmarks.adaptive --prompts mt_bench.jsonl --heads none,random,handmade --rounds 10
    python -m benchmarks.adaptive --prompts mt_bench.jsonl --heads handmade --sweep
    python -m benchmarks.adaptive --prompts mt_bench.jsonl --heads NEW --against OLD -- --quantization int8

All engines live in this process and take turns, so that none runs while another is measured. A load of S
streams is S clients that ask again as soon as they are answered, until one of them has nothing more to ask:
there the clock stops, since a batch that runs empty says nothing about S streams. Prefill is not counted:
both have the same, but at that moment streams that are out of step have more of theirs unanswered. The first
form gives, per kind of heads and number of streams, the ratio of decoded tokens/s of each A B B A pair of
rounds with its interval: passed where no interval lies wholly below --least. The second runs a load of 1, 16
and 1 streams on `auto` and on each fixed number of nodes and asks whether the size that `auto` settled on in
each phase is the sweep's best, or cannot be told from it: the interval of its ratio to the best reaches 1.
Where drafts come from lookup, trees are ragged and change with every step, so `auto` passes as well by its
own tokens/s. The third is the first with other heads, also on `auto`, in the place of `off`.

Heads: `none`, `random` (nearly always wrong: the worst case), `handmade` (fitted to transformers' answers to
these very prompts, often right), or a file. Options of `serve` may follow (`-- --lookup off`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.acceptance import TREE_OFF
from benchmarks.common import (
    add_model,
    engine_config,
    first_turns,
    hardware,
    model_folder,
    new_parser,
    numbers,
    parse_with_engine_options,
    positive,
    print_result,
    ratio_interval,
)
from benchmarks.reference import DEFAULT_CACHE
from engine.errors import ConfigError, ModelError
from engine.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM

SIZES = (1, 2, 4, 8, 16, 32, 64)
PHASES = (1, 16, 1)


@dataclass(frozen=True, slots=True)
class Phase:
    """What one engine did under one load: its rate of decoding, and the nodes of each step's largest tree."""

    tokens_per_s: float
    sizes: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    acceptance_length: float

    @property
    def settled(self) -> list[int]:
        """Sizes of the second half: by then a choice has had time to follow the load."""
        return list(self.sizes[len(self.sizes) // 2 :])


def run_phase(
    llm: LLM, prompts: Sequence[tuple[int, ...]], streams: int, new_tokens: int, salt: str
) -> Phase:
    """So many streams at a time at temperature 0, until one of them is left without a prompt.

    Raises:
        RuntimeError: a request failed.
    """
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    requests = iter([Request(f"{salt}-{i}", ids, sampling, cache_salt=salt) for i, ids in enumerate(prompts)])
    tokens: dict[str, list[int]] = {}
    live: set[str] = set()

    def take() -> Request | None:
        request = next(requests, None) if len(live) < streams else None
        if request is not None:
            live.add(request.request_id)
            tokens[request.request_id] = []
        return request

    sizes: list[int] = []
    decoded = sequence_steps = 0
    prefill = llm.stats.step_seconds["prefill"]
    start, prefilled_s = time.perf_counter(), prefill.total
    for deltas in llm.stream(take):
        steps = 0
        for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                raise RuntimeError(f"a request failed: {delta.error}")
            if delta.finish_reason is not None:
                live.discard(delta.request_id)
            tokens[delta.request_id] += delta.token_ids
            steps += delta.num_steps
            decoded += len(delta.token_ids) if delta.num_steps else 0
        if steps:
            sizes.append(llm.stats.tree_size)
            sequence_steps += steps
        if len(live) < streams and len(tokens) == len(prompts):
            break
    seconds = time.perf_counter() - start - (prefill.total - prefilled_s)
    return Phase(
        tokens_per_s=decoded / seconds,
        sizes=tuple(sizes),
        tokens=tuple(tuple(found) for found in tokens.values()),
        acceptance_length=decoded / sequence_steps if sequence_steps else 1.0,
    )


class Prompts:
    """Token ids of the file's prompts, around and around, so that every round has others."""

    def __init__(self, texts: Sequence[str], llm: LLM, max_tokens: int) -> None:
        encoded = [tuple(llm.text.encode_chat([{"role": "user", "content": text}])) for text in texts]
        self._next: Iterator[tuple[int, ...]] = cycle([ids for ids in encoded if len(ids) <= max_tokens])

    def take(self, count: int) -> list[tuple[int, ...]]:
        return [next(self._next) for _ in range(count)]


# -- auto against off ------------------------------------------------------------------------------


def against_off(
    args: argparse.Namespace, heads: str, auto: LLM, off: LLM, other: str = "off"
) -> list[dict[str, Any]]:
    """One row per number of streams. `other` is what the rows call the side that is compared with."""
    prompts = Prompts(args.texts, auto, args.max_prompt)
    rows: list[dict[str, Any]] = []
    for streams in args.streams:
        done: dict[str, list[Phase]] = {"auto": [], other: []}
        for number in range(-args.warm_rounds, args.rounds):
            chosen = prompts.take(streams * args.turns)
            for side in ("auto", other) if number % 2 == 0 else (other, "auto"):
                # The rounds before 0 warm both up, and let the choice follow the load.
                found = run_phase(
                    auto if side == "auto" else off, chosen, streams, args.new_tokens, f"{number}"
                )
                if number >= 0:
                    done[side].append(found)
        rates = {side: [phase.tokens_per_s for phase in phases] for side, phases in done.items()}
        row: dict[str, Any] = {
            "heads": heads,
            "streams": streams,
            "auto_tokens_per_s": round(statistics.median(rates["auto"]), 2),
            f"{other}_tokens_per_s": round(statistics.median(rates[other]), 2),
            **ratio_interval(rates["auto"], rates[other]),
            "acceptance_length": round(statistics.fmean(p.acceptance_length for p in done["auto"]), 3),
            "tree_sizes": shares([size for phase in done["auto"] for size in phase.sizes]),
            "answers_differ": sum(
                parted(x, y)
                for a, b in zip(done["auto"], done[other], strict=True)
                for x, y in zip(a.tokens, b.tokens, strict=True)
            ),
        }
        if other != "off":
            lengths = [phase.acceptance_length for phase in done[other]]
            row[f"{other}_acceptance_length"] = round(statistics.fmean(lengths), 3)
            row[f"{other}_tree_sizes"] = shares([size for phase in done[other] for size in phase.sizes])
        rows.append(row)
        print(
            f"{heads:9} {streams:3} streams: auto {row['auto_tokens_per_s']:8.1f} tok/s  "
            f"{other} {row[f'{other}_tokens_per_s']:8.1f}  "
            f"ratio {row['ratio_median']:.3f} {row['ratio_interval_95']}  "
            f"length {row['acceptance_length']:.2f}  nodes {row['tree_sizes']}",
            flush=True,
        )
    return rows


def parted(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two answers differ as far as both go: the clock may have stopped within either."""
    both = min(len(a), len(b))
    return a[:both] != b[:both]


def shares(sizes: Sequence[int]) -> dict[str, float]:
    """Share of the steps at each size, the five most common ones."""
    return {str(size): round(count / len(sizes), 3) for size, count in Counter(sizes).most_common(5)}


# -- the sweep -------------------------------------------------------------------------------------


def sweep(args: argparse.Namespace, heads: str, engines: dict[str, LLM]) -> list[dict[str, Any]]:
    """One row per phase. `engines` are named by their nodes, and one "auto"."""
    prompts = Prompts(args.texts, engines["auto"], args.max_prompt)
    done: dict[str, list[list[Phase]]] = {name: [] for name in engines}
    for number in range(-args.warm_rounds, args.rounds):
        chosen = [prompts.take(streams * args.turns) for streams in args.phases]
        names = list(engines) if number % 2 == 0 else list(reversed(engines))
        for name in names:
            found = [
                run_phase(engines[name], batch, streams, args.new_tokens, f"{number}-{i}")
                for i, (batch, streams) in enumerate(zip(chosen, args.phases, strict=True))
            ]
            if number >= 0:
                done[name].append(found)
    rows: list[dict[str, Any]] = []
    for phase, streams in enumerate(args.phases):
        rates = {name: [found[phase].tokens_per_s for found in rounds] for name, rounds in done.items()}
        settled = [size for found in done["auto"] for size in found[phase].settled]
        row = {"heads": heads, "phase": phase, "streams": streams, **verdict(rates, settled)}
        row["mean_nodes"] = {
            name: round(statistics.fmean(size for found in rounds for size in found[phase].sizes), 2)
            for name, rounds in done.items()
        }
        rows.append(row)
        shown = "  ".join(f"{name}: {rate:.1f}" for name, rate in row["tokens_per_s"].items())
        print(
            f"{heads:9} phase {phase}, {streams:2} streams: {shown}\n  best {row['best']}, auto settled on "
            f"{row['settled']} (its ratio to the best {row['settled_to_best']}); auto's rate to the best's "
            f"{row['auto_to_best']}: {'ok' if row['passed'] else 'NOT the best'}",
            flush=True,
        )
    return rows


def verdict(rates: dict[str, list[float]], settled: Sequence[int]) -> dict[str, Any]:
    """Is the size that `auto` settled on the best of the fixed ones, or not to be told from it?

    Args:
        rates: tokens/s per round of each fixed size (by its nodes) and of "auto".
        settled: nodes of auto's trees in the second half of the phase, one per step.

    Returns:
        The row's part: `settled` is their median. Where it lies between two fixed sizes, the better of
        them stands for it. `passed_by` says whether that size cannot be told from the best, or else
        auto's own rate.
    """
    fixed = {int(name): values for name, values in rates.items() if name != "auto"}
    best = max(fixed, key=lambda size: statistics.median(fixed[size]))
    size = round(statistics.median(settled))
    below = max((n for n in fixed if n <= size), default=min(fixed))
    above = min((n for n in fixed if n >= size), default=max(fixed))
    near = max((below, above), key=lambda n: statistics.median(fixed[n]))
    compared, own = ratio_interval(fixed[near], fixed[best]), ratio_interval(rates["auto"], fixed[best])
    passed_by = [
        name
        for name, found in (("size", compared), ("rate", own))
        if found["ratio_interval_95"][1] >= 1.0  # the best itself has 1 on both ends
    ]
    return {
        "passed": bool(passed_by),
        "passed_by": passed_by,
        "best": best,
        "settled": size,
        "settled_sizes": shares(settled),
        "stands_for_settled": near,
        "settled_to_best": compared,
        "auto_to_best": own,
        "tokens_per_s": {name: round(statistics.median(values), 2) for name, values in rates.items()},
    }


# -- engines ---------------------------------------------------------------------------------------


def head_files(args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """What `--heads` gets for each kind asked for; random and hand-made ones are made where missing."""
    from benchmarks.equality import make_head_files
    from benchmarks.reference import Reference, load_reference

    made = {kind for kind in args.heads if kind in ("random", "handmade")}
    files = {kind: kind for kind in args.heads if kind not in made}
    if made:
        folder = model_folder(args.model)
        if "handmade" in made:
            cache: Path = args.reference_cache
            reference = load_reference(folder, args.texts, args.reference_tokens, cache)
        else:
            reference = Reference([], [])
        options = argparse.Namespace(heads_folder=args.heads_folder or scratch, heads=args.num_heads)
        files |= {kind: str(path) for kind, path in make_head_files(options, folder, made, reference).items()}
    return files


def make_engines(
    args: argparse.Namespace, options: Sequence[str], names: Sequence[str], heads: str
) -> dict[str, LLM]:
    """An engine per name: "auto", "off" or a number of nodes. Sizes the drafts cannot fill are left out."""
    from engine.llm import LLM

    common = {"model": args.model, "max_num_seqs": max(*args.streams, *args.phases)}
    found: dict[str, LLM] = {}
    for name in names:
        values = TREE_OFF if name in ("off", "1") else {"tree": name, "heads": heads}
        config = engine_config([*_options(common), *options], **values)
        try:
            llm = LLM(config)
        except (ConfigError, ModelError) as error:
            if not name.isdigit():
                raise
            print(f"{name} nodes left out: {error}", flush=True)
            continue
        if name.isdigit() and llm.info.tree_size != int(name):
            print(f"{name} nodes left out: the drafts fill {llm.info.tree_size}", flush=True)
            continue
        found[name] = llm
    share_weights(list(found.values()))
    return found


def share_weights(engines: Sequence[LLM]) -> None:
    """Let all of them read the first one's weights.

    On a CPU a step is as fast as memory gives the weights, and where they happen to lie makes a difference of
    up to 10 % from one copy to the next: more than what is looked for here.
    """
    first = engines[0]._engine._runner._decoder
    for llm in engines[1:]:
        if llm.info.device == "cpu":
            llm._engine._runner._decoder = first


def _options(values: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--prompts", type=Path, required=True, help="MT-bench-shaped JSONL")
    parser.add_argument("--max-prompt", type=int, default=256, help="longer prompts, in tokens, are left out")
    parser.add_argument("--heads", default="none", help="kinds, by comma: none, random, handmade or a file")
    parser.add_argument("--num-heads", type=int, default=4, help="heads in the files it makes")
    parser.add_argument("--heads-folder", type=Path, help="kept head files; a temporary folder if not given")
    parser.add_argument("--reference-cache", type=Path, default=DEFAULT_CACHE, help="for hand-made heads")
    parser.add_argument("--reference-tokens", type=int, default=64, help="of each answer in the cache")
    parser.add_argument("--against", metavar="FILE", help="these heads on `auto` in the place of `off`")
    parser.add_argument("--streams", type=numbers, default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--warm-rounds", type=int, default=2, help="before them, not counted")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=positive, default=3, help="prompts for each stream in a round")
    parser.add_argument("--least", type=float, default=0.98, help="no interval may lie wholly below this")
    parser.add_argument("--sweep", action="store_true", help="auto against fixed sizes under a shifting load")
    parser.add_argument("--sizes", type=numbers, default=list(SIZES), help="fixed sizes of the sweep")
    parser.add_argument("--phases", type=numbers, default=list(PHASES), help="streams of the sweep's phases")
    args, options = parse_with_engine_options(parser, argv)
    args.heads = args.heads.split(",")
    args.texts = first_turns(args.prompts)
    if args.sweep and args.against:
        parser.error("--sweep compares sizes and --against heads: one of them")
    if taken := {"--tree", "--heads"} & {option.partition("=")[0] for option in options}:
        parser.error(f"{', '.join(sorted(taken))} is what this command varies")
    return args, options


def main() -> int:
    args, options = parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="medusa-heads-") as scratch:
        for kind, file in head_files(args, Path(scratch)).items():
            names = ["auto", *map(str, args.sizes)] if args.sweep else ["auto", "off"]
            engines = make_engines(args, options, ["auto"] if args.against else names, file)
            if args.sweep:
                rows += sweep(args, kind, engines)
            elif args.against:
                engines |= {"against": make_engines(args, options, ["auto"], args.against)["auto"]}
                share_weights(list(engines.values()))
                rows += against_off(args, kind, engines["auto"], engines["against"], "against")
            else:
                rows += against_off(args, kind, engines["auto"], engines["off"])
            for row in rows:
                row.setdefault("passed", row.get("ratio_interval_95", [0, 0])[1] >= args.least)
            del engines
    ok = all(row["passed"] for row in rows)
    print_result(
        {
            "benchmark": "adaptive_sweep" if args.sweep else "adaptive",
            "passed": ok,
            "model": args.model,
            "prompts": args.prompts.name,
            "new_tokens": args.new_tokens,
            "turns": args.turns,
            "warm_rounds": args.warm_rounds,
            "temperature": 0,
            "least": None if args.sweep else args.least,
            **({"against": Path(args.against).name} if args.against else {}),
            "serve": options,
            "order": "ABBA",
            "rows": rows,
            "hardware": hardware(),
        }
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
