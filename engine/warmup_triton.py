"""Passes over prompts at the start, so that nobody's prompt waits until a kernel is compiled. CUDA only.

Triton compiles a kernel when it is first launched, once for each form: a second each for attention's where
nothing is kept on disk. Which forms a pass over prompts asks for follows from the sizes of its chunks and
from how much of them is cached. Backend and layers say it (`forms`); a few passes that have all are run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from engine.attention.base import AttentionInput, computed_rows
from engine.attention.triton import TritonAttention
from engine.graphs import CapturedRunner
from engine.loader import Loaded
from engine.model.fused_triton import FusedLayers
from engine.runner import Runner
from engine.scheduler import Chunk
from engine.triton_measuring import side_by_side
from engine.types import Request, SamplingParams, Sequence

__all__ = ["PromptPass", "prompt_passes", "warm_prompts"]

log = logging.getLogger(__name__)

_EVERY_SIZE = 256
"""Up to so many tokens each size is looked at; beyond, products are all torch's."""

_SAMPLINGS = (SamplingParams(temperature=0.0), SamplingParams(top_p=0.9, top_k=50, min_p=0.01))
"""Of the first sequence of a pass and of the second: both ways of drawing are run."""


class PromptPass(NamedTuple):
    """A pass over the chunks of one or two prompts.

    Args:
        sizes: tokens of each chunk.
        cached: tokens in the pool of the first one's sequence.
    """

    sizes: tuple[int, ...]
    cached: int = 0


def warm_prompts(runner: Runner, loaded: Loaded) -> None:
    """Run passes over made-up prompts, which leave nothing behind, until all kernels of such are compiled.

    What fails here is only logged: it would fail the prompts that need it.

    Args:
        runner: all of its slots are free.
        loaded: of the same engine; all blocks are free.
    """
    started = time.monotonic()
    captured = max(runner.prompts.tokens, default=0) if isinstance(runner, CapturedRunner) else 0
    passes = prompt_passes(loaded, captured)
    if not passes:
        return
    try:
        # The first one compiles what all have in common.
        _run(runner, loaded, passes[0])
        _compile(loaded, passes[1:])
        for each in passes[1:]:
            _run(runner, loaded, each)
    except torch.AcceleratorError:
        raise
    except Exception:
        log.exception("the passes over prompts at the start failed; the first prompts may wait for kernels")
        return
    took = time.monotonic() - started
    log.info("ran %d passes over prompts, which compiles their kernels, in %.1f s", len(passes), took)


def prompt_passes(loaded: Loaded, captured: int = 0) -> list[PromptPass]:
    """Few passes that launch every kernel that any pass over prompts launches, in each of its forms.

    Args:
        captured: tokens up to which passes are captured, which compiled their kernels.
    """
    smallest: dict[frozenset[Hashable], PromptPass] = {}
    for each in sorted(_possible(loaded, captured), key=_work):
        smallest.setdefault(_forms(loaded, each), each)
    missing, passes = set[Hashable]().union(*smallest), list[PromptPass]()
    while missing:
        best = max(smallest, key=lambda forms: (len(forms & missing), -_work(smallest[forms])))
        passes.append(smallest[best])
        missing -= best
    return passes


def _possible(loaded: Loaded, captured: int) -> Iterator[PromptPass]:
    """Passes among which those of more sequences or of longer prefixes find their forms.

    Of several chunks it counts whether they are of equal size, and their number only as far as many leave no
    processor idle, for which keys would be split.
    """
    most_tokens, longest = loaded.max_prefill_tokens, loaded.info.max_model_len
    prefix = 0
    if isinstance(loaded.attention, TritonAttention):
        prefix = loaded.attention.undivided(loaded.pool) + 1
    size = 1
    while size <= min(most_tokens, longest):
        for cached in {0, min(prefix, longest - size)}:
            for sizes in ((size,), (size, 1)):
                found = PromptPass(sizes, cached)
                needed = sum(map(loaded.blocks.blocks_for, (size + cached, *sizes[1:])))
                fits = sum(sizes) <= most_tokens and len(sizes) <= loaded.info.max_num_seqs
                if sum(sizes) > captured and fits and needed <= loaded.blocks.free:
                    yield found
        size += 1 + size // _EVERY_SIZE


def _work(each: PromptPass) -> int:
    return sum(each.sizes) + each.cached


def _forms(loaded: Loaded, each: PromptPass) -> frozenset[Hashable]:
    found = _attention_forms(loaded, each)
    if loaded.decoder.fused_cuda is not None:
        found = found | loaded.decoder.fused_cuda.forms(sum(each.sizes))
    return found


def _attention_forms(loaded: Loaded, each: PromptPass) -> frozenset[Hashable]:
    if not isinstance(loaded.attention, TritonAttention):
        return frozenset()
    return frozenset(loaded.attention.forms(each.sizes, each.cached, loaded.pool))


def _run(runner: Runner, loaded: Loaded, each: PromptPass) -> None:
    """The pass as it is served, by sequences in the first slots."""
    sequences = [
        _sequence(slot, size, each.cached if slot == 0 else 0) for slot, size in enumerate(each.sizes)
    ]
    try:
        for sequence in sequences:
            if not loaded.blocks.grow(sequence.blocks, sequence.num_prompt):
                raise RuntimeError("the K/V pool has no room for a prompt at the start")
        chunks = [Chunk(s, s.num_cached, s.num_prompt, last=True, first=True) for s in sequences]
        for together in runner.together(chunks):
            runner.prefill(together)
        for sequence in sequences:
            sequence.num_cached = sequence.num_prompt
        if loaded.info.lookup:
            runner.propose(sequences)
    finally:
        for sequence in reversed(sequences):  # so that the free list ends as it began
            loaded.blocks.release(sequence.blocks)


def _sequence(slot: int, size: int, cached: int) -> Sequence:
    tokens = (0,) * (cached + size)
    request = Request(f"warm-up-{slot}", tokens, _SAMPLINGS[slot])
    made = Sequence(request, 0, 0, [*tokens], len(tokens), len(tokens) + 1, slot, slot=slot)
    made.num_cached = cached
    return made


def _compile(loaded: Loaded, passes: list[PromptPass]) -> None:
    """Compile the forms of attention in these passes, as many at a time as there are cores."""
    layers, known, ways = loaded.decoder.fused_cuda, set[Hashable](), []
    for each in passes:
        forms = _attention_forms(loaded, each)
        if layers is not None and not forms <= known:
            ways.append(partial(_attend, loaded, layers, each))
            known |= forms
    device = loaded.pool.device
    if device.type == "cuda":
        driver.active.get_current_device()  # makes the driver, before threads do
    side_by_side(ways, partial(torch.cuda.device, device) if device.type == "cuda" else nullcontext)


@torch.inference_mode()
def _attend(loaded: Loaded, layers: FusedLayers, each: PromptPass) -> None:
    """Attention of the pass alone, in a layer of each window; it writes to block 0, which nobody reads."""
    attention, pool, count = copy(loaded.attention), loaded.pool, len(each.sizes)
    longest, device = max(each.sizes), pool.device

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    index = computed_rows(each.sizes)
    if index is not None:
        index = index.to(device)
    width = loaded.blocks.blocks_for(each.cached + longest)
    lengths = torch.tensor([each.cached, 0][:count], device=device)
    plan = AttentionInput(ids(count, width), lengths, ids(count, longest), each.cached + longest, index=index)
    attention.plan(plan, pool)
    windows = loaded.decoder.config.windows
    tokens, positions = sum(each.sizes), ids(sum(each.sizes))
    for layer in {window: layers.layers[i] for i, window in enumerate(windows)}.values():
        heads = layer.num_heads + 2 * layer.num_kv_heads
        qkv = torch.zeros(tokens, heads, layer.head_dim, dtype=pool.dtype, device=device)
        layers.attended(layer, qkv, positions, attention)
