"""The tokens that draft heads choose from: the most frequent ones in the model's own answers.

The heads share the base model's lm_head, so leaving out its rare rows loses the guesses that would have been
those tokens and nothing else. For a small model with a large vocabulary it saves most of the heads' work,
in training and at every step of serving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Vocabulary"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A subset of the model's tokens.

    Args:
        token_map: [V] int64, rising token ids; None for all tokens.
        size: of the model's whole vocabulary.
        coverage: share of the counted tokens that are in the subset.
    """

    token_map: Tensor | None
    size: int
    coverage: float = 1.0

    @classmethod
    def most_frequent(
        cls, answers: NDArray[np.int64], others: NDArray[np.int64], count: int | None, size: int
    ) -> Vocabulary:
        """The `count` most frequent tokens of the answers.

        Where the answers hold fewer, `others` fill up, then low ids (common pieces of byte-pair encoding).

        Args:
            answers: [N], all tokens of all answers.
            others: [M], tokens that are likely too.
            count: tokens to keep; None, or as many as there are, keeps all.
            size: of the whole vocabulary.
        """
        if count is None or count >= size:
            return cls(None, size)
        counts = np.bincount(answers, minlength=size)
        weight = counts.astype(np.float64)
        weight[others] += 0.5
        chosen = np.sort(np.argsort(-weight, kind="stable")[:count])
        return cls(torch.from_numpy(chosen), size, float(counts[chosen].sum() / max(1, counts.sum())))

    def __len__(self) -> int:
        return self.size if self.token_map is None else len(self.token_map)

    def rows(self, device: torch.device) -> Tensor:
        """[size] int64 on `device`: the row of each token in the subset, -1 where it is not in it."""
        if self.token_map is None:
            return torch.arange(self.size, device=device)
        found = torch.full((self.size,), -1, dtype=torch.int64)
        found[self.token_map] = torch.arange(len(self.token_map))
        return found.to(device)
