"""How many tokens a step brings, and what that is worth: the tree on against the tree off, per category.

    python -m benchmarks.acceptance --prompts mt_bench.jsonl -- --tree 9 --lookup 8
    python -m benchmarks.acceptance --prompts benchmarks/data/code_editing.jsonl --prediction
    python -m benchmarks.acceptance --prompts mt_bench.jsonl --typical --temperature 0.7 -- --tree 64
    python -m benchmarks.acceptance --prompts mt_bench.jsonl --against OLD -- --heads NEW --tree 64

The first line of use is lookup alone, a chain of 8; any option of `serve` may follow. Two engines in this
process, one with these options and one with the tree off, answer every prompt in turn, A B B A, at
temperature 0. The acceptance length is tokens emitted per sequence and decode step, the root counted, so
that plain decoding is 1.0. Both answers must be the same text (float32); a difference is reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    Item,
    add_model,
    add_prompts,
    bootstrap_interval,
    engine_config,
    hardware,
    new_parser,
    parse_with_engine_options,
    positive,
    print_result,
    ratio_interval,
    read_items,
)
from engine.types import Acceptance, FinishReason, MedusaParams, Request, SamplingParams
from server.bench import settings_given

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.llm import LLM


@dataclass(frozen=True, slots=True)
class Turn:
    """One batch of items on one side: what came, how long it took, and through how many steps."""

    answers: list[list[int]]
    seconds: float
    decoded: int
    sequence_steps: int
    predicted: int

    @property
    def tokens(self) -> int:
        return sum(len(answer) for answer in self.answers)


def run_turn(
    llm: LLM,
    items: Sequence[Item],
    max_tokens: int,
    *,
    prediction: bool,
    salt: str,
    temperature: float = 0.0,
    rule: Acceptance = Acceptance.EXACT,
) -> Turn:
    """Answer these items together; the seed of an item is its number.

    Raises:
        RuntimeError: one of them failed.
    """
    requests = [
        Request(
            f"{salt}-{number}",
            tuple(llm.text.encode_chat([{"role": "user", "content": item.prompt}])),
            SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=number),
            prediction_token_ids=tuple(
                llm.text.encode(item.prediction, add_special_tokens=False)
                if prediction and item.prediction
                else ()
            ),
            medusa=MedusaParams(acceptance=rule),
            cache_salt=salt,  # no round finds its prompts in the prefix cache
        )
        for number, item in enumerate(items)
    ]
    outputs = llm.generate(requests)
    if failed := [output.error for output in outputs if output.finish_reason is FinishReason.ERROR]:
        raise RuntimeError(f"a request failed: {failed[0]}")
    return Turn(
        answers=[output.token_ids for output in outputs],
        seconds=max(output.seconds for output in outputs),
        decoded=sum(output.num_decoded for output in outputs),
        sequence_steps=sum(output.num_steps for output in outputs),
        predicted=sum(delta.accepted_prediction_tokens for output in outputs for delta in output.deltas),
    )


def summary(name: str, on: Sequence[Turn], off: Sequence[Turn]) -> dict[str, Any]:
    """One row: tokens per sequence and step with its interval over turns, and the rates of both sides."""
    lengths = [turn.decoded / turn.sequence_steps for turn in on if turn.sequence_steps]
    steps = sum(turn.sequence_steps for turn in on)
    row: dict[str, Any] = {
        "category": name,
        "turns": len(on),
        "tokens": sum(turn.tokens for turn in on),
        "acceptance_length": round(sum(turn.decoded for turn in on) / steps, 3) if steps else None,
        # Over turns, where each counts the same, whatever its length.
        "acceptance_length_mean": round(statistics.fmean(lengths), 3) if lengths else None,
        "acceptance_length_interval_95": [round(x, 3) for x in bootstrap_interval(lengths, statistics.fmean)]
        if lengths
        else None,
        "predicted_tokens": sum(turn.predicted for turn in on),
        "tokens_per_s": _rate(on),
    }
    if off:
        rates = [[turn.tokens / turn.seconds for turn in side] for side in (on, off)]
        row |= {
            "tokens_per_s_off": round(
                sum(turn.tokens for turn in off) / sum(turn.seconds for turn in off), 2
            ),
            **ratio_interval(*rates),
            "answers_differ": sum(
                a != b
                for x, y in zip(on, off, strict=True)
                for a, b in zip(x.answers, y.answers, strict=True)
            ),
        }
    return row


def _rate(turns: Sequence[Turn]) -> float:
    return round(sum(turn.tokens for turn in turns) / sum(turn.seconds for turn in turns), 2)


def batches(items: Sequence[Item], streams: int) -> list[list[Item]]:
    """Items of one category at a time, so many together; the last of a category may be fewer."""
    found: list[list[Item]] = []
    for category in dict.fromkeys(item.category for item in items):
        same = [item for item in items if item.category == category]
        found += [same[start : start + streams] for start in range(0, len(same), streams)]
    return found


def measure(args: argparse.Namespace, on: LLM, off: LLM | None) -> list[dict[str, Any]]:
    """A row per category and one for all."""
    items = read_items(args.prompts, args.limit)
    work = batches(items, args.streams) * args.rounds
    options: dict[str, Any] = {"prediction": args.prediction}
    for llm in filter(None, (on, off)):
        run_turn(llm, work[0], 8, **options, salt="warm")
    turns: dict[str, list[tuple[Turn, Turn | None]]] = {}
    for number, batch in enumerate(work):
        done: dict[bool, Turn] = {}
        for tree in (True, False) if number % 2 == 0 else (False, True):
            if llm := (on if tree else off):
                done[tree] = run_turn(llm, batch, args.max_tokens, **options, salt=str(number))
        turns.setdefault(batch[0].category, []).append((done[True], done.get(False)))

    groups = {**turns, "all": [pair for pairs in turns.values() for pair in pairs]}
    rows: list[dict[str, Any]] = []
    for name, pairs in groups.items():
        rows.append(row := summary(name, [x for x, _ in pairs], [y for _, y in pairs if y is not None]))
        text = f"{name:16} {row['acceptance_length'] or 1:5.2f} tokens/step  {row['tokens_per_s']:7.1f} tok/s"
        if off is not None:
            text += f"  off {row['tokens_per_s_off']:7.1f}  ratio {row['ratio_median']:.2f}"
            text += f" {row['ratio_interval_95']}  answers that differ {row['answers_differ']}"
        print(text, flush=True)
    return rows


def measure_typical(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    """Tokens a step under both rules of acceptance, the same trees, prompts, seeds and temperature."""
    work = batches(read_items(args.prompts, args.limit), args.streams) * args.rounds
    turns: dict[Acceptance, list[Turn]] = {Acceptance.TYPICAL: [], Acceptance.EXACT: []}
    for number, batch in enumerate(work):
        for rule, done in turns.items():
            salt = f"{number}-{rule.value}"
            done.append(
                run_turn(
                    llm,
                    batch,
                    args.max_tokens,
                    prediction=args.prediction,
                    salt=salt,
                    temperature=args.temperature,
                    rule=rule,
                )
            )
    row: dict[str, Any] = {}
    lengths = {}
    for rule, done in turns.items():
        found = summary(rule.value, done, [])
        lengths[rule] = [turn.decoded / turn.sequence_steps for turn in done]
        row[rule.value] = {name: found[name] for name in ("tokens", "acceptance_length", "tokens_per_s")}
        print(f"{rule.value:8} {found['acceptance_length']:5.2f} tokens/step", flush=True)
    return row | {"typical_to_exact": ratio_interval(lengths[Acceptance.TYPICAL], lengths[Acceptance.EXACT])}


def measure_against(args: argparse.Namespace, new: LLM, old: LLM) -> dict[str, Any]:
    """Tokens a step with two sets of heads, prompt by prompt; how many answers differ, which none should.

    Steps are counted, not timed: greedy answers take as many whenever they are asked for.
    """
    work = batches(read_items(args.prompts, args.limit), args.streams)
    sides = {"new": new, "old": old}
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for number, batch in enumerate(work):
        for name, llm in sides.items():
            found = run_turn(llm, batch, args.max_tokens, prediction=args.prediction, salt=str(number))
            turns[name].append(found)
    rows: dict[str, Any] = {}
    for category in [*dict.fromkeys(batch[0].category for batch in work), "all"]:
        chosen = [i for i, batch in enumerate(work) if category in ("all", batch[0].category)]
        row: dict[str, Any] = {}
        lengths = {}
        for name, done in turns.items():
            some = [done[i] for i in chosen]
            row[name] = summary(category, some, [])["acceptance_length"]
            lengths[name] = [turn.decoded / max(1, turn.sequence_steps) for turn in some]
        row |= ratio_interval(lengths["new"], lengths["old"])
        row["answers_differ"] = sum(
            a != b
            for i in chosen
            for a, b in zip(turns["new"][i].answers, turns["old"][i].answers, strict=True)
        )
        rows[category] = row
        print(f"{category:16} {row}", flush=True)
    return {"rows": rows}


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--streams", type=positive, default=1, help="prompts answered together")
    parser.add_argument("--rounds", type=positive, default=1, help="how often every prompt is asked")
    parser.add_argument("--prediction", action="store_true", help="send each item's `prediction`")
    parser.add_argument("--no-off", action="store_true", help="acceptance only: leave the tree-off side out")
    parser.add_argument(
        "--typical", action="store_true", help="the rule `typical` against `exact` instead of the tree off"
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="of --typical")
    parser.add_argument(
        "--against", help="other heads to compare with, with the tree beside them, instead of the tree off"
    )
    args, options = parse_with_engine_options(parser, argv)
    if args.typical and args.against:
        parser.error("--typical compares rules and --against heads: one of them")
    if args.typical and args.temperature <= 0.0:
        parser.error("--typical: at temperature 0 both rules are the same; give --temperature")
    if args.prediction and not any(item.prediction for item in read_items(args.prompts)):
        parser.error(f"--prediction: no item of {args.prompts} has one")
    return args, options


def main() -> int:
    args, options = parse()
    from engine.llm import LLM

    values: dict[str, Any] = {"model": args.model}
    config = engine_config(options, **values)
    on = LLM(config)
    if args.typical:
        return _report(args, on, config, {"temperature": args.temperature, **measure_typical(args, on)})
    if args.against:
        old = LLM(engine_config([*options, "--heads", args.against], **values))
        found = measure_against(args, on, old)
        return _report(args, on, config, {"temperature": 0, "against": Path(args.against).name, **found})
    off = None if args.no_off else LLM(engine_config(options, **values, **TREE_OFF))
    rows = measure(args, on, off)
    _report(args, on, config, {"temperature": 0, "order": "ABBA", "rows": rows})
    return 1 if on.info.dtype == "float32" and rows[-1].get("answers_differ") else 0


def _report(args: argparse.Namespace, llm: LLM, config: EngineConfig, found: dict[str, Any]) -> int:
    print_result(
        {
            "benchmark": "acceptance",
            "prompts": args.prompts.name,
            "prediction": args.prediction,
            "max_tokens": args.max_tokens,
            "streams": args.streams,
            **found,
            "settings": settings_given(config),
            "dtype": llm.info.dtype,
            "device": llm.info.device,
            "hardware": hardware(),
        }
    )
    return 0


TREE_OFF = {"tree": "off", "lookup": "off", "heads": "none", "tree_file": None}
"""Plain decoding, whatever tree the other options ask for."""


if __name__ == "__main__":
    sys.exit(main())
