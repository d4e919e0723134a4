"""What `info` says of a model, against transformers' own count and the memory the engine allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.adjust import table_bytes
from engine.errors import ModelError
from engine.model import info as module
from engine.model.info import describe
from tests.support import make_engine, save_model, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma3_text", {"tie_word_embeddings": True}),
        ("phi3", {"hidden_size": 64}),
        ("olmo2", {}),
        ("granite", {}),
    ],
)
def test_parameters_are_counted_as_transformers_does(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, **overrides)
    found = describe(save_model(model, tmp_path), CPU)
    assert found.parameters == model.num_parameters()
    assert found.architecture == type(model).__name__
    if family == "mistral":
        assert (found.window, found.num_windowed) == (32, 2)


def test_memory_is_what_the_engine_allocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("llama", max_position_embeddings=8192), tmp_path)
    engine = make_engine(tmp_path, kv_cache_tokens=256, max_model_len=64)
    pool = engine._runner._pool.data
    tokens = pool.shape[2] * pool.shape[3]
    whole = describe(tmp_path, CPU)
    full, half = whole.memory
    assert (full.dtype, half.dtype) == ("float32", "bfloat16")
    assert full.kv_bytes_per_token == 2 * half.kv_bytes_per_token == pool.numel() * 4 // tokens
    assert full.weight_bytes == 2 * half.weight_bytes == 4 * whole.parameters

    set_aside = 512 * 61 * 20 + table_bytes(32, 61)
    room = full.weight_bytes + set_aside + 3 * (2048 + 64) * full.kv_bytes_per_token
    monkeypatch.setattr(module, "available_bytes", lambda: room)
    assert describe(tmp_path, CPU).memory[0].fits == {2048: 3, 4096: 1, 8192: 0}


def test_no_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config"):
        describe(tmp_path, CPU)
