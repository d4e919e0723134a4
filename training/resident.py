"""What the frozen model says of every answer token, kept on the device that trains, for one run.

A GPU's memory holds the hidden states of tens of millions of tokens of a small model. Steps then take a few
milliseconds, in which neither a disk nor a copy from the CPU's memory has a place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.backbone import Backbone, packs
from training.data import Row
from training.hidden import AnswerStates, Batch, row_keys

__all__ = ["ResidentCache", "keep_hidden"]


@dataclass(frozen=True, slots=True)
class ResidentCache:
    """As `training.hidden.HiddenCache`; what training reads is on the device.

    Args:
        hidden: [N, hidden] of 16 bits, the state after the final norm that chose each token.
        tokens: [N] int64.
        end_of: [N] int64, `ends` there.
        top_ids: [N, top_k] int32, the model's best tokens.
        top_log_p: [N, top_k] float16, their log-probabilities.
        ends: [N] int64, one past the last token of the answer that each belongs to.
        row_of: [N] int64, the row that each token comes from.
        keys: [R] uint64, `row_key` of each row.
    """

    hidden: Tensor
    tokens: Tensor
    end_of: Tensor
    top_ids: Tensor
    top_log_p: Tensor
    ends: NDArray[np.int64]
    row_of: NDArray[np.int64]
    keys: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def select(self, rows: Sequence[Row]) -> NDArray[np.bool_]:
        """[R] bool: which of the cache's rows are among these."""
        found: NDArray[np.bool_] = np.isin(self.keys, row_keys(rows))
        return found

    def gather(self, positions: NDArray[np.int64], num_heads: int, teacher: bool) -> Batch:
        """The batch of these positions, on the device."""
        return self.gather_there(torch.from_numpy(positions).to(self.device), num_heads, teacher)

    def gather_there(self, positions: Tensor, num_heads: int, teacher: bool) -> Batch:
        """The same for positions [T] int64 that are on the device: nothing waits for it."""
        ahead = positions + torch.arange(1, num_heads + 1, device=self.device).unsqueeze(1)
        known = ahead < self.end_of[positions]
        ahead = torch.where(known, ahead, 0)
        return Batch(
            hidden=self.hidden[positions],
            before=self.tokens[positions],
            targets=torch.where(known, self.tokens[ahead], -1),
            teacher_ids=self.top_ids[ahead].long() if teacher else None,
            teacher_log_p=self.top_log_p[ahead].float() if teacher else None,
        )


def keep_hidden(
    rows: Sequence[Row],
    *,
    top_k: int,
    backbone: Backbone,
    lm_head: Tensor,
    pack_tokens: int,
    until: float = math.inf,
) -> ResidentCache:
    """Compute the states of these rows and leave them on the backbone's device.

    Args:
        top_k: best tokens kept per position.
        lm_head: [vocab, hidden], the model's whole one.
        pack_tokens: tokens of a pass.
        until: `time.monotonic()` after which no pass begins; rows that come later are left out.
    """
    device = backbone.device
    weight = lm_head.to(device=device, dtype=backbone.dtype)
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    answers = np.array([len(row.answer) for row in rows], dtype=np.int64)
    total, width = int(answers.sum()), weight.shape[1]
    kind = backbone.dtype if backbone.dtype.itemsize == 2 else torch.float16
    hidden = torch.empty(total, width, dtype=kind, device=device)
    top_ids = torch.empty(total, top_k, dtype=torch.int32, device=device)
    top_log_p = torch.empty(total, top_k, dtype=torch.float16, device=device)
    done, count = 0, 0
    with tqdm(total=sum(lengths), desc="hidden states", unit="tok", disable=None) as bar:
        for pack in packs(lengths, pack_tokens):
            if time.monotonic() >= until:
                break
            states = AnswerStates.of([rows[i] for i in pack], backbone, weight, top_k)
            here = slice(done, done + len(states.hidden))
            hidden[here], top_ids[here], top_log_p[here] = states.hidden, states.ids, states.log_p
            done, count = here.stop, count + len(pack)
            bar.update(sum(lengths[i] for i in pack))
    rows, answers = rows[:count], answers[:count]
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *(row.answer for row in rows)])
    ends = np.repeat(np.cumsum(answers), answers)
    return ResidentCache(
        hidden=hidden[:done],
        tokens=torch.from_numpy(tokens).to(device),
        end_of=torch.from_numpy(ends).to(device),
        top_ids=top_ids[:done],
        top_log_p=top_log_p[:done],
        ends=ends,
        row_of=np.repeat(np.arange(count), answers),
        keys=row_keys(rows),
    )
