"""Raw log-probabilities of tokens: before penalties, bias, temperature and truncation."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.types import TokenLogprobs

__all__ = ["token_logprobs"]

_ROWS = 64
"""Rows worked on at a time; a row of float32 logits is 200 kB for a vocabulary of 49k."""


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> list[TokenLogprobs]:
    """What the model's own distribution says about one token per row.

    Args:
        logits: [R, vocab] of any floating type.
        tokens: [R] int64.
        num_top: best tokens reported beside it.

    Returns:
        One entry per row.
    """
    found: list[TokenLogprobs] = []
    for part, chosen in zip(torch.split(logits, _ROWS), torch.split(tokens, _ROWS), strict=True):
        logprobs = part.float().log_softmax(-1)
        own = logprobs.gather(1, chosen.unsqueeze(1))
        rank = (logprobs > own).sum(1) + 1
        top = logprobs.topk(num_top, dim=1) if num_top else None
        values = top.values.tolist() if top is not None else [[]] * len(part)
        indices = top.indices.tolist() if top is not None else [[]] * len(part)
        rows = zip(chosen.tolist(), own.squeeze(1).tolist(), rank.tolist(), indices, values, strict=True)
        found += [
            TokenLogprobs(token, logprob, place, tuple(zip(ids, best, strict=True)))
            for token, logprob, place, ids, best in rows
        ]
    return found
