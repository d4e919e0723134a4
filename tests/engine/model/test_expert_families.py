"""Families of mixtures: what their checkpoints hold besides, and what of their configs is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import UnsupportedModelError, WeightsError
from engine.model.config import ModelConfig
from tests.engine.model.test_experts import config_of
from tests.support import greedy, greedy_reference, make_engine, run_all, save_model, tiny_model


@pytest.mark.parametrize("family", ["ernie4_5_moe", "glm4_moe"])
def test_layers_that_guess_further_ahead_are_not_read(family: str, tmp_path: Path) -> None:
    """As the published checkpoints hold them: GLM's counted on behind the last layer, ERNIE's by names."""
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_routed_experts": 4, "moe_k": 2}
    model = tiny_model(family, moe_num_experts=4, **sizes)
    config = ModelConfig.from_folder(save_model(model, tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    mtp = {
        "ernie4_5_moe": ("model.mtp_block.0.mlp.gate_proj.weight", "model.mtp_emb_norm.0.weight"),
        "glm4_moe": ("model.layers.2.mlp.experts.0.gate_proj.weight", "model.layers.2.eh_proj.weight"),
    }[family]
    save_file(tensors | {name: torch.zeros(3) for name in mtp}, tmp_path / "model.safetensors")
    prompt = [3, 14, 15]
    outputs = run_all(make_engine(tmp_path), [greedy("r", prompt, 4, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(model, prompt, 4)
    stray = "model.layers.3.mlp.gate.weight"
    assert not stray.startswith(config.unread)
    save_file(tensors | {stray: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"unexpected \(1\): {stray}"):
        make_engine(tmp_path)


def test_layers_that_differ_in_what_a_number_says_are_refused() -> None:
    config = config_of("hunyuan_v1_moe", num_experts=4, moe_topk=[2, 2])
    found = ModelConfig.from_hf(config).experts
    assert found is not None
    assert found.chosen == 2
    config.moe_topk = [2, 3]
    with pytest.raises(UnsupportedModelError, match=r"differ in moe_topk are not supported: \[2, 3\]"):
        ModelConfig.from_hf(config)


def test_a_config_need_not_say_how_wide_an_mlp_is_that_no_layer_has() -> None:
    config = config_of("solar_open", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    del config.intermediate_size
    assert ModelConfig.from_hf(config).intermediate_size == 24


def test_what_of_ernies_config_is_not_covered_is_refused() -> None:
    config = config_of("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=24)
    assert ModelConfig.from_hf(config).experts is not None
    config.moe_layer_interval = 0
    with pytest.raises(UnsupportedModelError, match="moe_layer_interval is 0; it must be 1 or more"):
        ModelConfig.from_hf(config)
    config.moe_layer_interval, config.use_bias = 1, True
    with pytest.raises(UnsupportedModelError, match="use_bias, which is of lm_head too"):
        ModelConfig.from_hf(config)
