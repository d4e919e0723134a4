"""The decoder with attention sinks against transformers, and what counts and loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.attention.cpu import CpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.errors import WeightsError
from engine.model.info import describe
from tests.engine.model.test_decoder import check_against_transformers
from tests.engine.sinks import model_with_sinks
from tests.support import make_engine, save_model, tiny_model


@pytest.mark.parametrize("backend", [CpuAttention, SdpaAttention])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma3_text", {"sliding_window": 21, "sliding_window_pattern": 2}),
        ("qwen2", {"num_attention_heads": 8}),
    ],
    ids=["windows", "full"],
)
def test_prompts_and_every_tree_path_agree(
    backend: type[CpuAttention] | type[SdpaAttention],
    family: str,
    overrides: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_with_sinks(family, monkeypatch, **overrides)
    check_against_transformers(model, backend, tmp_path, prompts=(23, 300, 58))


def test_sinks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_sinks("qwen2", monkeypatch)
    assert describe(save_model(model, tmp_path), torch.device("cpu")).parameters == model.num_parameters()


def test_a_checkpoint_without_them_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_with_sinks("qwen2", monkeypatch)
    save_model(tiny_model("qwen2"), tmp_path)
    with pytest.raises(WeightsError, match=r"missing \(2\): model.layers.0.self_attn.sinks"):
        make_engine(tmp_path)
