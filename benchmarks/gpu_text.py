"""Parts of `benchmarks.gpu` that answer real prompts: end to end, over HTTP, where texts part, quality."""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks import http_cost, quality
from benchmarks.adaptive import run_phase, shares
from benchmarks.common import ROOT, Server, engine_config, model_folder, ratio_interval, read_items
from benchmarks.gpu_run import Run
from benchmarks.gpu_shapes import SHAPES, TINY, write_folder
from engine.llm import LLM
from engine.types import Request, SamplingParams

__all__ = ["divergences", "end_to_end", "http", "quality_cost"]

PROMPTS = [ROOT / "benchmarks" / "data" / name for name in ("questions.jsonl", "summaries.jsonl")]

_WEB = ("fastapi", "uvicorn", "sse_starlette", "structlog", "httptools")
"""What the server needs beyond the engine."""


def _settings(run: Run, **values: Any) -> dict[str, Any]:
    """Engine settings of the model that answers."""
    settings: dict[str, Any] = {
        "device": str(run.device),
        "dtype": "float32" if run.tiny else "bfloat16",
        "max_model_len": 192 if run.tiny else 2048,
        "kv_cache_tokens": 2048 if run.tiny else 65_536,
        "max_num_seqs": 2 if run.tiny else 64,
        "prefix_caching": False,
    }
    if run.args.heads:
        settings["heads"] = run.args.heads
    return settings | values


def _prompts(run: Run, llm: LLM) -> list[tuple[int, ...]]:
    """Chat prompts in tokens."""
    items = [item.prompt for path in PROMPTS for item in read_items(path)]
    if run.tiny:
        items = ["t1 t2 t3", "t3 t1", "t2 t2 t5 t1"]
    return [tuple(llm.text.encode_chat([{"role": "user", "content": item}])) for item in items]


def _answers(
    llm: LLM, prompts: list[tuple[int, ...]], sampling: SamplingParams, name: str
) -> tuple[float, Any]:
    """Seconds and outputs of these prompts, together."""
    requests = [Request(f"{name}-{i}", prompt, sampling) for i, prompt in enumerate(prompts)]
    start = time.perf_counter()
    outputs = llm.generate(requests)
    seconds = time.perf_counter() - start
    if failed := [output.error for output in outputs if output.error is not None]:
        raise RuntimeError(failed[0])
    return seconds, outputs


# -- end to end ------------------------------------------------------------------------------------


class _Account:
    """What an engine's steps took, summed over the rounds that count: why a ratio is what it is."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._sums: Counter[str] = Counter()
        self._before = self._now()

    def _now(self) -> Counter[str]:
        stats = self._llm.stats
        now = Counter({f"{phase}_s": tally.total for phase, tally in stats.step_seconds.items()})
        now.update({f"{phase}_passes": sum(tally.counts) for phase, tally in stats.step_seconds.items()})
        now["nodes"] = sum(stats.drafted_by_source.values())
        now["sequence_steps"] = sum(stats.acceptance_counts)
        now["explored_steps"] = stats.explored_steps
        now["expected_of_plain_s"] = stats.plain_decode_seconds
        now["device_idle_s"] = stats.device_idle_seconds
        return now

    def begin(self) -> None:
        self._before = self._now()

    def end(self) -> None:
        now = self._now()
        self._sums.update({name: value - self._before[name] for name, value in now.items()})

    def row(self) -> dict[str, float]:
        """Seconds of the host in each phase of a step and how many there were; drafted nodes, without roots;
        what plain decoding would have taken for the tokens that steps gave, by the measured step times."""
        return {name: round(value, 4) for name, value in self._sums.items() if value}


def end_to_end(run: Run) -> dict[str, Any]:
    """Tokens per second of the shipped heads (`tree: auto`) against the tree off, in turns, and of
    transformers `generate` with a static cache, which transformers compiles on CUDA."""
    rounds, new_tokens = (2, 8) if run.tiny else (7, 128)
    auto, off = (LLM(run.args.model, progress=False, **_settings(run, tree=tree)) for tree in ("auto", "off"))
    prompts = _prompts(run, off)
    found: dict[str, Any] = {
        "model": run.args.model,
        "dtype": off.info.dtype,
        "heads": auto.info.num_heads,
        "new_tokens": new_tokens,
        "order": "ABBA",
        "rows": [],
    }
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    rng = random.Random(0)
    for batch in (1, 2) if run.tiny else (1, 4, 16, 64):
        rates: dict[str, list[float]] = {"auto": [], "off": []}
        lengths: list[float] = []
        accounts = {"auto": _Account(auto), "off": _Account(off)}
        for number in range(-1, rounds):
            chosen = [rng.choice(prompts) for _ in range(batch)]
            for side in ("auto", "off") if number % 2 == 0 else ("off", "auto"):
                llm = auto if side == "auto" else off
                accounts[side].begin()
                seconds, outputs = _answers(llm, chosen, sampling, f"{batch}-{number}")
                if number >= 0:
                    accounts[side].end()
                    rates[side].append(batch * new_tokens / seconds)
                    if side == "auto":
                        lengths += [output.acceptance_length or 1.0 for output in outputs]
        row = {
            "batch": batch,
            "auto_tokens_per_s": round(statistics.median(rates["auto"]), 1),
            "off_tokens_per_s": round(statistics.median(rates["off"]), 1),
            "acceptance_length": round(statistics.fmean(lengths), 3),
            **ratio_interval(rates["auto"], rates["off"]),
            "steps": {side: account.row() for side, account in accounts.items()},
        }
        found["rows"].append(row)
        print(row, flush=True)
        run.record("end_to_end", found)
    found["streams"] = _streams(run, auto, off, prompts, rounds, new_tokens)
    run.record("end_to_end", found)
    del auto, off
    run.free()
    try:
        found["transformers"] = _transformers(run, prompts, new_tokens)
    except Exception as error:  # its compiler may not work here
        found["transformers"] = f"{type(error).__name__}: {error}"[:500]
        print(found["transformers"], flush=True)
    return found


def _streams(
    run: Run, auto: LLM, off: LLM, prompts: list[tuple[int, ...]], rounds: int, new_tokens: int
) -> list[dict[str, Any]]:
    """The same while so many streams decode, each of which asks again when it is answered.

    The batches above run empty: all wait for the answer whose drafts come true least, and steps have fewer
    and fewer sequences.
    """
    found: list[dict[str, Any]] = []
    rng = random.Random(1)
    for streams in (1, 2) if run.tiny else (1, 4, 16, 64):
        rates: dict[str, list[float]] = {"auto": [], "off": []}
        sizes: list[int] = []
        lengths: list[float] = []
        accounts = {"auto": _Account(auto), "off": _Account(off)}
        for number in range(-1, rounds):
            chosen = [rng.choice(prompts) for _ in range(3 * streams)]
            for side in ("auto", "off") if number % 2 == 0 else ("off", "auto"):
                llm = auto if side == "auto" else off
                accounts[side].begin()
                phase = run_phase(llm, chosen, streams, new_tokens, f"streams-{streams}-{number}")
                if number >= 0:
                    accounts[side].end()
                    rates[side].append(phase.tokens_per_s)
                    if side == "auto":
                        sizes += phase.sizes
                        lengths.append(phase.acceptance_length)
        row = {
            "streams": streams,
            "auto_tokens_per_s": round(statistics.median(rates["auto"]), 1),
            "off_tokens_per_s": round(statistics.median(rates["off"]), 1),
            **ratio_interval(rates["auto"], rates["off"]),
            "acceptance_length": round(statistics.fmean(lengths), 3),
            "tree_sizes": shares(sizes),
            "steps": {side: account.row() for side, account in accounts.items()},
        }
        found.append(row)
        print(row, flush=True)
    return found


def _transformers(run: Run, prompts: list[tuple[int, ...]], new_tokens: int) -> list[dict[str, Any]]:
    """Rates of `generate` with a static cache; the calls in which it compiles are not timed."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if run.tiny else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(run.args.model), dtype=dtype)
    model = model.to(run.device).eval()
    size = 8 if run.tiny else 64
    rows: list[dict[str, Any]] = []
    for batch in (1,) if run.tiny else (1, 16):
        if run.left() < (0 if run.tiny else 200):  # it compiles for a minute and more, and other parts follow
            rows.append({"batch": batch, "skipped": "no time left"})
            continue
        # Equal lengths, so that no padding counts against it.
        chosen = [(prompt * size)[:size] for prompt in (prompts * batch)[:batch]]
        ids = torch.tensor(chosen, device=run.device)
        rates: list[float] = []
        for number in range(-2, 1 if run.tiny else 5):
            run.synchronize()
            start = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                cache_implementation="static",
            )
            count = out.shape[1] - size
            run.synchronize()
            if number >= 0:
                rates.append(batch * count / (time.perf_counter() - start))
        rows.append(
            {"batch": batch, "prompt_tokens": size, "tokens_per_s": round(statistics.median(rates), 1)}
        )
        print("transformers", rows[-1], flush=True)
    return rows


# -- where texts part ------------------------------------------------------------------------------


def divergences(run: Run) -> dict[str, Any]:
    """Greedy texts with trees and in batches against plain decoding alone: where each first differs, and
    by how little the best token led there (log p of the best two, plain decoding's own)."""
    new_tokens = 8 if run.tiny else 96
    found: dict[str, Any] = {}
    for dtype in ("float32",) if run.tiny else ("float32", "bfloat16"):
        plain = LLM(run.args.model, progress=False, **_settings(run, tree="off", dtype=dtype))
        prompts = _prompts(run, plain)[: 2 if run.tiny else 16]
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=2)
        base = [_answers(plain, [prompt], sampling, f"alone-{i}")[1][0] for i, prompt in enumerate(prompts)]
        greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        rows = {"off, together": first_divergences(base, _answers(plain, prompts, greedy, "off")[1])}
        print(dtype, "off, together", rows["off, together"], flush=True)
        del plain
        run.free()
        variants = {"auto, together": ("auto", True), "tree 64, alone": (5 if run.tiny else 64, False)}
        for name, (tree, together) in variants.items():
            llm = LLM(run.args.model, progress=False, **_settings(run, tree=tree, dtype=dtype, lookup="on"))
            if together:
                outputs = _answers(llm, prompts, greedy, name)[1]
            else:
                outputs = [_answers(llm, [prompt], greedy, f"{i}")[1][0] for i, prompt in enumerate(prompts)]
            rows[name] = first_divergences(base, outputs)
            print(dtype, name, rows[name], flush=True)
            found[dtype] = rows
            run.record("divergences", found)
            del llm
            run.free()
    return found


def first_divergences(base: list[Any], outputs: list[Any]) -> dict[str, Any]:
    """Where pairs of outputs part, as (position, margin); `base` has log-probabilities of its best two."""
    parted = []
    for plain, other in zip(base, outputs, strict=True):
        same = quality.shared_prefix(plain.token_ids, other.token_ids)
        if same < min(len(plain.token_ids), len(other.token_ids)):
            best, second = sorted((value for _, value in plain.logprobs[same].top), reverse=True)[:2]
            parted.append((same, round(best - second, 5)))
    margins = [margin for _, margin in parted]
    return {
        "texts": len(base),
        "parted": len(parted),
        "first": parted,
        "largest_margin": max(margins, default=None),
        "median_margin": statistics.median(margins) if margins else None,
    }


# -- HTTP ------------------------------------------------------------------------------------------


def http(run: Run) -> dict[str, Any]:
    """The same prompts over HTTP and through the engine alone, in turns, at 1 to 64 streams; the server's
    engine is where `--engine-process auto` has it, in a process on a GPU, and then where it has not."""
    if missing := [name for name in _WEB if importlib.util.find_spec(name) is None]:
        return {"skipped": f"not installed here: {', '.join(missing)}"}
    found: dict[str, Any] = {}
    streams = [1, 2] if run.tiny else [1, 8, 64]
    with tempfile.TemporaryDirectory() as temporary:
        cases: dict[str, list[str]] = {}
        if run.tiny or run.args.model == "smollm2-135m":
            shape = TINY if run.tiny else SHAPES["llama-2-7b"]
            tokenizer = model_folder(run.args.model)
            folder = write_folder(shape, Path(temporary) / "shape", tokenizer=tokenizer)
            cases[f"{shape.name} with random weights"] = [str(folder), "--load-format", "dummy"]
        if not run.tiny:
            cases["model"] = [run.args.model]
        auto = run.device.type == "cuda"
        sides = [(name, on) for name in cases for on in (auto, not auto)]
        for case, on in sides:
            model, *options = cases[case]
            name = f"{case}, engine in a {'process' if on else 'thread'}"
            if run.left() < 45:
                found[name] = {"skipped": "no time left"}
                continue
            options += ["--tree", "off", "--device", str(run.device)]
            options += ["--dtype", "float32" if run.tiny else "bfloat16"]
            options += ["--max-num-seqs", str(max(streams)), "--max-model-len", "128" if run.tiny else "1024"]
            options += ["--kv-cache-tokens", "1024" if run.tiny else "32768"]
            args = argparse.Namespace(
                streams=streams,
                rounds=2 if run.tiny else 4,
                prompt_tokens=60,
                new_tokens=6 if run.tiny else 96,
                seed=0,
            )
            with Server([model, *options, "--engine-process", "on" if on else "off"]) as server:
                llm = LLM(engine_config(options, model=model), progress=False)
                rows, warnings = http_cost.measure(args, server, llm)
            found[name] = {"rows": rows, "warnings": warnings}
            del llm
            run.free()
            run.record("http", found)
    return found


# -- quality ---------------------------------------------------------------------------------------


def quality_cost(run: Run) -> dict[str, Any]:
    """What bf16 and 8-bit weights cost in perplexity and agreement, against float32 on this device."""
    variants = ["float32", "bfloat16"] if run.tiny else ["float32", "bfloat16", "fp8", "int8-cuda"]
    args = argparse.Namespace(
        model=run.args.model,
        device=str(run.device),
        prompts=PROMPTS[0],
        limit=2 if run.tiny else 16,
        new_tokens=8 if run.tiny else 128,
        text=[ROOT / "CONTRIBUTING.md"]
        if run.tiny
        else [ROOT / "README.md", ROOT / "docs" / "architecture.md"],
        window=64 if run.tiny else 512,
        variants=variants,
        # Weights are compared, not trees: of these, each variant would capture a hundred graphs more.
        settings=_settings(run, tree="off", max_num_seqs=quality.AT_ONCE),
    )
    return quality.measure(args)
