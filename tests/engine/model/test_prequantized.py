"""AWQ and GPTQ checkpoints against a plain packer, number by number, as the formats are described."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from engine.errors import ModelError, UnsupportedModelError, WeightsError
from engine.model.config import ModelConfig
from engine.model.weights import Checkpoint
from tests.engine.model.gguf_files import published
from tests.support import greedy, greedy_reference, make_engine, run_all, save_model, tiny_model

GROUP = 16
Tensors = dict[str, torch.Tensor]


def word(values: list[int], bits: int) -> int:
    """The values from the lowest bits of a word up, as a signed 32-bit integer."""
    total = sum(value << (bits * place) for place, value in enumerate(values))
    return total - (1 << 32) if total >= 1 << 31 else total


def words_along_rows(table: list[list[int]], bits: int, order: list[int] | None = None) -> torch.Tensor:
    size = 32 // bits
    places = order or list(range(size))
    return torch.tensor(
        [
            [word([row[start + place] for place in places], bits) for start in range(0, len(row), size)]
            for row in table
        ],
        dtype=torch.int32,
    )


def quantize(
    weight: torch.Tensor, bits: int, groups: list[int], *, symmetric: bool
) -> tuple[list[list[int]], list[list[int]], torch.Tensor, torch.Tensor]:
    """q [in][out], zeros [group][out], scales [group, out], and the weight [out, in] they stand for."""
    columns, most = weight.t(), (1 << bits) - 1
    scales = torch.zeros(max(groups) + 1, weight.shape[0], dtype=torch.float16)
    zeros = [[0] * weight.shape[0] for _ in range(len(scales))]
    q = [[0] * weight.shape[0] for _ in groups]
    restored = torch.zeros_like(columns)
    for group in range(len(scales)):
        rows = [row for row, owner in enumerate(groups) if owner == group]
        for out in range(weight.shape[0]):
            values = [float(columns[row, out]) for row in rows]
            low, high = min(*values, 0.0), max(*values, 0.0)
            if symmetric:
                high = max(high, -low)
                low = -high
            scales[group, out] = (high - low) / most
            scale = float(scales[group, out])
            zero = 1 << (bits - 1) if symmetric else min(most, round(-low / scale))
            zeros[group][out] = zero
            for row, value in zip(rows, values, strict=True):
                q[row][out] = max(0, min(most, round(value / scale) + zero))
                restored[row, out] = (q[row][out] - zero) * scale
    return q, zeros, scales, restored.t().contiguous()


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    groups = [row // GROUP for row in range(weight.shape[1])]
    q, zeros, scales, restored = quantize(weight, 4, groups, symmetric=False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    packed = {"qweight": words_along_rows(q, 4, order), "qzeros": words_along_rows(zeros, 4, order)}
    return packed | {"scales": scales}, restored


def gptq(
    weight: torch.Tensor, bits: int, *, symmetric: bool, act_order: bool, version: int, g_idx: bool = True
) -> tuple[Tensors, torch.Tensor]:
    groups = [row // GROUP for row in range(weight.shape[1])]
    if act_order:
        groups = [
            groups[row] for row in torch.randperm(len(groups), generator=torch.Generator().manual_seed(2))
        ]
    q, zeros, scales, restored = quantize(weight, bits, groups, symmetric=symmetric)
    if version == 1:
        zeros = [[(zero - 1) % (1 << bits) for zero in row] for row in zeros]
    columns = [list(column) for column in zip(*q, strict=True)]
    packed = {
        "qweight": words_along_rows(columns, bits).t().contiguous(),
        "qzeros": words_along_rows(zeros, bits),
        "scales": scales,
    }
    if g_idx:
        packed["g_idx"] = torch.tensor(groups, dtype=torch.int32)
    return packed, restored


def quantized_model(
    folder: Path, family: str, config: dict[str, Any], pack: Any, **overrides: Any
) -> PreTrainedModel:
    """A tiny model's folder with its layers' projections packed; returns it with what they stand for."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    model = tiny_model(family, **(shape | overrides))
    save_model(model, folder)
    tensors = load_file(folder / "model.safetensors")
    state = published(model)
    for theirs, own in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):  # Mixtral's experts
        for name in [name for name in state if f".{own}." in name]:
            stored = name.replace("mlp", "block_sparse_moe").replace(own, theirs)
            state[stored] = state[name]
    projections = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    for name in [name for name in tensors if ".layers.0." in name and name.endswith(projections)]:
        packed, restored = pack(tensors.pop(name))
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
        state[name].copy_(restored)
    save_file(tensors, folder / "model.safetensors")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | {"quantization_config": config}))
    return model


CASES = {
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, awq),
    **{
        f"gptq-{bits}-{kind}": (
            {"quant_method": "gptq", "bits": bits, "desc_act": order, "sym": symmetric, "group_size": GROUP},
            lambda weight, bits=bits, symmetric=symmetric, order=order: gptq(
                weight, bits, symmetric=symmetric, act_order=order, version=1
            ),
        )
        for bits, symmetric, order, kind in (
            (4, True, False, "symmetric"),
            (4, False, False, "asymmetric"),
            (4, False, True, "act-order"),
            (8, True, True, "act-order"),
            (2, False, False, "asymmetric"),
        )
    },
    "gptq-v2-without-g_idx": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda weight: gptq(weight, 4, symmetric=False, act_order=False, version=2, g_idx=False),
    ),
}


@pytest.mark.parametrize(("config", "pack"), CASES.values(), ids=CASES)
def test_a_quantised_model_computes_what_its_numbers_stand_for(
    tmp_path: Path, config: dict[str, Any], pack: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantized_model(tmp_path, "qwen2", config, pack)
    with caplog.at_level(logging.WARNING):
        checkpoint = Checkpoint(tmp_path)
    assert "dequantised at load" in caplog.text
    for name, wanted in model.state_dict().items():
        assert checkpoint.shape(name) == tuple(wanted.shape)
        torch.testing.assert_close(checkpoint.get(name).float(), wanted, atol=1e-6, rtol=1e-6)
    assert checkpoint.names == model.state_dict().keys()
    if config["quant_method"] == "awq" or config.get("desc_act"):
        outputs = run_all(make_engine(tmp_path), [greedy("r", [3, 14, 15], 8)])
        assert outputs["r", 0] == greedy_reference(model, [3, 14, 15], 8)


MIXTURES = {
    "awq-mixtral": ("awq", "mixtral", {"num_local_experts": 3}),
    "gptq-qwen3_moe": (
        "gptq-4-act-order",
        "qwen3_moe",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


@pytest.mark.parametrize(("kind", "family", "overrides"), MIXTURES.values(), ids=MIXTURES)
def test_experts_are_quantised_one_by_one(
    tmp_path: Path, kind: str, family: str, overrides: dict[str, Any]
) -> None:
    model = quantized_model(tmp_path, family, *CASES[kind], **overrides)
    held = load_file(tmp_path / "model.safetensors")
    assert sum(".layers.0." in name and name.endswith("qweight") for name in held) == 4 + 3 * 3
    checkpoint = Checkpoint(tmp_path)
    wanted = published(model)
    assert checkpoint.names == wanted.keys()
    for name, tensor in wanted.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        torch.testing.assert_close(checkpoint.get(name).float(), tensor, atol=1e-6, rtol=1e-6)
    outputs = run_all(make_engine(tmp_path), [greedy("r", [3, 14, 15], 8)])
    assert outputs["r", 0] == greedy_reference(model, [3, 14, 15], 8)


@pytest.mark.parametrize(("kind", "family"), [("awq", "glm4"), ("gptq-4-act-order", "glm")])
def test_rows_that_change_places_do_so_once_they_are_whole(tmp_path: Path, kind: str, family: str) -> None:
    """Of queries and keys, where a model rotates neighbouring channels."""
    model = quantized_model(tmp_path, family, *CASES[kind], attention_bias=True)
    outputs = run_all(make_engine(tmp_path), [greedy("r", [3, 14, 15], 8)])
    assert outputs["r", 0] == greedy_reference(model, [3, 14, 15], 8)


def test_experts_that_cannot_be_dequantised_are_named(tmp_path: Path) -> None:
    kind, family, overrides = MIXTURES["awq-mixtral"]
    quantized_model(tmp_path, family, *CASES[kind], **overrides)
    whole = load_file(tmp_path / "model.safetensors")
    expert = "model.layers.0.block_sparse_moe.experts.1.w3"

    def refusal(tensors: Tensors, message: str) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match=message):
            make_engine(tmp_path)

    refusal({name: whole[name] for name in whole if not name.startswith(expert)}, rf"1\): {expert}\.weight$")
    refusal({name: whole[name] for name in whole if name != f"{expert}.scales"}, rf"no {expert}\.scales")
    narrow = whole[f"{expert}.qweight"][:, :-1].clone()
    told = rf"1\): {expert}\.weight is \[56, 32\], not \[64, 32\]$"
    refusal(whole | {f"{expert}.qweight": narrow}, told)
    stacked = "model.layers.0.block_sparse_moe.input_linear.qweight"
    told = rf"{stacked} is \[3, 4, 4\], no matrix: experts have to be quantised one by one"
    refusal(whole | {stacked: torch.zeros(3, 4, 4, dtype=torch.int32)}, told)


def test_biases_of_zeros_that_a_quantiser_added_are_no_surprise(tmp_path: Path) -> None:
    config, pack = CASES["gptq-4-symmetric"]
    model = quantized_model(tmp_path, "llama", config, pack)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.bias"
    save_file(tensors | {name: torch.zeros(32, dtype=torch.float16)}, tmp_path / "model.safetensors")
    outputs = run_all(make_engine(tmp_path), [greedy("r", [3, 14, 15], 8)])
    assert outputs["r", 0] == greedy_reference(model, [3, 14, 15], 8)
    save_file(tensors | {name: torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"unexpected \(1\): {name}"):
        make_engine(tmp_path)


def test_the_older_file_of_settings_is_read(tmp_path: Path) -> None:
    config, pack = CASES["gptq-4-asymmetric"]
    model = quantized_model(tmp_path, "llama", config, pack)
    stated = json.loads((tmp_path / "config.json").read_text())
    del stated["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(stated))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP, "sym": False}))
    wanted = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    found = Checkpoint(tmp_path).get("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"quantize_config\.json"):
        Checkpoint(tmp_path)


def test_a_missing_or_misshapen_part_is_named(tmp_path: Path) -> None:
    config, pack = CASES["gptq-4-symmetric"]
    quantized_model(tmp_path, "llama", config, pack)
    whole = load_file(tmp_path / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"

    def broken(**parts: torch.Tensor | None) -> Checkpoint:
        changed = whole | {f"{module}.{part}": tensor for part, tensor in parts.items()}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path)

    with pytest.raises(WeightsError, match=rf"no {module}\.scales"):
        broken(scales=None).get(f"{module}.weight")
    with pytest.raises(WeightsError, match=rf"{module}: qweight, qzeros and scales do not fit"):
        broken(scales=torch.ones(2, 63)).get(f"{module}.weight")
    with pytest.raises(WeightsError, match=rf"{module}\.g_idx"):
        broken(g_idx=torch.full((32,), 2, dtype=torch.int32)).get(f"{module}.weight")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"awq \(gemv, 4 bits\)"),
        ({"quant_method": "gptq", "bits": 3}, r"gptq \(gptq, 3 bits\)"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"gptq \(marlin, 4 bits\)"),
        (
            {
                "quant_method": "gptq",
                "bits": 4,
                "dynamic": {"-:.*gate.*": {"bits": 2}, "+:.*w1": {"bits": 8}},
            },
            r"gptq \(gptq, 4 and 8 bits\)",
        ),
        ({"bits": 4}, "of no stated method"),
    ],
    ids=str,
)
def test_other_formats_are_refused_by_name(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    save_model(tiny_model("llama"), tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"quantization_config": config}))
    for read in (ModelConfig.from_folder, Checkpoint):
        with pytest.raises(UnsupportedModelError, match=f"{name} are not supported; supported are awq"):
            read(tmp_path)
