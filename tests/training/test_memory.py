"""What a training run is said to take, with a mixture of experts as its backbone."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.model.config import ModelConfig
from engine.model.weights import Checkpoint
from tests.support import save_model, tiny_model
from training.memory import MemoryPlan, plan

TOKENS, HIDDEN, WIDTH, CHOSEN, COUNT = 64, 32, 24, 6, 9


def planned(folder: Path, bits: int = 16) -> MemoryPlan:
    return plan(
        Checkpoint(folder),
        ModelConfig.from_folder(folder),
        device=torch.device("cpu"),
        dtype=torch.float32,
        bits=bits,
        needs_backbone=True,
        heads=1,
        layers=1,
        vocabulary=61,
        micro_tokens=TOKENS,
        pack_tokens=TOKENS,
        ema=False,
        teacher_online=False,
        cached_tokens=0,
        resident=False,
        top_k=1,
    )


def test_each_expert_of_a_token_takes_memory_and_none_is_quantised(tmp_path: Path) -> None:
    """transformers' experts are no linear layers, so bitsandbytes leaves them as they are."""
    experts = {"num_experts": COUNT, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": WIDTH}
    mixed = save_model(tiny_model("qwen3_moe", **experts), tmp_path / "mixed")
    dense = save_model(tiny_model("qwen3"), tmp_path / "dense")
    wanted = 2 * 4 * TOKENS * (CHOSEN * 2 * (WIDTH + HIDDEN) - 2 * 48)
    name = "backbone's activations"
    assert planned(mixed).parts[name] - planned(dense).parts[name] == wanted
    attention = 2 * (64 * HIDDEN + 2 * 32 * HIDDEN + 64 * HIDDEN)  # weights of two layers
    saved = attention * 4 - attention * 8 // 8 - attention // 16
    assert planned(mixed).parts["backbone"] - planned(mixed, 8).parts["backbone"] == saved
