"""Which runner an engine has, and what chooses its trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from engine.cuda_graphs import Graph, cuda_graphs
from engine.errors import ConfigError
from engine.graphs import CapturedRunner
from engine.loader import Loaded
from engine.medusa.adaptive import AdaptiveTree, FixedTree
from engine.medusa.buckets import Buckets
from engine.medusa.records import LookupRecord
from engine.runner import Runner
from engine.warmup import measure

__all__ = ["make_chooser", "make_runner"]


def make_runner(loaded: Loaded, graph: Callable[[], Graph] | None, buckets: Buckets | None) -> Runner:
    """The runner of `loaded`, all of its steps captured where they shall be.

    Args:
        graph, buckets: see `Engine`.

    Raises:
        ConfigError: there is no memory left for it.
        CaptureError: a step cannot be captured.
    """
    info = loaded.info
    made: Callable[..., Runner] = Runner
    if graph is not None or loaded.captured:
        if buckets is None:
            buckets = Buckets.default(
                max_num_seqs=info.max_num_seqs, tree_size=info.tree_size, max_rows=loaded.max_step_tokens
            )
        captured = CapturedRunner
        if loaded.kernels:
            from engine.graphs_triton import TritonRunner  # Triton comes with CUDA builds of torch

            captured = TritonRunner
        made = partial(
            captured,
            graph=graph or cuda_graphs(loaded.pool.device),
            buckets=buckets,
            max_prefill_tokens=loaded.max_prefill_tokens,
        )
    try:
        runner = made(
            loaded.decoder,
            loaded.attention,
            loaded.pool,
            loaded.heads,
            lookup_size=info.lookup,
            eos_token_ids=frozenset(loaded.generation_defaults.eos_token_ids),
            max_num_seqs=info.max_num_seqs,
            max_model_len=info.max_model_len,
        )
        if graph is None and isinstance(runner, CapturedRunner):
            runner.capture()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the K/V pool leaves no memory for what steps need; lower kv_cache_tokens (or kv_cache_bytes, or "
            "gpu_memory_utilization), max_num_seqs or max_step_tokens"
        ) from error
    if graph is None and isinstance(runner, CapturedRunner) and loaded.kernels:
        from engine.warmup_triton import warm_prompts

        warm_prompts(runner, loaded)
    return runner


def make_chooser(loaded: Loaded, runner: Runner) -> AdaptiveTree | FixedTree | None:
    """What chooses the trees of each step; None is plain decoding. For `tree: auto` steps are timed now."""
    info = loaded.info
    heads = loaded.heads.tree if loaded.heads is not None else None
    if info.tree_size == 1:
        return None
    if info.tree != "auto":
        return FixedTree(info.tree_size, heads, info.lookup, loaded.max_step_tokens, runner.buckets)
    times = measure(
        runner,
        loaded.blocks,
        heads,
        max_num_seqs=info.max_num_seqs,
        max_step_tokens=loaded.max_step_tokens,
        max_model_len=info.max_model_len,
    )
    accepted = loaded.heads.accepted if loaded.heads is not None else None
    lookup = LookupRecord(info.lookup)
    return AdaptiveTree(times, heads, lookup, loaded.max_step_tokens, accepted=accepted)
