"""Memory beside weights and K/V: the largest passes are run once, before the pool is sized."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.attention.base import AttentionBackend, AttentionInput
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import Tree
from engine.model.decoder import Decoder
from engine.sampler import verify_all
from engine.sampling_slots import SamplingSlots

__all__ = ["WorstCase"]


class WorstCase:
    """The largest prefill chunk and the largest decode step of these settings, on a pool of their own.

    The decode step drafts, runs the model over all nodes of all sequences, and draws at each with everything
    on that a request may ask for. The K/V behind the new rows are short: a backend that copies the whole
    prefix (the reference one) takes more with longer ones.

    Args:
        decoder: ready to run.
        attention: its backend.
        heads: the heads' branch; None without.
        tree_size: most nodes of a sequence, root counted.
        max_num_seqs: slots.
        max_step_tokens: bound on the rows of a pass.
        block_size: tokens per K/V block.
        dtype: of K/V.
        device: where everything is.
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
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._decoder, self._attention, self._heads = decoder, attention, heads
        self._device, self._max_num_seqs = device, max_num_seqs
        self.prefill_rows = max_step_tokens
        self.nodes = tree_size
        self.sequences = max(1, min(max_num_seqs, max_step_tokens // tree_size))
        config = decoder.config
        blocks = max(-(-max_step_tokens // block_size), self.sequences * -(-MAX_TREE_NODES // block_size))
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
        """Bytes on CUDA: a prefill's transients and a decode step's.

        The two are added, since a captured step keeps its transients while prompts are prefilled.
        """
        slots = self._slots()  # not counted here: see `engine.adjust.table_bytes`
        return _peak(self.prefill, self._device) + _peak(lambda: self.decode(slots), self._device)

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
    def prefill(self) -> None:
        """A chunk of as many tokens as a pass may have."""
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
        positions = torch.arange(count, device=device)
        hidden = self._decoder(torch.zeros_like(positions), positions, self._attention)
        self._decoder.logits(hidden[-MAX_TREE_NODES:])  # as many as prompt_logprobs takes at once

    @torch.inference_mode()
    def decode(self, slots: SamplingSlots | None = None) -> None:
        """Draft, forward and draws over as many sequences and nodes as a pass may have."""
        batch, nodes, device = self.sequences, self.nodes, self._device
        block_size = self._pool.block_size
        per_sequence = -(-MAX_TREE_NODES // block_size)
        tables = torch.arange(1, batch * per_sequence + 1, device=device).view(batch, per_sequence)
        row = torch.arange(nodes, device=device)
        hidden = torch.zeros(batch, self._decoder.config.hidden_size, dtype=self._pool.dtype, device=device)
        if self._heads is not None and self._heads.tree.size > 1:
            self._heads.guess(hidden, self._heads.tree.size - 1)
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
        logits = self._decoder.logits(states)
        slots = self._slots() if slots is None else slots
        verify_all(logits, tokens, topology, slots.all_rows(torch.arange(batch, device=device)))


def _peak(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes `work` took beyond what was taken before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
