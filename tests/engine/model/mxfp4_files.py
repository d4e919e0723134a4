"""Tiny models of gpt-oss as they are published, their experts in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support import save_model, tiny_model

GPT_OSS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 30,
    "swiglu_limit": 1.5,
}


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, size] as codes [rows, size], scales [rows, size / 32], and what they stand for."""
    packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)
    restored = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.MXFP4))
    blocks = torch.from_numpy(np.ascontiguousarray(packed)).view(len(weight), -1, 17)
    codes = torch.cat((blocks[:, :, 1:] & 15, blocks[:, :, 1:] >> 4), dim=2)
    return codes.flatten(1), blocks[:, :, 0].contiguous(), restored


def published(folder: Path, **overrides: Any) -> Any:
    """A folder with the model, which is returned with the weights that the file stands for."""
    model = tiny_model("gpt_oss", **(GPT_OSS | overrides))
    model.config.architectures = ["GptOssForCausalLM"]
    save_model(model, folder)
    tensors = load_file(folder / "model.safetensors")
    state = model.state_dict()
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        whole = tensors.pop(name).transpose(1, 2)  # [experts, outputs, inputs]
        codes, scales, restored = quantized(whole.reshape(-1, whole.shape[2]).contiguous())
        pairs = codes.view(*whole.shape[:2], -1, 16, 2)
        tensors[f"{name}_blocks"] = pairs[..., 0] | pairs[..., 1] << 4
        tensors[f"{name}_scales"] = scales.view(*whole.shape[:2], -1)
        state[name].copy_(restored.view(whole.shape).transpose(1, 2))
    save_file(tensors, folder / "model.safetensors")
    restate(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model


def restate(folder: Path, **changes: Any) -> None:
    """Other entries of config.json; None takes one out."""
    path = folder / "config.json"
    stated = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))
