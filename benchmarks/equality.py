"""Is greedy decoding through the server, tree or no tree, transformers' greedy decoding? The long form.

    python -m benchmarks.equality --prompts mt_bench.jsonl --reference-cache reference.json

For every variant (tree off; trees of several sizes with random heads, and with hand-made heads that
are often right) it starts the real server in float32 and asks it for every prompt at temperature 0:
`alone` (one at a time) and `together` (8 at once, arriving at random), every other request streamed.
An answer is exact, or a tie (it parts from the reference where the reference's best two logits are
closer than 1e-4), or a failure. Exit code 1 on any failure, or on more than one tie in 80 answers.

Options of `serve` may follow, and win: the same table with preemption, with small chunks, without reuse:
    … -- --max-model-len 1024 --kv-cache-tokens 1152
    … -- --max-step-tokens 64
    … -- --prefix-caching false
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from benchmarks.common import (
    Completion,
    Server,
    add_model,
    add_prompts,
    chat,
    first_model,
    first_turns,
    hardware,
    metrics,
    model_folder,
    new_client,
    new_parser,
    parse_with_engine_options,
    print_result,
)
from benchmarks.reference import DEFAULT_CACHE, Answer, Reference, first_difference, load_reference

TIE_GAP = 1e-4
"""Best two logits closer than this may change places by the order of a sum, in float32."""

ANSWERS_PER_TIE = 80
"""At most one answer in this many may be a tie."""

TREES = (2, 8, 33, 64)
CONCURRENCY = {"alone": 1, "together": 8}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the server: heads "none", "random" or "handmade", and the tree's nodes."""

    heads: str
    tree: str

    @property
    def name(self) -> str:
        return "off" if self.heads == "none" else f"{self.heads}-{self.tree}"

    def args(self, model: str, device: str, heads: dict[str, Path], options: Sequence[str] = ()) -> list[str]:
        """What follows `serve`; of an option given twice the last one counts."""
        file = str(heads[self.heads]) if self.heads != "none" else "none"
        common = [model, "--dtype", "float32", "--device", device, "--max-num-seqs", "8"]
        common += ["--reasoning-parser", "none"]  # the whole text is compared
        return [*common, "--heads", file, "--tree", self.tree, *options]


VARIANTS = [
    Variant("none", "off"),
    *(Variant(kind, str(n)) for kind in ("random", "handmade") for n in TREES),
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one answer: "exact", "tie" or "failure", and a line about it unless exact."""

    kind: str
    detail: str = ""


def judge(answer: Answer, got: Completion) -> Verdict:
    """Compare one answer with the reference: text, token counts, and why it ended."""
    if got.prompt_tokens != len(answer.prompt_ids):
        return Verdict("failure", f"prompt is {got.prompt_tokens} tokens, not {len(answer.prompt_ids)}")
    where = first_difference(answer, got.text)
    if where is not None:
        gap = answer.gaps[where]
        near = answer.prefixes[where][-40:]
        detail = f"token {where}, top-2 gap {gap:.2e}: reference …{near!r}, got …{got.text[-60:]!r}"
        return Verdict("tie" if gap < TIE_GAP else "failure", detail)
    expected = (len(answer.token_ids), answer.finish_reason)
    if (got.completion_tokens, got.finish_reason) != expected:
        found = (got.completion_tokens, got.finish_reason)
        return Verdict("failure", f"same text, but (tokens, finish_reason) is {found}, not {expected}")
    return Verdict("exact")


async def ask_all(
    url: str, reference: Reference, max_tokens: int, concurrency: int, seed: int
) -> list[Verdict]:
    """Every prompt once, in random order, from `concurrency` clients that pause at random in between."""
    rng = random.Random(seed)
    order = list(range(len(reference.answers)))
    rng.shuffle(order)
    pauses = [rng.uniform(0.0, 0.5) if concurrency > 1 else 0.0 for _ in order]
    verdicts: dict[int, Verdict] = {}
    waiting = list(zip(order, pauses, strict=True))

    model = await first_model(url)
    async with new_client(url) as client:

        async def worker() -> None:
            while waiting:
                index, pause = waiting.pop()
                await asyncio.sleep(pause)
                answer = reference.answers[index]
                try:
                    got = await chat(
                        client,
                        model,
                        answer.prompt,
                        stream=index % 2 == 1,
                        temperature=0,
                        max_tokens=max_tokens,
                    )
                except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:
                    verdicts[index] = Verdict("failure", f"{type(error).__name__}: {error}")
                    continue
                verdicts[index] = judge(answer, got)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return [verdicts[index] for index in range(len(reference.answers))]


async def tokenised_otherwise(url: str, reference: Reference) -> list[int]:
    """Numbers of the prompts that the server splits into other tokens than the reference did."""
    wrong: list[int] = []
    async with new_client(url) as client:
        for number, answer in enumerate(reference.answers):
            body = {"messages": [{"role": "user", "content": answer.prompt}]}
            async with client.post("tokenize", json=body) as reply:
                reply.raise_for_status()
                if (await reply.json())["tokens"] != answer.prompt_ids:
                    wrong.append(number)
    return wrong


def run_variant(
    variant: Variant, args: argparse.Namespace, reference: Reference, heads: dict[str, Path]
) -> list[dict[str, Any]]:
    """Start the server this way, ask everything in each mode; a list of result rows."""
    rows: list[dict[str, Any]] = []
    with Server(variant.args(args.model, args.device, heads, args.serve), threads=args.threads) as server:
        otherwise = asyncio.run(tokenised_otherwise(server.url, reference))
        if otherwise:
            print(f"{variant.name:12} tokenises prompts {otherwise} otherwise than the reference", flush=True)
        for mode in args.modes:
            before = _counters(server.url)
            start = time.monotonic()
            verdicts = asyncio.run(
                ask_all(server.url, reference, args.max_tokens, CONCURRENCY[mode], args.seed)
            )
            seconds = time.monotonic() - start
            after = _counters(server.url)
            drafts, accepted, preemptions, reused = (b - a for a, b in zip(before, after, strict=True))
            row = {
                "variant": variant.name,
                "mode": mode,
                **{kind: sum(v.kind == kind for v in verdicts) for kind in ("exact", "tie", "failure")},
                "tokenised_otherwise": len(otherwise),
                # Tokens per verified tree, the root counted; None where no tree was verified.
                "acceptance_length": round(1 + accepted / drafts, 3) if drafts else None,
                # That these happened at all is what makes the row say something about them.
                "preemptions": round(preemptions),
                "reused_prompt_tokens": round(reused),
                "seconds": round(seconds, 1),
            }
            rows.append(row)
            length = row["acceptance_length"] or "-"
            print(
                f"{variant.name:12} {mode:9} exact {row['exact']:3}  ties {row['tie']:2}  "
                f"failures {row['failure']:3}  acceptance length {length}  "
                f"preemptions {row['preemptions']}  {seconds:.0f} s",
                flush=True,
            )
            for number, verdict in enumerate(verdicts):
                if verdict.detail:
                    print(f"  {verdict.kind}, prompt {number}: {verdict.detail}", flush=True)
    return rows


def _counters(url: str) -> tuple[float, ...]:
    """So far: trees verified, their nodes accepted (root not counted), preemptions, prompt tokens reused."""
    page = metrics(httpx.get(f"{url}/metrics", trust_env=False).text)

    def total(name: str) -> float:
        return sum(value for key, value in page.items() if key.split("{")[0] == f"medusa_{name}_total")

    names = (
        "spec_decode_num_drafts",
        "spec_decode_num_accepted_tokens",
        "num_preemptions",
        "prefix_cache_hits",
    )
    return tuple(total(name) for name in names)


def passed(rows: list[dict[str, Any]]) -> bool:
    """In each variant and mode: no failure, the same prompt tokens, at most one tie per 80 answers."""
    return bool(rows) and all(
        row["failure"] == 0
        and row["tokenised_otherwise"] == 0
        and row["tie"] <= max(1, (row["exact"] + row["tie"] + row["failure"]) // ANSWERS_PER_TIE)
        for row in rows
    )


def make_head_files(
    args: argparse.Namespace, folder: Path, kinds: set[str], reference: Reference
) -> dict[str, Path]:
    """Head files of these kinds in args.heads_folder, made where they are not there yet."""
    from benchmarks.make_heads import FILE, handmade_heads, random_heads, save_heads

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files: dict[str, Path] = {}
    for kind in sorted(kinds - {"none"}):
        files[kind] = args.heads_folder / kind / FILE
        if files[kind].is_file():
            continue
        if kind == "random":
            tensors = random_heads(config["hidden_size"], num_heads=args.heads)
        else:
            tensors, accuracies = handmade_heads(reference, config["vocab_size"], num_heads=args.heads)
            shown = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            print(f"hand-made heads: first guess right {shown} of the time", flush=True)
        save_heads(tensors, files[kind].parent)
    return files


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    names = [variant.name for variant in VARIANTS]
    parser = new_parser(__doc__)
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--reference-cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--heads-folder", type=Path, help="kept head files; a temporary folder if not given")
    parser.add_argument("--heads", type=int, default=4, help="heads in the files it makes")
    parser.add_argument("--variants", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--modes", default="alone,together")
    parser.add_argument("--device", default="cpu", help="of reference and server: cpu, cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of the server")
    parser.add_argument("--seed", type=int, default=0, help="of order and arrival")
    args, args.serve = parse_with_engine_options(parser, argv)
    args.variants = args.variants.split(",")
    args.modes = args.modes.split(",")
    for given, known in ((args.variants, names), (args.modes, list(CONCURRENCY))):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return args


def main() -> int:
    args = parse()
    folder = model_folder(args.model)
    prompts = first_turns(args.prompts, args.limit)
    reference = load_reference(folder, prompts, args.max_tokens, args.reference_cache, args.device)
    variants = [variant for variant in VARIANTS if variant.name in args.variants]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="medusa-heads-") as scratch:
        args.heads_folder = args.heads_folder or Path(scratch)
        heads = make_head_files(args, folder, {variant.heads for variant in variants}, reference)
        for variant in variants:
            rows += run_variant(variant, args, reference, heads)
    ok = passed(rows)
    print_result(
        {
            "benchmark": "equality",
            "passed": ok,
            "model": args.model,
            "dtype": "float32",
            "device": args.device,
            "prompts": len(prompts),
            "max_tokens": args.max_tokens,
            "tie_gap": TIE_GAP,
            "serve": args.serve,
            "rows": rows,
            "hardware": hardware(),
        }
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
