"""A tiny model, its own greedy answers as training rows, and a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.config import TrainConfig
from training.data import Row, write_shard

torch.set_num_threads(1)


def random_rows(count: int, vocab: int, *, seed: int = 0, prompt: int = 5, answer: int = 24) -> list[Row]:
    """Rows in which each token follows from the one before: heads can learn them."""
    rng = np.random.default_rng(seed)
    step = np.random.default_rng(99).permutation(vocab)
    rows = []
    for index in range(count):
        tokens = [int(rng.integers(vocab))]
        length = prompt + answer - int(rng.integers(4))
        while len(tokens) < length:
            tokens.append(int(step[tokens[-1]]))
        conversation = int(rng.integers(1 << 62)) * 10_000 + (7 if index % 4 == 0 else 9_000)
        conversation %= 1 << 63
        conversation -= conversation % 10_000 - (7 if index % 4 == 0 else 9_000)  # every fourth is held out
        rows.append(Row(conversation, 0, 0, 0.0, np.array(tokens[:prompt]), np.array(tokens[prompt:])))
    return rows


def write_rows(folder: Path, rows: list[Row], vocab: int) -> Path:
    write_shard(folder / "a.tokens.xz", rows, vocab_size=vocab)
    return folder


def train_config(model: Path, data: Path, output: Path, **values: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "heads": 3,
        "layers": 1,
        "vocabulary": "full",
        "batch_tokens": 64,
        "micro_tokens": 64,
        "epochs": 8,
        "warmup_steps": 4,
        "eval_every": 10,
        "checkpoint_every": 5,
        "held_out": 0.05,
        "lr": 3e-2,
        "ema": 0.9,
        "device": "cpu",
    }
    return TrainConfig(model=str(model), data=(data,), output=output, **(settings | values))
