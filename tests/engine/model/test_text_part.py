"""Gemma 3 and Mistral 3 with a vision model beside them: the text part is that model, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from engine.errors import UnsupportedModelError, WeightsError
from engine.model.config import ModelConfig
from engine.model.info import describe
from engine.model.weights import Checkpoint
from tests.engine.model.test_prequantized import awq
from tests.support import greedy, greedy_reference, make_engine, run_all, save_model, save_random_heads

TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "sliding_window": 21,
    "sliding_window_pattern": 3,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PROMPTS = [[5, 9, 2, 44], list(range(1, 60))]


def gemma(*, tied: bool = True) -> Gemma3ForConditionalGeneration:
    torch.manual_seed(11)
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
        tie_word_embeddings=tied,
        architectures=["Gemma3ForConditionalGeneration"],
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def mistral(text: str) -> Mistral3ForConditionalGeneration:
    """With a text part of type `mistral` (Small 3.1) or `ministral3`."""
    torch.manual_seed(11)
    own = {"sliding_window": None, "tie_word_embeddings": False}
    config = Mistral3Config(
        text_config={"model_type": text, **TEXT, **own},
        vision_config={"model_type": "pixtral", **VISION},
        image_token_index=60,
        tie_word_embeddings=False,
        architectures=["Mistral3ForConditionalGeneration"],
    )
    return Mistral3ForConditionalGeneration(config).eval()


def save(model: PreTrainedModel, folder: Path, names: str = "published") -> Path:
    model.config.vocab_size = TEXT["vocab_size"]  # for the tokenizer that is written beside it
    save_model(model, folder)
    stored = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in stored)
    if names == "in memory":
        save_file(dict(model.state_dict()), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("names", "tied"), [("published", True), ("published", False), ("in memory", False)])
def test_the_text_part_decodes_as_in_transformers(tmp_path: Path, names: str, tied: bool) -> None:
    model = gemma(tied=tied)
    folder = save(model, tmp_path / "model", names)
    heads = save_random_heads(tmp_path / "heads.safetensors", hidden=32, vocab=61)
    engine = make_engine(folder, heads=str(heads), tree=12)
    assert engine.info.architecture == "Gemma3ForConditionalGeneration"
    outputs = run_all(engine, [greedy(f"r{i}", prompt, 24) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        assert outputs[f"r{i}", 0] == greedy_reference(model, prompt, 24)


@pytest.mark.parametrize(("names", "text"), [("published", "mistral"), ("in memory", "ministral3")])
def test_mistral_3s_does_too(tmp_path: Path, names: str, text: str) -> None:
    model = mistral(text)
    engine = make_engine(save(model, tmp_path, names), tree=12)
    assert engine.info.architecture == "Mistral3ForConditionalGeneration"
    outputs = run_all(engine, [greedy(f"r{i}", prompt, 24) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        assert outputs[f"r{i}", 0] == greedy_reference(model, prompt, 24)


def test_a_mistral_3_with_another_text_part_is_refused(tmp_path: Path) -> None:
    model = mistral("mistral")
    model.config.text_config = LlamaConfig(**TEXT)
    with pytest.raises(UnsupportedModelError, match="text part of type 'llama'"):
        ModelConfig.from_hf(model.config)


def test_only_tensors_for_images_may_be_there_beside_the_text(tmp_path: Path) -> None:
    folder = save(gemma(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    assert "model.embed_tokens.weight" in checkpoint.names
    assert not any("vision" in name or "projector" in name for name in checkpoint.names)
    save_file(tensors | {"audio_tower.conv.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected \(1\): audio_tower\.conv\.weight"):
        make_engine(folder)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing \(1\): model\.layers\.1\.mlp\.up_proj\.weight"):
        make_engine(folder)


def test_its_shape_is_the_text_configs_and_its_dtype_the_whole_ones(tmp_path: Path) -> None:
    folder = save(gemma(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = "bfloat16"
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    found = ModelConfig.from_folder(folder)
    assert (found.hidden_size, found.num_layers, found.windows) == (32, 3, (21, 21, None))
    assert found.dtype == torch.bfloat16
    assert describe(folder, torch.device("cpu")).num_windowed == 2


def test_a_quantised_one_is_dequantised_under_its_own_names(tmp_path: Path) -> None:
    model = gemma()
    folder = save(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    restored = {}
    for name in [name for name in tensors if name.endswith("_proj.weight") and "language" in name]:
        module = name.removesuffix(".weight")
        packed, restored[name] = awq(tensors.pop(name))
        tensors |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in restored.items():
            parameters[name.replace("language_model.model.", "model.language_model.")].copy_(weight)
    outputs = run_all(make_engine(folder), [greedy("r", PROMPTS[1], 16)])
    assert outputs["r", 0] == greedy_reference(model, PROMPTS[1], 16)
