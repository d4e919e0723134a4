"""Memory beside weights and K/V: the largest passes are run once, before the pool is sized."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionInput
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES, EngineConfig
from engine.errors import ConfigError
from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import Topology, Tree
from engine.model.decoder import Decoder
from engine.sampler import draw, verify_all
from engine.sampling_slots import SamplingSlots

__all__ = ["WorstCase", "transient_bytes"]

log = logging.getLogger(__name__)


class WorstCase:
    """The largest pass over prompts and the largest decode steps of these settings, on a pool of their own.

    A decode step drafts, runs the model over all nodes of all sequences, and draws at each with everything
    on that a request may ask for. Roots are drawn by sorting their rows and the other nodes are not, so the
    largest trees and the most sequences are tried. The K/V behind the new rows are short: a backend that
    copies the whole prefix (the reference one) takes more with longer ones. Where a kernel draws, it takes
    a row of the vocabulary for each sequence, and little else.

    Args:
        decoder: ready to run.
        attention: its backend.
        heads: the heads' branch; None without.
        tree_size: most nodes of a sequence, root counted.
        max_num_seqs: slots.
        max_step_tokens: bound on the rows of a decode pass; max_prefill_tokens: of one over prompts.
        block_size: tokens per K/V block.
        dtype: of K/V.
        device: where everything is.
        kernels: decode steps are captured, with Triton's kernels around the model.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        heads: HeadDrafter | None,
        *,
        tree_size: int,
        max_num_seqs: int,
        max_step_tokens: int,
        max_prefill_tokens: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: bool = False,
    ) -> None:
        self._kernels = kernels
        self._decoder, self._attention, self._heads = decoder, attention, heads
        self._device, self._max_num_seqs = device, max_num_seqs
        self.prefill_rows = max_prefill_tokens
        wide = max(1, min(max_num_seqs, max_step_tokens // tree_size))
        self.steps = tuple(dict.fromkeys([(wide, tree_size), (max_num_seqs, 1)]))
        """Sequences and nodes of each of the decode steps."""
        config = decoder.config
        tables = (batch * -(-nodes // block_size) for batch, nodes in self.steps)
        blocks = max(-(-max_prefill_tokens // block_size), *tables)
        self._pool = KVPool(
            num_layers=config.num_layers,
            num_blocks=blocks + 1,
            block_size=block_size,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=device,
        )

    def measure(self) -> int:
        """Bytes on CUDA: a prefill's transients and those of the larger decode step.

        The two are added, since a captured step keeps its transients while prompts are prefilled.
        """
        slots = self._slots()  # not counted here: see `engine.adjust.table_bytes`
        decode = [_peak(partial(self.decode, *step, slots), self._device) for step in self.steps]
        return _peak(partial(self.prefill, slots), self._device) + max(decode)

    def _slots(self) -> SamplingSlots:
        slots = SamplingSlots(
            max_num_seqs=self._max_num_seqs,
            vocab_size=self._decoder.config.vocab_size,
            eos_token_ids=(0,),
            device=self._device,
        )
        slots.allocate()
        return slots

    @torch.inference_mode()
    def prefill(self, slots: SamplingSlots | None = None) -> None:
        """As many tokens as a pass may have, and as many first tokens drawn as there may be sequences."""
        count, device = self.prefill_rows, self._device
        rows = torch.arange(count, device=device) + self._pool.block_size
        tables = torch.arange(1, -(-count // self._pool.block_size) + 1, device=device).unsqueeze(0)
        plan = AttentionInput(
            block_tables=tables,
            lengths=torch.zeros(1, dtype=torch.int64, device=device),
            rows=rows.unsqueeze(0),
            max_length=count,
        )
        self._attention.plan(plan, self._pool)
        # One prompt of any length stands for many, whose positions are in the table.
        positions = torch.arange(count, device=device) % len(self._decoder.rotary.cos)
        hidden = self._decoder(torch.zeros_like(positions), positions, self._attention)
        ends = min(count, self._max_num_seqs)
        # At least as many as prompt_logprobs takes at once.
        logits = self._decoder.logits(hidden[-max(MAX_TREE_NODES, ends) :])
        slots = self._slots() if slots is None else slots
        draw(logits[-ends:], slots.all_rows(torch.arange(ends, device=device)))

    @torch.inference_mode()
    def decode(self, batch: int, nodes: int, slots: SamplingSlots | None = None) -> None:
        """Draft, forward and draws over so many sequences and nodes of each."""
        block_size, device = self._pool.block_size, self._device
        per_sequence = -(-nodes // block_size)
        tables = torch.arange(1, batch * per_sequence + 1, device=device).view(batch, per_sequence)
        row = torch.arange(nodes, device=device)
        hidden = torch.zeros(batch, self._decoder.config.hidden_size, dtype=self._pool.dtype, device=device)
        if self._heads is not None and self._heads.tree.size > 1 and nodes > 1:
            root = torch.zeros(batch, dtype=torch.int64, device=device)
            self._heads.guess(root, hidden, self._heads.tree.size - 1)
        # A chain has the depth that no tree exceeds.
        topology = Tree(()).topology(device, nodes - 1).expand(batch)
        plan = AttentionInput(
            block_tables=tables,
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            rows=tables[:, row // block_size] * block_size + row % block_size,
            max_length=nodes,
            ancestors=topology.ancestors,
            depths=topology.depths,
        )
        self._attention.plan(plan, self._pool)
        tokens = torch.zeros(batch, nodes, dtype=torch.int64, device=device)
        states = self._decoder(tokens.flatten(), topology.depths.flatten(), self._attention)
        out = None
        if self._kernels:  # into a buffer of the model's dtype, as a captured step does
            shape = len(states), self._decoder.config.vocab_size
            out = torch.empty(shape, dtype=self._decoder.logits_dtype, device=device)
        logits = self._decoder.logits(states, out)
        slots = self._slots() if slots is None else slots
        ids = torch.arange(batch, device=device)
        if self._kernels:
            self._draw(ids, logits, tokens, topology, slots)
        else:
            verify_all(logits, tokens, topology, slots.all_rows(ids))

    def _draw(
        self, ids: Tensor, logits: Tensor, tokens: Tensor, topology: Topology, slots: SamplingSlots
    ) -> None:
        from engine.sampler_triton import TreeSampler  # Triton comes with CUDA builds of torch

        batch, rows = len(ids), tokens.numel()
        vocab = self._decoder.config.vocab_size
        sampler = TreeSampler(slots, max_batch=batch, max_rows=rows, vocab_size=vocab, device=self._device)
        planes = (tokens, topology.parents, topology.depths, topology.ancestors, topology.valid.long())
        sampler.draw(ids, logits, tokens, torch.stack(planes), topology.valid.contiguous())


def transient_bytes(
    config: EngineConfig,
    decoder: Decoder,
    attention: AttentionBackend,
    heads: HeadDrafter | None,
    tree_size: int,
    device: torch.device,
    kernels: bool,
) -> int:
    """Bytes that steps take on CUDA beside weights and K/V; see `WorstCase`.

    Args:
        kernels: Triton's can run.

    Raises:
        ConfigError: the weights leave too little memory.
    """
    try:
        worst = WorstCase(
            decoder,
            attention,
            heads,
            tree_size=tree_size,
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
            max_prefill_tokens=config.prefill_tokens(device.type),
            block_size=config.block_size,
            dtype=decoder.embed.dtype,
            device=device,
            kernels=kernels and not config.enforce_eager,
        )
        found = worst.measure()
        if not config.enforce_eager:
            # Captured steps keep logits from one half of a step to the other, and passes over prompts states.
            rows, states = config.max_step_tokens + config.max_num_seqs, config.prefill_tokens(device.type)
            found += rows * decoder.config.vocab_size * decoder.logits_dtype.itemsize
            found += states * decoder.config.hidden_size * decoder.embed.dtype.itemsize
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the model leaves no memory for a step of {config.max_step_tokens} tokens or for "
            f"{config.prefill_tokens(device.type)} of prompts; lower max_step_tokens, max_prefill_tokens or "
            "max_num_seqs, or use quantization"
        ) from error
    del worst
    torch.cuda.empty_cache()  # else the room would be counted as taken
    log.info("the largest steps take %d MiB beside weights and K/V", found >> 20)
    return found


def _peak(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes `work` took beyond what was taken before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
