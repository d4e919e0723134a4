"""What a lower precision costs: perplexity and agreement with float32, for each way to run the model.

    python -m benchmarks.quality --prompts mt_bench.jsonl --limit 40

Two texts are scored, token by token, with the true past given (teacher forcing):
- `answers`: chat prompts with the greedy answers that our own float32 engine gives, answers scored;
- `text`: prose nobody generated (this repository's documentation unless --text names other files),
  in windows of --window tokens that each start anew.
Then every variant answers the prompts by itself, greedily, and we count the tokens until its answer
parts from float32's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    ROOT,
    add_model,
    bootstrap_interval,
    first_turns,
    hardware,
    new_parser,
    print_result,
    prompt_ids,
)
from engine.attention.base import AttentionInput
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import Loaded, load
from engine.types import Request, SamplingParams

VARIANTS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "int8-cuda": {"dtype": "bfloat16", "quantization": "int8"},
    "fp8": {"dtype": "bfloat16", "quantization": "fp8"},
}
"""Engine settings by name; the first is what the others are compared with."""

AT_ONCE = 8
"""Prompts answered together."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model says about a token sequence, over the positions that are scored.

    Args:
        logprobs: [n] float32, of the token that stands there.
        best: [n] int64, the most likely token there.
    """

    logprobs: Tensor
    best: Tensor


@dataclass(frozen=True, slots=True)
class Text:
    """A token sequence; tokens from `start` (at least 1) on are scored."""

    token_ids: list[int]
    start: int


@torch.inference_mode()
def score(loaded: Loaded, text: Text) -> Scored:
    """One forward pass over the whole text, in chunks of at most `max_step_tokens`.

    It writes over the pool, so no engine may go on with blocks it has cached there.
    """
    tokens = torch.tensor(text.token_ids, device=loaded.pool.device)
    size, block_size = len(tokens), loaded.pool.block_size
    tables = torch.arange(1, -(-size // block_size) + 1, device=tokens.device).unsqueeze(0)
    found: list[Tensor] = []
    best: list[Tensor] = []
    for start in range(0, size, loaded.max_step_tokens):
        end = min(size, start + loaded.max_step_tokens)
        positions = torch.arange(start, end, device=tokens.device)
        loaded.attention.plan(
            AttentionInput(
                block_tables=tables,
                lengths=torch.tensor([start], device=tokens.device),
                rows=block_size + positions.unsqueeze(0),
                max_length=end,
            ),
            loaded.pool,
        )
        hidden = loaded.decoder(tokens[start:end], positions, loaded.attention)
        # Row i predicts token i + 1; the last row of the text predicts nothing we know.
        keep = (positions >= text.start - 1) & (positions < size - 1)
        logprobs = loaded.decoder.logits(hidden[keep]).log_softmax(-1)
        target = tokens[1:][positions[keep]]
        found.append(logprobs.gather(1, target.unsqueeze(1)).squeeze(1))
        best.append(logprobs.argmax(-1))
    return Scored(torch.cat(found), torch.cat(best))


def answer_all(loaded: Loaded, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy answers in token ids, EOS included where it came, `AT_ONCE` prompts at a time."""
    engine = Engine(loaded)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    pending = list(enumerate(prompts))
    running = 0
    while pending or running:
        while pending and running < AT_ONCE:
            index, ids = pending.pop(0)
            engine.add(Request(str(index), tuple(ids), sampling))
            running += 1
        for delta in engine.step():
            answers[int(delta.request_id)] += delta.token_ids
            if delta.error is not None:
                raise RuntimeError(delta.error)
            running -= delta.finish_reason is not None
    return answers


def windows(token_ids: list[int], size: int) -> list[Text]:
    """Consecutive pieces of `size` tokens; a rest too short to say anything is left out."""
    pieces = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    return [Text(piece, 1) for piece in pieces if len(piece) >= min(size, 32)]


def shared_prefix(a: list[int], b: list[int]) -> int:
    """Tokens until the first difference."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def compare(texts: list[Text], found: list[Scored], reference: list[Scored]) -> dict[str, Any]:
    """Perplexity, its ratio to the reference's with a 95 % interval over texts, and agreement per token."""
    loss = torch.cat([s.logprobs for s in found]).neg()
    base = torch.cat([s.logprobs for s in reference]).neg()
    # Resample whole texts: tokens of one text are not independent.
    sums = [
        (float((r.logprobs - s.logprobs).sum()), len(s.logprobs))
        for s, r in zip(found, reference, strict=True)
    ]

    def ratio(indices: Any) -> float:
        chosen = [sums[int(i)] for i in indices]
        return math.exp(sum(total for total, _ in chosen) / sum(count for _, count in chosen))

    low, high = bootstrap_interval(list(range(len(sums))), ratio, resamples=2000)
    best = torch.cat([s.best for s in found])
    return {
        "texts": len(texts),
        "tokens": len(loss),
        "perplexity": round(math.exp(loss.mean()), 4),
        "perplexity_ratio": round(math.exp(loss.mean() - base.mean()), 5),
        "perplexity_ratio_interval": [round(low, 5), round(high, 5)],
        "same_best_token": round(float((best == torch.cat([s.best for s in reference])).float().mean()), 5),
        "mean_abs_logprob_difference": round(float((loss - base).abs().mean()), 5),
        "max_abs_logprob_difference": round(float((loss - base).abs().max()), 4),
    }


def free_running(answers: list[list[int]], reference: list[list[int]]) -> dict[str, Any]:
    """How far greedy answers go along with the reference's."""
    shared = [shared_prefix(a, b) for a, b in zip(answers, reference, strict=True)]
    return {
        "answers": len(answers),
        "identical": sum(a == b for a, b in zip(answers, reference, strict=True)),
        "mean_tokens_until_difference": round(statistics.mean(shared), 1),
        "median_tokens_until_difference": statistics.median(shared),
        "mean_answer_tokens": round(statistics.mean(len(b) for b in reference), 1),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Results by variant, each with one entry per text and one for free running.

    Args:
        args: as `parse` makes them; `settings` are further ones of the engine, for all variants.
    """
    results: dict[str, Any] = {}
    texts: dict[str, list[Text]] = {}
    reference: dict[str, list[Scored]] = {}
    reference_answers: list[list[int]] = []
    prompts: list[list[int]] = []
    for name in args.variants:
        settings = {"model": args.model, "device": args.device, **args.settings, **VARIANTS[name]}
        loaded = load(EngineConfig.model_validate(settings), progress=False)
        if not texts:
            tokenizer = loaded.text.tokenizer
            prompts = [prompt_ids(tokenizer, turn) for turn in first_turns(args.prompts, args.limit)]
            prose = "\n\n".join(path.read_text(encoding="utf-8") for path in args.text)
            texts["text"] = windows(tokenizer.encode(prose, add_special_tokens=False), args.window)
            reference_answers = answer_all(loaded, prompts, args.new_tokens)
            pairs = zip(prompts, reference_answers, strict=True)
            texts["answers"] = [Text(prompt + answer, len(prompt)) for prompt, answer in pairs]
        found = {kind: [score(loaded, text) for text in these] for kind, these in texts.items()}
        if not reference:
            reference = found
        results[name] = {kind: compare(texts[kind], found[kind], reference[kind]) for kind in texts}
        answers = reference_answers if found is reference else answer_all(loaded, prompts, args.new_tokens)
        results[name]["greedy"] = free_running(answers, reference_answers)
        print(name, results[name], flush=True)
        del loaded
        gc.collect()
        torch.cuda.empty_cache()  # the next one's pool is sized by what is free; nothing happens on a CPU
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=Path, required=True, help="MT-bench-shaped file of prompts")
    parser.add_argument("--limit", type=int, default=40, help="prompts taken from the file")
    parser.add_argument("--new-tokens", type=int, default=128)
    documentation = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    parser.add_argument("--text", type=Path, nargs="+", default=documentation)
    parser.add_argument("--window", type=int, default=512, help="tokens of a scored piece of text")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.set_defaults(settings={})
    args = parser.parse_args(argv)
    if args.variants[0] != "float32":
        parser.error("the first variant is the reference and must be float32")
    return args


def main() -> int:
    args = parse()
    results = measure(args)
    print_result(
        {
            "benchmark": "quality",
            "model": args.model,
            "device": args.device,
            "prompts": args.prompts.name,
            "new_tokens": args.new_tokens,
            "text": [path.name for path in args.text],
            "window": args.window,
            "results": results,
            "hardware": hardware(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
