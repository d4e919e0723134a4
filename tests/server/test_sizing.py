"""The sizing table's models have the parameters that their publishers count, and the shapes that we serve."""

from __future__ import annotations

import pytest

from engine.model.config import ModelConfig
from engine.model.info import count_active_parameters, count_parameters
from engine.model.weights import resolve_model
from server.sizing import USUAL_MODELS, model_config, table

PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Gemma 3 1B": 999_885_952,
    "Llama 3.2 1B": 1_235_814_400,
    "Phi-3 mini": 3_821_079_552,
    "Qwen2.5 7B": 7_615_616_512,
    "Mistral 7B v0.3": 7_248_023_552,
    "Llama 3.1 8B": 8_030_261_248,
    "Qwen3 8B": 8_190_735_360,
    "Llama 2 7B, Vicuna 7B": 6_738_415_616,
    "Llama 2 13B, Vicuna 13B": 13_015_864_320,
    "OLMoE 1B-7B": 6_919_161_856,
    "Qwen3 30B-A3B": 30_532_122_624,
    "gpt-oss 20B": 20_914_757_184,
    "gpt-oss 120B": 116_829_156_672,
    "Mixtral 8x7B": 46_702_792_704,
    "Llama 3.1 70B": 70_553_706_496,
}
"""Elements of all tensors in the published checkpoints. One wrong figure of a config gives another sum."""


ANNOUNCED = {
    "Qwen1.5 MoE A2.7B": (14.3, 2.7),
    "ERNIE 4.5 21B-A3B": (21, 3),
    "Hunyuan A13B": (80, 13),
    "GLM-4.5-Air": (106, 12),
}
"""Billions in all and for each token, of models whose tensors nobody has counted here."""


@pytest.mark.parametrize("name", ANNOUNCED)
def test_the_figures_give_what_was_announced(name: str) -> None:
    """The second number may leave out the embedding and the output layer, as GLM's does."""
    config, (whole, active) = model_config(name), ANNOUNCED[name]
    assert 0 <= count_parameters(config) / 1e9 - whole < 0.9
    found = count_active_parameters(config) / 1e9
    without = found - 2 * config.vocab_size * config.hidden_size / 1e9
    assert without - 0.3 < active < found + 0.3


@pytest.mark.parametrize("name", sorted(USUAL_MODELS.keys() - ANNOUNCED.keys()))
def test_the_figures_give_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(model_config(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("OLMoE 1B-7B", 1.3), ("Qwen3 30B-A3B", 3.3), ("Mixtral 8x7B", 12.9), ("Qwen3 8B", 8.2)],
)
def test_a_token_passes_through_as_many_as_is_published(name: str, billions: float) -> None:
    assert abs(count_active_parameters(model_config(name)) / 1e9 - billions) < 0.06


def test_the_embedded_models_figures_are_those_of_its_files() -> None:
    stated, served = model_config("SmolLM2-135M"), ModelConfig.from_folder(resolve_model("smollm2-135m"))
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    for field in (*fields, "head_dim", "tie_word_embeddings"):
        assert getattr(stated, field) == getattr(served, field)


def test_a_row_is_the_formula() -> None:
    """2 · 32 layers · 8 K/V heads · 128 · 2 bytes."""
    (row,) = [line for line in table().splitlines() if line.startswith("| Llama 3.1 8B ")]
    assert "| 15.0 GiB | 131,072 | 8,192 |" in row
    assert "| 29.9 GiB | 4,096 |" in row
