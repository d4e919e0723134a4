"""MXFP4 against the libraries that published checkpoints and GGUF files are read by, number by number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.errors import UnsupportedModelError, WeightsError
from engine.model import mxfp4
from engine.model.config import ModelConfig
from engine.model.experts_config import Clamp, ExpertsConfig
from engine.model.info import count_parameters, weight_bytes
from engine.model.weights import Checkpoint
from tests.engine.model.mxfp4_files import published, restate
from tests.engine.model.test_quantize import needs_int8
from tests.support import greedy, greedy_reference, make_engine, run_all, save_model, tiny_model

LAYER = "model.layers.1.mlp.experts."
BLOCKS, SCALES = (f"{LAYER}gate_up_proj_{part}" for part in ("blocks", "scales"))


def some_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def test_numbers_are_those_of_transformers_and_exact_in_16_bits() -> None:
    blocks, scales = some_bytes(40, 3, 16), some_bytes(40, 3, low=0, high=255)
    scales[0] = torch.tensor([0, 1, 254])
    found = mxfp4.dequantized(mxfp4.from_checkpoint(blocks), scales)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].t()
        assert torch.equal(found.to(dtype), wanted)
        assert torch.equal(found, wanted.float())
    scales[7, 1] = 255
    found = mxfp4.dequantized(mxfp4.from_checkpoint(blocks), scales)
    assert found.isnan().nonzero().tolist() == [[7, column] for column in range(32, 64)]


def test_numbers_are_those_of_gguf() -> None:
    rows = some_bytes(24, 4 * 17)
    rows[:, ::17] = some_bytes(24, 4, low=0, high=255)
    wanted = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(mxfp4.dequantized(*mxfp4.from_gguf(rows)), torch.from_numpy(wanted))


@pytest.mark.parametrize("size", [64, 192, 256])
def test_for_the_kernels_a_byte_has_both_halves_and_a_word_two_scales_of_each(size: int) -> None:
    codes, scales = some_bytes(3, size, high=16), some_bytes(3, size // 32, high=129)
    packed, words = mxfp4.packed_codes(codes), mxfp4.packed_scales(scales, "x")
    assert (packed.dtype, words.dtype) == (torch.uint8, torch.int32)
    assert torch.equal(torch.cat((packed & 15, packed >> 4), 1), codes)
    assert words.shape == (mxfp4.words(size), 3)
    of_half = size // 64
    for block in range(of_half):
        word, place = words[block // 2], block % 2 * 8
        assert torch.equal(word >> place & 255, scales[:, block].int())
        assert torch.equal(word >> 16 + place & 255, scales[:, of_half + block].int())


def test_scales_that_kernels_cannot_have_are_refused() -> None:
    scales = torch.full((4, 2), 128, dtype=torch.uint8)
    mxfp4.packed_scales(scales, "x")
    for value, told in ((129, r"2 \*\* 2"), (255, "NaN")):
        scales[2, 1] = value
        with pytest.raises(WeightsError, match=rf"a scale in x is {told}: the checkpoint is damaged"):
            mxfp4.packed_scales(scales, "x")


def test_both_forms_of_gpt_oss_are_read(tmp_path: Path) -> None:
    """As transformers saves it, inputs before outputs, and as published, in 4 bits; gates and ups in turn."""
    model = published(tmp_path / "four")
    save_model(model, tmp_path / "whole")  # with the weights that the other stands for
    whole, four = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "four")
    experts = model.model.layers[1].mlp.experts
    gates, ups = experts.gate_up_proj[3].t()[0::2], experts.gate_up_proj[3].t()[1::2]
    assert whole.names == four.names
    for name in whole.names:
        assert torch.equal(whole.get(name), four.get(name)), name
        assert whole.shape(name) == four.shape(name) == tuple(whole.get(name).shape)
    for part, values in (("gate", gates), ("up", ups), ("down", experts.down_proj[3].t())):
        assert torch.equal(four.get(f"{LAYER}3.{part}_proj.weight"), values)
    assert torch.equal(four.get(f"{LAYER}3.up_proj.bias"), experts.gate_up_proj_bias[3, 1::2])
    packed = Checkpoint(tmp_path / "four", mxfp4=True)
    for part in ("gate", "down"):
        codes, scales = (f"{LAYER}3.{part}_proj.{kind}" for kind in ("blocks", "scales"))
        assert f"{LAYER}3.{part}_proj.weight" not in packed.names
        for name in (codes, scales):
            assert packed.shape(name) == tuple(packed.get(name).shape)
    assert ModelConfig.from_folder(tmp_path / "whole").experts.mxfp4 is False
    texts = {}
    for form in ("whole", "four"):
        engine = make_engine(tmp_path / form)
        texts[form] = run_all(engine, [greedy("r", [3, 14, 15], 8, ignore_eos=True)])["r", 0]
    assert texts["four"] == texts["whole"] == greedy_reference(model, [3, 14, 15], 8)


@needs_int8
def test_in_int8_it_is_read_as_in_full(tmp_path: Path) -> None:
    model = published(tmp_path / "four")
    save_model(model, tmp_path / "whole")
    texts = [
        run_all(
            make_engine(tmp_path / form, quantization="int8"), [greedy("r", [3, 14], 8, ignore_eos=True)]
        )["r", 0]
        for form in ("whole", "four")
    ]
    assert texts[0] == texts[1]


def test_what_a_config_says_of_it(tmp_path: Path) -> None:
    published(tmp_path)
    restate(tmp_path, dtype=None)
    config = ModelConfig.from_folder(tmp_path)
    assert config.dtype == torch.bfloat16
    assert config.experts is not None
    assert config.experts.mxfp4
    assert config.experts.clamp == (1.5, 1.702)
    restate(tmp_path, intermediate_size=160)  # of which half is no whole number of blocks
    found = ModelConfig.from_folder(tmp_path).experts
    assert found is not None
    assert not found.mxfp4
    tiny = save_model(tiny_model("llama"), tmp_path / "llama")
    restate(tiny, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UnsupportedModelError, match="in mxfp4 are supported of mixtures of experts only"):
        ModelConfig.from_folder(tiny)


def test_the_published_config_is_what_it_was_made_of(tmp_path: Path) -> None:
    """gpt-oss-20b's, which names its rotation as older releases of transformers did, and no dtype."""
    stated = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    config = ModelConfig.from_folder(tmp_path)
    assert config.windows == (128, None) * 12
    assert config.sinks
    assert config.qkv_bias
    assert config.output_bias
    assert config.experts == ExpertsConfig(32, 4, 2880, True, (True,) * 24, True, Clamp(7.0, 1.702), True)
    assert count_parameters(config) == 20_914_757_184
    assert weight_bytes(config, torch.bfloat16, torch.device("cuda")) == 13_774_535_808
    # YaRN by its paper (arXiv 2309.00071), between bounds that are no whole numbers.
    low, high = (32 * math.log(4096 / (turns * 2 * math.pi)) / math.log(150000) for turns in (32, 1))
    plain = 150000 ** -(torch.arange(32, dtype=torch.float64) / 32)
    ramp = ((torch.arange(32) - low) / (high - low)).clamp(0, 1)
    wanted = plain / 32 * ramp + plain * (1 - ramp)
    torch.testing.assert_close(config.rope.inv_freq.double(), wanted, rtol=1e-5, atol=0)
    assert config.rope.scale == pytest.approx(0.1 * math.log(32) + 1)


def test_blocks_without_scales_that_fit_are_refused(tmp_path: Path) -> None:
    published(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")

    def refusal(**changed: torch.Tensor | None) -> str:
        named = {f"{LAYER}gate_up_proj_{part}": tensor for part, tensor in changed.items()}
        mixed = {name: tensor for name, tensor in (tensors | named).items() if tensor is not None}
        save_file(mixed, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError) as refused:
            make_engine(tmp_path)
        return str(refused.value).partition("do not fit the model. ")[2] or str(refused.value)

    blocks, scales = tensors[BLOCKS], tensors[SCALES]
    assert refusal(scales=None) == f"the checkpoint holds {BLOCKS} but no {SCALES}"
    short = scales[:, :, :1].clone()
    assert f"{BLOCKS} [5, 256, 2, 16] and {SCALES} [5, 256, 1] are no weights in MXFP4" in refusal(
        scales=short
    )
    assert "are no weights in MXFP4" in refusal(blocks=blocks.flatten(2))
    assert refusal(blocks=blocks.float()) == f"{BLOCKS} is torch.float32, and MXFP4 is bytes"
    fewer = {"blocks": blocks[:, :, :1].clone(), "scales": short}
    told = ", ".join(f"{BLOCKS}[{expert}] is [128, 32], not [128, 64]" for expert in range(5))
    assert refusal(**fewer) == f"of another shape (5): {told}"
    odd = tensors[f"{LAYER}gate_up_proj_bias"][:, :-1].clone()  # gates and ups cannot be told apart
    assert "unexpected (1): model.layers.1.mlp.experts.gate_up_proj_bias" in refusal(bias=odd)
    missing = ", ".join(f"{BLOCKS}[{expert}]" for expert in range(5))
    assert refusal(blocks=None) == f"missing (5): {missing}. unexpected (1): {SCALES}"
    biases = ", ".join(f"{LAYER}gate_up_proj_bias[{expert}]" for expert in range(5))
    assert refusal(bias=None) == f"missing (5): {biases}"
